"""Perturbed versions of images and texts: a gradient attack, and the usual unaimed ones.

Images are pixel values (b, 3, h, w), or any other input of the model where no `clip` applies.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from subspan.base import require

Norm = Literal["linf", "l2"]

_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
TYPOS = ("swap", "drop", "repeat", "neighbour")


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b ..."],
    y: Integer[Tensor, " b"] | None = None,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    random_start: bool = True,
    stop_when_wrong: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b ..."]:
    """Inputs within `eps` of `x` that raise the model's loss, by projected gradient ascent.

    Parameters
    ----------
    model
        Inputs in evaluation mode → logits (b, classes).
    x
        Inputs (b, …).
    y
        True classes (b,); None takes the model's own answers, so that no label is needed.
    eps
        Radius, in the unit of x.
    steps, step_size
        Steps of ascent and their length; None: 2.5 eps / steps.
    norm
        "linf" per entry or "l2" per sample.
    clip
        Range of valid inputs; None for none.
    loss
        (logits, y) → (b,); None: cross-entropy.
    random_start
        Begin at a random point of the ball.
    stop_when_wrong
        A sample that is already misclassified is left as it is, which saves passes and does not change whether the
        attack succeeds.
    generator
        Source of the random start.

    Returns
    -------
    Tensor, (b, …).

    Raises
    ------
    ValueError
        For eps < 0, steps < 1, or inputs outside `clip`.

    References
    ----------
    Madry et al. (2018), arXiv 1706.06083.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import pgd
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.eye(2))
    >>> attacked = pgd(model, torch.tensor([[0.6, 0.5]]), torch.tensor([0]), eps=0.1)
    >>> attacked.mul(10).round().tolist(), model(attacked).argmax().item()
    ([[5.0, 6.0]], 1)
    """
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: a radius of 0 or more is needed, got {eps}")
    if steps < 1:
        raise ValueError(f"steps: at least 1, got {steps}")
    _check_norm(norm)
    if clip is not None and not bool(((x >= clip[0]) & (x <= clip[1])).all()):
        raise ValueError(f"x: entries must lie in clip = {clip} (and be finite)")
    size = 2.5 * eps / steps if step_size is None else step_size
    objective = _cross_entropy if loss is None else loss
    if y is None:
        with torch.no_grad():
            y = model(x).argmax(-1)
    start = random_noise(x, eps=eps, norm=norm, clip=clip, inside=True, generator=generator) if random_start else x
    attacked = start.clone()
    active = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        point = attacked[active].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = model(point)
            gradient = torch.autograd.grad(objective(logits, y[active]).sum(), point)[0]
        if stop_when_wrong:
            right = logits.argmax(-1) == y[active]
            active, point, gradient = active[right], point[right], gradient[right]
            if not len(active):
                break
        direction = gradient.sign() if norm == "linf" else gradient / _norms(gradient).clamp_min(1e-30)
        attacked[active] = _projected(point.detach() + size * direction, x[active], eps, norm, clip)
    return attacked


def random_noise(
    x: Float[Tensor, "b ..."],
    *,
    eps: float,
    norm: Norm = "linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    inside: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b ..."]:
    """Unaimed noise as large as an attack: random signs of size `eps` ("linf") or a random direction of length `eps`.

    Parameters
    ----------
    x
        Inputs (b, …).
    eps
        Size, in the unit of x.
    norm
        "linf" per entry or "l2" per sample.
    clip
        Range of valid inputs; None for none.
    inside
        Uniform in the ball instead of on its boundary (the start of an attack).
    generator
        Source of the noise.

    Returns
    -------
    Tensor, (b, …).

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import random_noise
    >>> x = torch.full((2, 3, 4, 4), 0.5)
    >>> torch.allclose((random_noise(x, eps=0.1) - x).abs(), torch.tensor(0.1))
    True
    """
    _check_norm(norm)
    options = {"generator": generator, "device": generator.device if generator is not None else x.device}
    if norm == "linf":
        noise = torch.rand(x.shape, **options) * 2 - 1
        noise = eps * (noise if inside else noise.sign())
    else:
        noise = torch.randn(x.shape, **options)
        noise = eps * noise / _norms(noise)
        if inside:
            radius = torch.rand(len(x), **options) ** (1 / max(1, x[0].numel()))
            noise = noise * radius.reshape(-1, *[1] * (x.ndim - 1))
    moved = x + noise.to(x)
    return moved if clip is None else moved.clamp(*clip)


def gaussian_blur(x: Float[Tensor, "b c h w"], *, sigma: float = 1.0) -> Float[Tensor, "b c h w"]:
    """Gaussian blur, edges reflected; differentiable.

    Parameters
    ----------
    x
        Images (b, c, h, w).
    sigma
        Standard deviation in pixels.

    Returns
    -------
    Tensor, (b, c, h, w).

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import gaussian_blur
    >>> x = torch.rand(1, 3, 16, 16)
    >>> bool(gaussian_blur(x).var() < x.var())
    True
    """
    if not sigma > 0:
        raise ValueError(f"sigma: must be positive, got {sigma}")
    radius = min(math.ceil(3 * sigma), min(x.shape[-2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    channels = x.shape[1]
    row = weights.reshape(1, 1, 1, -1).expand(channels, 1, 1, -1)
    padded = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, row, groups=channels), row.mT, groups=channels)


def jpeg(x: Float[Tensor, "b 3 h w"], *, quality: int = 75) -> Float[Tensor, "b 3 h w"]:
    """Pixel values through JPEG (extra: vision).

    The gradient is taken as that of the identity, so that an attack can go through it (Athalye et al., 2018).

    Parameters
    ----------
    x
        Images (b, 3, h, w) in [0, 1].
    quality
        1 … 95.

    Returns
    -------
    Tensor, (b, 3, h, w).

    Raises
    ------
    ValueError
        For another quality.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import jpeg
    >>> compressed = jpeg(torch.rand(1, 3, 16, 16), quality=50)  # doctest: +SKIP
    """
    if not 1 <= quality <= 95:
        raise ValueError(f"quality: must lie in [1, 95], got {quality}")
    image = require("PIL.Image", extra="vision")
    pixels = (x.detach().clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    decoded = []
    for array in pixels:
        buffer = io.BytesIO()
        image.fromarray(array).save(buffer, format="JPEG", quality=quality)
        decoded.append(np.asarray(image.open(buffer), dtype=np.float32) / 255)
    compressed = torch.from_numpy(np.stack(decoded)).movedim(-1, 1).to(x)
    return x + (compressed - x).detach()


def typos(
    text: str, *, rate: float = 0.1, kinds: Sequence[str] = TYPOS, generator: np.random.Generator | None = None
) -> str:
    """A text in which each letter is mistyped with probability `rate`.

    Parameters
    ----------
    text
        Any text.
    rate
        In [0, 1].
    kinds
        Drawn with equal chance: "swap" with the next letter, "drop" it, "repeat" it, "neighbour" = a key beside it.
    generator
        numpy's; None for a new one.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        For another kind or rate.

    Examples
    --------
    >>> from subspan.edit import typos
    >>> typos("ab c", rate=1.0, kinds=["repeat"])
    'aabb cc'
    """
    unknown = [kind for kind in kinds if kind not in TYPOS]
    if unknown or not kinds:
        raise ValueError(f"kinds: some of {', '.join(TYPOS)} are needed, got {list(kinds)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: must lie in [0, 1], got {rate}")
    generator = np.random.default_rng() if generator is None else generator
    letters, out, i = list(text), [], 0
    while i < len(letters):
        letter = letters[i]
        i += 1
        if not letter.isalpha() or generator.random() >= rate:
            out.append(letter)
            continue
        kind = kinds[int(generator.integers(len(kinds)))]
        if kind == "repeat":
            out += [letter, letter]
        elif kind == "neighbour":
            out.append(_beside(letter, generator))
        elif kind == "swap" and i < len(letters) and letters[i].isalpha():
            out += [letters[i], letter]
            i += 1
        elif kind == "swap":
            out.append(letter)
    return "".join(out)


def _beside(letter: str, generator: np.random.Generator) -> str:
    """A key left or right of the letter; letters that are not on the keyboard stay."""
    for row in _KEYBOARD:
        at = row.find(letter.lower())
        if at >= 0:
            near = row[max(0, at - 1) : at] + row[at + 1 : at + 2]
            chosen = near[int(generator.integers(len(near)))]
            return chosen.upper() if letter.isupper() else chosen
    return letter


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def _check_norm(norm: str) -> None:
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm: 'linf' or 'l2', got {norm!r}")


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, shaped to divide it."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *[1] * (x.ndim - 1))


def _projected(moved: Tensor, x: Tensor, eps: float, norm: str, clip: tuple[float, float] | None) -> Tensor:
    """The point of the ball around x nearest to `moved`, then inside the valid range (which is convex around x)."""
    change = moved - x
    if norm == "linf":
        change = change.clamp(-eps, eps)
    else:
        change = change * (eps / _norms(change).clamp_min(1e-30)).clamp_max(1)
    moved = x + change
    return moved if clip is None else moved.clamp(*clip)
