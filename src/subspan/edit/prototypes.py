"""Zero-shot prototypes of texts, and class scores averaged over confident views of an image."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from subspan.base import as_tensor, check_finite, check_matrix, normalize_rows

from .confident_views import entropy_of, log_mean_probabilities, marginal_entropy, select_confident

SINGLE_TEMPLATE = ("a photo of a {}.",)
ENSEMBLE_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
_ADAM_BETAS = (0.9, 0.999)
_ADAM_EPSILON = 1e-8
# Numbers held at once per tensor of a chunk; more images than fit are adapted one chunk after the other.
_CHUNK_NUMBERS = 1 << 24


def zero_shot_prototypes(
    text_encoder: Any, classnames: Sequence[str], templates: Sequence[str] = SINGLE_TEMPLATE
) -> Float[Tensor, "c d"]:
    """Unit class prototypes: per class the mean of its normalised template embeddings, normalised again.

    Parameters
    ----------
    text_encoder
        A function list of texts → (n, d), or an object with such an `encode` (`SentenceEncoder`).
    classnames
        One a class.
    templates
        Each with a {} for the class name.

    Returns
    -------
    Tensor, (c, d).

    Raises
    ------
    ValueError
        For a template without {}, or an encoder with another number of rows.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import zero_shot_prototypes
    >>> encoder = lambda texts: torch.tensor([[1.0 + text.count("cat"), 2.0 * text.count("dog")] for text in texts])
    >>> prototypes = zero_shot_prototypes(encoder, ["cat", "dog"], ["a photo of a {}.", "{}"])
    >>> torch.allclose(prototypes.norm(dim=1), torch.ones(2))
    True
    """
    names = check_texts(classnames, "classnames", 2)
    prompts = check_texts(templates, "templates", 1)
    if any("{}" not in prompt for prompt in prompts):
        raise ValueError(f"templates: each needs a {{}} for the class name, got {list(prompts)}")
    encode: Callable[[list[str]], Any] = getattr(text_encoder, "encode", text_encoder)
    embeddings = check_matrix(encode([prompt.format(name) for name in names for prompt in prompts]), "text_encoder")
    if len(embeddings) != len(names) * len(prompts):
        raise ValueError(f"text_encoder: gave {len(embeddings)} rows for {len(names) * len(prompts)} texts")
    unit = normalize_rows(embeddings, keep_zero=False)
    return normalize_rows(unit.reshape(len(names), len(prompts), -1).mean(1), keep_zero=False)


@dataclass(frozen=True)
class SteeringReport:
    """What an adaptation did to each of b images.

    Attributes
    ----------
    probabilities
        (b, c).
    coefficients
        (b, k), or (b, c, k) per class.
    shift
        Basis times coefficients: (b, d) or (b, c, d).
    entropy_before, entropy_after
        Marginal entropy (b,) of the kept views, in nats.
    kept
        Indices (b, m) of the kept views, most confident first, -1 beyond an image's own count.
    """

    probabilities: Float[Tensor, "b c"]
    coefficients: Float[Tensor, "b ... k"]
    shift: Float[Tensor, "b ... d"]
    entropy_before: Float[Tensor, " b"]
    entropy_after: Float[Tensor, " b"]
    kept: Int[Tensor, "b m"]


class ConfidentAverage(nn.Module):
    """Mean softmax of the most confident views under fixed prototypes: the zero-shot part of test-time steering.

    Call with views (n, d) or (b, n, d), the original first, and get probabilities (b, c).

    Parameters
    ----------
    prototypes
        (c, d), normalised here.
    logit_scale
        Multiplies cosines (CLIP: about 100).
    keep
        Fraction of the views kept, 1.0 for all.
    predict
        "confident_mean" of the kept views, or "original" for the first view alone.

    Raises
    ------
    ValueError
        For fewer than 2 prototypes, one of zeros, and settings out of range.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import ConfidentAverage
    >>> model = ConfidentAverage(torch.eye(2), keep=0.5)
    >>> views = torch.tensor([[1.0, 0.99], [0.0, 1.0], [1.0, 1.01], [1.0, 2.0]])  # two of the four are sure
    >>> model(views).round().tolist()
    [[0.0, 1.0]]
    """

    prototypes: Tensor

    def __init__(
        self,
        prototypes: Any,
        logit_scale: float = 100.0,
        *,
        keep: float = 0.1,
        predict: str = "confident_mean",
    ) -> None:
        super().__init__()
        rows = check_matrix(prototypes, "prototypes")
        if len(rows) < 2:
            raise ValueError(f"prototypes: at least 2 classes are needed, got {len(rows)}")
        zero = (rows == 0).all(-1)
        if bool(zero.any()):
            raise ValueError(f"prototypes: row {int(zero.nonzero()[0, 0])} is zero and has no direction")
        scale = float(logit_scale)
        if not 0 < scale < float("inf"):
            raise ValueError(f"logit_scale: must be positive and finite, got {logit_scale}")
        if scale <= 1:
            warnings.warn(
                f"logit_scale={scale} leaves softmaxes over cosines nearly flat; CLIP's is about 100 "
                "(the exponential of the stored parameter)",
                stacklevel=2,
            )
        if not 0 < keep <= 1:
            raise ValueError(f"keep: a fraction of the views in (0, 1], got {keep}")
        if predict not in ("confident_mean", "original"):
            raise ValueError(f"predict: 'confident_mean' or 'original', got {predict!r}")
        # Half precision is for storage; entropies need more digits.
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        self.register_buffer("prototypes", normalize_rows(rows))
        self.logit_scale = scale
        self.keep = keep
        self.predict = predict

    def forward(self, views: Any, mask: Any = None) -> Float[Tensor, "b c"]:
        """Class probabilities (b, c) of images given by views (n, d) or (b, n, d), the original view first.

        mask (b, n) or (n,): which views exist, for images with unequal numbers of them.
        Raises ValueError for views of another width, on another device, zero or not finite.
        """
        return torch.cat([report.probabilities for report in self._reports(views, mask)])

    @torch.no_grad()
    def _reports(self, views: Any, mask: Any) -> Iterable[SteeringReport]:
        rows, mask = self._check_views(views, mask)
        _, n, d = rows.shape
        per_image = max(n * max(len(self.prototypes), d), self._unknowns())
        step = max(1, _CHUNK_NUMBERS // per_image)
        # Matrix products in half precision would decide the signs of small gradients.
        with torch.autocast(rows.device.type, enabled=False):
            return [self._adapt(rows[i : i + step], mask[i : i + step]) for i in range(0, len(rows), step)]

    def _unknowns(self) -> int:
        return 0

    def _check_views(self, views: Any, mask: Any) -> tuple[Tensor, Tensor]:
        rows = as_tensor(views, "views")
        rows = rows.unsqueeze(0) if rows.ndim == 2 else rows
        if rows.ndim != 3 or 0 in rows.shape:
            raise ValueError(f"views: expected shape (n, d) or (b, n, d) and no empty axis, got {tuple(rows.shape)}")
        if rows.shape[-1] != self.prototypes.shape[-1]:
            raise ValueError(f"views: expected {self.prototypes.shape[-1]} columns, got {rows.shape[-1]}")
        if rows.device != self.prototypes.device:
            raise ValueError(f"views: are on {rows.device}, the prototypes on {self.prototypes.device}; use .to(...)")
        exists = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        if mask is not None:
            exists = torch.as_tensor(mask, device=rows.device)
            exists = exists.unsqueeze(0) if exists.ndim == 1 else exists
            if exists.dtype != torch.bool or exists.shape != rows.shape[:2]:
                wanted = tuple(rows.shape[:2])
                raise ValueError(
                    f"mask: booleans of shape {wanted} are needed, got {exists.dtype} {tuple(exists.shape)}"
                )
            if not bool(exists.any(-1).all()):
                raise ValueError("mask: every image needs at least one view")
            if self.predict == "original" and not bool(exists[:, 0].all()):
                raise ValueError("mask: predict='original' reads the first view, which is masked for some image")
            rows = rows.masked_fill(~exists.unsqueeze(-1), 0)
        rows = rows.to(torch.promote_types(torch.promote_types(rows.dtype, self.prototypes.dtype), torch.float32))
        length = torch.linalg.vector_norm(rows, dim=-1).masked_fill(~exists, 1)
        if bool(((length > 1e-15) & (length < 1e15)).all()):
            return rows / length.unsqueeze(-1), exists
        # Squares of the entries may have left the range of the dtype: the safe way, which costs three times as much.
        if bool((exists & (rows == 0).all(-1)).any()):
            raise ValueError("views: some view is zero and has no direction; leave it out with mask=")
        # After scaling: a view has a direction however long it is, and NaN and infinity stay NaN.
        return check_finite(normalize_rows(rows), "views"), exists

    def _adapt(self, views: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> SteeringReport:
        cosines = views @ self.prototypes.to(views.dtype).mT
        index, counts = select_confident(self.logit_scale * cosines, self.keep, mask)
        kept = views.gather(1, index.unsqueeze(-1).expand(-1, -1, views.shape[-1]))
        kept_cosines = cosines.gather(1, index.unsqueeze(-1).expand(-1, -1, cosines.shape[-1]))
        coefficients = self._coefficients(kept, kept_cosines, counts)
        adapted = self._steered(kept, kept_cosines, coefficients)
        log_mean = log_mean_probabilities((self.logit_scale * adapted).log_softmax(-1), counts)
        if self.predict == "original":
            first = self._steered(views[:, :1], cosines[:, :1], coefficients)
            probabilities = (self.logit_scale * first).softmax(-1)[:, 0]
        else:
            probabilities = log_mean.exp()
        return SteeringReport(
            probabilities=probabilities,
            coefficients=coefficients,
            shift=self._embed(coefficients),
            entropy_before=marginal_entropy(self.logit_scale * kept_cosines, counts),
            entropy_after=entropy_of(log_mean),
            kept=index.masked_fill(~counts, -1),
        )

    def _coefficients(self, views: Tensor, cosines: Tensor, counts: Tensor) -> Tensor:
        return views.new_zeros(len(views), 0)

    def _embed(self, coefficients: Tensor) -> Tensor:
        return coefficients.new_zeros(len(coefficients), self.prototypes.shape[-1])

    def _steered(self, views: Tensor, cosines: Tensor, coefficients: Tensor) -> Tensor:
        """Cosines (b, m, c) of views with the adapted prototypes."""
        return cosines

    def extra_repr(self) -> str:
        """Sizes and settings, for `repr`."""
        c, d = self.prototypes.shape
        return f"classes={c}, dim={d}, logit_scale={self.logit_scale:g}, keep={self.keep}, predict={self.predict!r}"


class PrototypeShift(ConfidentAverage):
    """Test-time prototype shifting: entropy steps on a shift of the prototypes in all d dimensions.

    Parameters
    ----------
    prototypes, logit_scale, keep, predict
        As in `ConfidentAverage`.
    steps, learning_rate, optimizer
        Of the shift; the optimizer is "adamw" or "sgd".
    weight_decay
        Of AdamW only.
    reg, penalty
        Weight of the shift's norm in the loss ("norm"), or of its square ("squared"); without effect in a first step,
        which starts at zero.
    per_class
        One shift a class instead of one for all.
    online
        Start each image from where the last one ended (`reset` forgets).

    Raises
    ------
    ValueError
        For settings out of range.

    References
    ----------
    Sui et al. (2024), arXiv 2403.12952.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import PrototypeShift
    >>> views = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    >>> report = PrototypeShift(torch.eye(8), 10.0, keep=0.5).explain(views)
    >>> bool(report.entropy_after < report.entropy_before)
    True
    """

    def __init__(
        self,
        prototypes: Any,
        logit_scale: float = 100.0,
        *,
        steps: int = 1,
        learning_rate: float = 5e-3,
        optimizer: str = "adamw",
        weight_decay: float = 0.01,
        reg: float = 0.0,
        penalty: str = "norm",
        keep: float = 0.1,
        predict: str = "original",
        per_class: bool = False,
        online: bool = False,
    ) -> None:
        super().__init__(prototypes, logit_scale, keep=keep, predict=predict)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: an integer >= 1 is needed, got {steps!r}")
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate: must be positive and finite, got {learning_rate}")
        if optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer: 'adamw' or 'sgd', got {optimizer!r}")
        if penalty not in ("norm", "squared"):
            raise ValueError(f"penalty: 'norm' or 'squared', got {penalty!r}")
        for name, value in (("reg", reg), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: must be >= 0 and finite, got {value}")
        self.steps = steps
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.reg = reg
        self.penalty = penalty
        self.per_class = per_class
        self.online = online
        self.reset()

    def explain(self, views: Any, mask: Any = None) -> SteeringReport:
        """Probabilities together with coefficients, shifts, entropies before and after, and the kept views."""
        reports = list(self._reports(views, mask))
        widest = max(report.kept.shape[1] for report in reports)
        joined = {}
        for field in dataclasses.fields(SteeringReport):
            parts = [getattr(report, field.name) for report in reports]
            if field.name == "kept":
                parts = [nn.functional.pad(part, (0, widest - part.shape[1]), value=-1) for part in parts]
            joined[field.name] = torch.cat(parts)
        return SteeringReport(**joined)

    def reset(self) -> None:
        """Forget what `online` adaptation has accumulated."""
        self._running: Tensor | None = None

    def _dim(self) -> int:
        return self.prototypes.shape[-1]

    def _unknowns(self) -> int:
        return self._dim() * (len(self.prototypes) if self.per_class else 1)

    def _coordinates(self, rows: Tensor) -> Tensor:
        return rows

    def _embed(self, coefficients: Tensor) -> Tensor:
        return coefficients

    def _coefficients(self, views: Tensor, cosines: Tensor, counts: Tensor) -> Tensor:
        shape = (len(self.prototypes), self._dim()) if self.per_class else (self._dim(),)
        if not self.online:
            return self._descend(views, cosines, counts, views.new_zeros(len(views), *shape))
        start = views.new_zeros(1, *shape) if self._running is None else self._running.to(views)
        found = []
        for i in range(len(views)):
            here = slice(i, i + 1)
            start = self._descend(views[here], cosines[here], counts[here], start)
            found.append(start)
        self._running = start
        return torch.cat(found)

    def _descend(self, views: Tensor, cosines: Tensor, counts: Tensor, start: Tensor) -> Tensor:
        """Entropy steps from `start`, elementwise per image: what torch's optimiser does to each image alone."""
        value = start.clone()
        first, second = torch.zeros_like(value), torch.zeros_like(value)
        beta1, beta2 = _ADAM_BETAS
        for step in range(1, self.steps + 1):
            gradient = self._gradient(views, cosines, counts, value)
            if self.optimizer == "sgd":
                value = value - self.learning_rate * gradient
                continue
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient.square()
            root = (second / (1 - beta2**step)).sqrt() + _ADAM_EPSILON
            value = (
                value * (1 - self.learning_rate * self.weight_decay)
                - self.learning_rate / (1 - beta1**step) * first / root
            )
        return value

    def _gradient(self, views: Tensor, cosines: Tensor, counts: Tensor, value: Tensor) -> Tensor:
        """Gradient (b, k) or (b, c, k) of the loss over the kept views, in closed form."""
        steered = self._steered(views, cosines, value)
        log_p = (self.logit_scale * steered).log_softmax(-1)
        surprise = -log_mean_probabilities(log_p, counts).unsqueeze(1)
        p = log_p.exp()
        # dH/dlogit of view j, class c: p (surprise_c - its mean under p), averaged over the views that count.
        weight = p * (surprise - (p * surprise).sum(-1, keepdim=True))
        weight = weight * counts.unsqueeze(-1) / counts.sum(-1)[:, None, None]
        gradient = self._pull_back(views, steered, self.logit_scale * weight, value)
        if self.reg > 0:
            square = value.square().flatten(1).sum(-1).reshape(-1, *[1] * (value.ndim - 1))
            # The norm has no slope at zero; its subgradient of least length is taken, as autograd does.
            norm = square.sqrt().clamp_min(torch.finfo(value.dtype).tiny)
            gradient = gradient + self.reg * (value / norm if self.penalty == "norm" else 2 * value)
        return gradient

    def _steered(self, views: Tensor, cosines: Tensor, coefficients: Tensor) -> Tensor:
        x, y = self._coordinates(views), self._coordinates(self.prototypes.to(views.dtype))
        along = x @ coefficients.mT if self.per_class else x @ coefficients.unsqueeze(-1)
        return (cosines + along) / self._norms(y, coefficients).unsqueeze(1)

    def _norms(self, y: Tensor, coefficients: Tensor) -> Tensor:
        """Lengths (b, c) of unit prototypes with coordinates y (c, k) after the shift."""
        cross = (coefficients * y).sum(-1) if self.per_class else coefficients @ y.mT
        square = 1 + 2 * cross + coefficients.square().sum(-1, keepdim=not self.per_class)
        return square.clamp_min(torch.finfo(square.dtype).eps).sqrt()

    def _pull_back(self, views: Tensor, steered: Tensor, slope: Tensor, coefficients: Tensor) -> Tensor:
        """Chain rule through cosine = (v.z + x.g) / |z + Bg|: slope (b, m, c) on cosines to one on coefficients."""
        x, y = self._coordinates(views), self._coordinates(self.prototypes.to(views.dtype))
        norms = self._norms(y, coefficients)
        outer = slope / norms.unsqueeze(1)
        inner = (slope * steered).sum(1) / norms.square()
        if self.per_class:
            return outer.mT @ x - inner.unsqueeze(-1) * (y + coefficients)
        radial = inner @ y + inner.sum(-1, keepdim=True) * coefficients
        return (outer.sum(-1).unsqueeze(1) @ x).squeeze(1) - radial

    def extra_repr(self) -> str:
        """Sizes and settings, for `repr`."""
        step = f"steps={self.steps}, learning_rate={self.learning_rate:g}, optimizer={self.optimizer!r}"
        return f"{super().extra_repr()}, {step}, per_class={self.per_class}"


def check_texts(texts: Sequence[str], name: str, least: int) -> list[str]:
    """The texts as a list, or an error that names the argument."""
    if isinstance(texts, str):
        raise TypeError(f"{name}: a list of texts is needed, got one text")
    listed = list(texts)
    wrong = [text for text in listed if not isinstance(text, str) or not text.strip()]
    if wrong:
        raise ValueError(f"{name}: texts that are not empty are needed, got {wrong[0]!r}")
    if len(listed) < least:
        raise ValueError(f"{name}: at least {least} are needed, got {len(listed)}")
    return listed
