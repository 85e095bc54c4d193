"""Layers on grids of patch tokens: normalisation over the tokens of an image, projection, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.measures.spatial import grid_shape

Interpolation = Literal["bicubic", "bilinear", "area"]


class SpatialNorm(nn.Module):
    """Tokens (b, t, d) → (x - γ m) / (s + eps), m and s the mean and unbiased deviation of each channel over t.

    Statistics in float32 or wider, output in the dtype given; NaN stays NaN. Fewer than 2 tokens, whose deviation is
    undefined, raise ValueError.

    Parameters
    ----------
    gamma
        γ, the share of the global component that is taken away; 1 leaves tokens of mean 0, 0 only scales.
    eps
        Added to the deviation.
    remove_rank
        The global component is, in place of the mean, the projection onto the image's so many leading uncentred
        directions, and s the deviation of what is left. None: the mean.
    floor
        Channels with s <= floor · |m| become 0: with γ < 1 the published formula turns a constant channel into
        (1 - γ) m / eps, which swallows every cosine.

    Raises
    ------
    ValueError
        For values out of range.

    References
    ----------
    Singh et al. (2026), arXiv 2512.10794; their two programs use γ = 0.6 and 0.8.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SpatialNorm
    >>> tokens = SpatialNorm(gamma=1.0)(torch.randn(2, 9, 4) + 5)
    >>> bool(tokens.mean(1).abs().max() < 1e-4), torch.allclose(tokens.std(1), torch.ones(2, 4), atol=1e-3)
    (True, True)
    """

    def __init__(
        self, gamma: float = 0.8, eps: float = 1e-6, remove_rank: int | None = None, floor: float = 1e-3
    ) -> None:
        super().__init__()
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma: in [0, 1], got {gamma}")
        if not (eps >= 0 and floor >= 0 and math.isfinite(eps) and math.isfinite(floor)):
            raise ValueError(f"eps, floor: finite and not negative, got {eps} and {floor}")
        if remove_rank is not None and remove_rank < 1:
            raise ValueError(f"remove_rank: at least 1, or None for the mean, got {remove_rank}")
        self.gamma = gamma
        self.eps = eps
        self.remove_rank = remove_rank
        self.floor = floor

    def forward(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The normalised tokens."""
        t, d = tokens.shape[-2:]
        if t < 2:
            raise ValueError(f"tokens: at least 2 tokens an image are needed for a deviation, got {t}")
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        mean = wide.mean(-2, keepdim=True)
        if self.remove_rank is None:
            rest, spread = wide - self.gamma * mean, wide
        else:
            if self.remove_rank >= min(t, d):
                raise ValueError(f"remove_rank: below min(t, d) = {min(t, d)}, got {self.remove_rank}")
            rest = spread = wide - self.gamma * _leading_part(wide, self.remove_rank)
        # Written so that NaN is not constant and comes out as NaN.
        constant = spread.detach().std(-2, keepdim=True) <= self.floor * mean.detach().abs()
        # The deviation of a constant channel has no slope, which is NaN: one that varies stands in for it.
        varied = torch.arange(t, dtype=wide.dtype, device=wide.device).unsqueeze(-1)
        scale = torch.where(constant, varied, spread).std(-2, keepdim=True) + self.eps
        return torch.where(constant, 0.0, rest / scale).to(tokens.dtype)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"gamma={self.gamma}, remove_rank={self.remove_rank}, floor={self.floor}"


class PatchProjector(nn.Module):
    """Student tokens (b, t, d_in) → teacher's width (b, t, d_out); used in training only.

    The call also takes hw, (rows, columns) of the grid, square by default; "conv" alone looks at it.

    Parameters
    ----------
    d_in, d_out
        Widths of the student and the teacher.
    kind
        "conv": one convolution on the grid, zero padded (iREPA); "mlp": linear, SiLU, linear, SiLU, linear on each
        token (REPA); "linear": one linear map.
    kernel_size
        Of "conv"; odd.
    hidden
        Width of "mlp"; `hidden_for` gives one for a number of parameters.

    Raises
    ------
    ValueError
        For another kind, an even kernel, or sizes below 1.

    References
    ----------
    Singh et al. (2026), arXiv 2512.10794 (iREPA).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import PatchProjector
    >>> PatchProjector(8, 16)(torch.randn(2, 9, 8)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        kind: str = "conv",
        kernel_size: int = 3,
        hidden: int = 2048,
    ) -> None:
        super().__init__()
        if kind not in ("conv", "mlp", "linear"):
            raise ValueError(f"kind: 'conv', 'mlp' or 'linear', got {kind!r}")
        if min(d_in, d_out, hidden) < 1:
            raise ValueError(f"d_in, d_out, hidden: at least 1, got {d_in}, {d_out} and {hidden}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: odd, so that the grid keeps its size, got {kernel_size}")
        self.d_in = d_in
        self.d_out = d_out
        self.kind = kind
        self.layers: nn.Module
        if kind == "conv":
            self.layers = nn.Conv2d(d_in, d_out, kernel_size, padding=kernel_size // 2)
        elif kind == "linear":
            self.layers = nn.Linear(d_in, d_out)
        else:
            first, second, last = nn.Linear(d_in, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, d_out)
            self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)

    @staticmethod
    def hidden_for(parameters: int, d_in: int, d_out: int) -> int:
        """The `hidden` for which the "mlp" has as close to `parameters` weights and biases as it can."""
        # hidden² + (d_in + d_out + 2) hidden + d_out = parameters
        linear = d_in + d_out + 2
        if parameters <= d_out + linear:
            raise ValueError(f"parameters: more than {d_out + linear} for these dimensions, got {parameters}")
        return max(1, round((-linear + math.sqrt(linear**2 + 4 * (parameters - d_out))) / 2))

    def forward(self, tokens: Float[Tensor, "b t d"], hw: Sequence[int] | None = None) -> Float[Tensor, "b t e"]:
        """The projected tokens; hw: (rows, columns) of the grid, None = square (looked at by "conv" alone)."""
        if tokens.shape[-1] != self.d_in:
            raise ValueError(f"tokens: width {self.d_in} is needed, got {tokens.shape[-1]}")
        if self.kind != "conv":
            return self.layers(tokens)
        h, w = grid_shape(tokens.shape[1], hw)
        return self.layers(tokens.mT.unflatten(-1, (h, w))).flatten(2).mT

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"d_in={self.d_in}, d_out={self.d_out}, kind={self.kind!r}"


def resize_tokens(
    tokens: Float[Tensor, "b t d"],
    hw: Sequence[int],
    target: Sequence[int],
    *,
    mode: Interpolation = "bicubic",
) -> Float[Tensor, "b s d"]:
    """Tokens of a grid on another grid.

    Parameters
    ----------
    tokens
        (b, t, d), rows of the grid first.
    hw
        (rows, columns) of the tokens' grid.
    target
        (rows, columns) of the new one.
    mode
        "bicubic" or "bilinear", both antialiased, or "area".

    Returns
    -------
    Tensor, (b, s, d), in the dtype given; computed in float32 or wider.

    Raises
    ------
    ValueError
        For another mode, or a grid that has not t places.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import resize_tokens
    >>> resize_tokens(torch.randn(1, 4, 3), (2, 2), (4, 6)).shape
    torch.Size([1, 24, 3])
    """
    if mode not in ("bicubic", "bilinear", "area"):
        raise ValueError(f"mode: 'bicubic', 'bilinear' or 'area', got {mode!r}")
    h, w = grid_shape(tokens.shape[1], hw)
    if (h, w) == tuple(target):
        return tokens
    grid = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mT.unflatten(-1, (h, w))
    options = {} if mode == "area" else {"align_corners": False, "antialias": True}
    return F.interpolate(grid, size=list(target), mode=mode, **options).flatten(2).mT.to(tokens.dtype)


def _leading_part(x: Float[Tensor, "b t d"], rank: int) -> Float[Tensor, "b t d"]:
    """Projection of the rows onto the `rank` leading right singular directions of each matrix."""
    with torch.autocast(x.device.type, enabled=False):
        return _LeadingPart.apply(x, rank)  # pyright: ignore[reportReturnType]


class _LeadingPart(torch.autograd.Function):
    """With its own derivative: that of the SVD has poles at equal singular values, also where both are left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int) -> Tensor:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        ctx.save_for_backward(u, s, vh)
        ctx.rank = rank
        return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (u, s, vh), r = grads, ctx.saved_tensors, ctx.rank
        inner = u.mT @ grad @ vh.mT
        kept = torch.arange(s.shape[-1], device=s.device) < r
        # Pairs (i, j) of a direction kept and one left out; only their singular values meet in the derivative.
        first, second = s.unsqueeze(-1), s.unsqueeze(-2)
        gap = first.square() - second.square()
        pairs = kept.unsqueeze(-1) & ~kept & (gap > torch.finfo(s.dtype).eps * first.square())
        share = torch.where(pairs, 1 / torch.where(pairs, gap, 1), 0)
        own, across = second.square() * share, first * second * share
        turned = own * inner + across * inner.mT
        turned = turned + (own * inner.mT + across * inner).mT
        rows, columns = u[..., :r] @ (u[..., :r].mT @ grad), (grad @ vh[..., :r, :].mT) @ vh[..., :r, :]
        both = u[..., :r] @ inner[..., :r, :r] @ vh[..., :r, :]
        return rows + columns - both + u @ turned @ vh, None
