"""Spatial structure of patch features: who is similar to whom inside one image (Singh et al., 2026)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspan.base import check_finite, normalize_rows

METRICS = ("lds", "cds", "srss", "rmsc")
_GRAM_ENTRIES = 1 << 24


def grid_shape(n_tokens: int, hw: Sequence[int] | None = None) -> tuple[int, int]:
    """(rows, columns) of a token grid: `hw` where given, else a square. Raises ValueError where neither fits."""
    if hw is None:
        side = math.isqrt(n_tokens)
        if side * side != n_tokens or not n_tokens:
            raise ValueError(f"hw: needed, because {n_tokens} tokens make no square grid")
        return side, side
    h, w = (int(side) for side in hw)
    if h < 1 or w < 1 or h * w != n_tokens:
        raise ValueError(f"hw: a grid of {n_tokens} tokens is needed, got {h}×{w}")
    return h, w


def manhattan_distances(h: int, w: int, *, device: torch.device | None = None) -> Int[Tensor, "t t"]:
    """Distances between the cells of an h × w grid, rows first, in steps to a 4-neighbour."""
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    down = (rows[:, None] - rows).abs()
    across = (columns[:, None] - columns).abs()
    return (down[:, None, :, None] + across[None, :, None, :]).reshape(h * w, h * w)


def spatial_structure(
    features: Tensor,
    hw: Sequence[int] | None = None,
    *,
    metrics: Sequence[str] = ("lds", "cds", "rmsc"),
    masks: Tensor | None = None,
    near: int | Literal["half"] = 1,
    far: int | Literal["half"] = 6,
    dmax: int = 8,
) -> dict[str, Float[Tensor, " b"]]:
    """How much the tokens of an image differ by place: one number per image and metric, from their cosines.

    "lds": mean cosine of pairs 0 < δ <= near minus that of pairs δ >= far, δ the Manhattan distance. "cds": minus the
    slope of the mean cosine at δ over δ = 1 … dmax, as far as the grid has such distances. "rmsc": root mean squared
    distance of the unit tokens from their mean; its square is 1 minus the mean of all t² cosines. "srss": LDS with
    `masks`: per foreground token, mean cosine to near foreground minus that to far background tokens, averaged over the
    tokens that have both. NaN with a warning where a grid has no such pairs (the authors' program divides by one) or an
    image no such token.

    O(t² d) time; of the t² cosines a block at a time is kept. Half precision is computed in float32; gradients flow.

    Parameters
    ----------
    features
        Tokens (b, t, d), t >= 2, or grids (b, h, w, d).
    hw
        Rows and columns of the grid of tokens; None: square.
    metrics
        Some of "lds", "cds", "rmsc", "srss".
    masks
        (b, t) or (b, h, w), nonzero = foreground, for "srss".
    near, far
        Distances, or "half": 0 < δ < half the shorter side, and δ at least that (the paper's text; its program, which
        made the figures, has 1 and 6).
    dmax
        Largest distance of "cds", at least 2.

    Returns
    -------
    Tensors (b,) by metric.

    Raises
    ------
    ValueError
        For t < 2, wrong shapes, NaN, unknown metrics, and "srss" without masks.

    References
    ----------
    Singh et al. (2026), arXiv 2512.10794.

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import spatial_structure
    >>> angle = torch.linspace(0, 1.5, 64).reshape(1, 8, 8)
    >>> smooth = torch.stack([angle.cos(), angle.sin()], -1)  # near tokens are alike
    >>> shuffled = smooth.flatten(1, 2)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    >>> bool(spatial_structure(smooth)["lds"] > 0.1), bool(spatial_structure(shuffled)["lds"].abs() < 0.1)
    (True, True)
    """
    tokens, (h, w) = _tokens(features, hw)
    _check_names(metrics, masks)
    near_distance = _distance(near, "near", h, w)
    far_distance = _distance(far, "far", h, w)
    if not isinstance(dmax, int) or dmax < 2:
        raise ValueError(f"dmax: an integer of at least 2, got {dmax!r}")
    unit = normalize_rows(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))
    found: dict[str, Tensor] = {}
    if "rmsc" in metrics:
        found["rmsc"] = (unit - unit.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()
    distance = manhattan_distances(h, w, device=unit.device)
    is_near = (distance > 0) & (distance < near_distance if near == "half" else distance <= near_distance)
    is_far = distance >= far_distance
    # LDS and CDS are linear in the cosines: one weight a pair, which depends on its distance only.
    weights = {}
    if "lds" in metrics:
        weights["lds"] = _pair_mean(is_near, "near", near, h, w) - _pair_mean(is_far, "far", far, h, w)
    if "cds" in metrics:
        weights["cds"] = -_slope_weights(distance, dmax, h, w)
    if weights:
        found |= dict(zip(weights, _weighted_cosines(unit, torch.stack(list(weights.values())).to(unit.dtype))))
    if "srss" in metrics:
        assert masks is not None
        found["srss"] = _region_similarity(unit, _foreground(masks, len(unit), h, w), is_near, is_far)
    return {name: found[name] for name in metrics}


def gram_agreement(x: Float[Tensor, "b t p"], y: Float[Tensor, "b t q"]) -> Float[Tensor, " b"]:
    """Pearson correlation, per image, of the cosines between different tokens in two representations of them.

    Independent of rotations and of the two dimensions.

    Parameters
    ----------
    x, y
        Tokens (b, t, p) and (b, t, q), t >= 3.

    Returns
    -------
    Correlations (b,); NaN with a warning where the cosines of an image are all equal.

    Raises
    ------
    ValueError
        For fewer than 3 tokens, and NaN.

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import gram_agreement
    >>> x = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(0))
    >>> turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
    >>> gram_agreement(x, 3 * x @ turn).round(decimals=4).tolist()
    [1.0, 1.0]
    """
    for name, value in (("x", x), ("y", y)):
        check_finite(value, name)
    t = x.shape[1]
    if t < 3:
        raise ValueError(f"x: at least 3 tokens are needed for a correlation of their cosines, got {t}")
    upper = torch.triu_indices(t, t, 1, device=x.device)
    cosines = []
    for value in (x, y):
        unit = normalize_rows(value.to(torch.promote_types(value.dtype, torch.float32)))
        pairs = (unit @ unit.mT)[:, upper[0], upper[1]]
        cosines.append(pairs - pairs.mean(1, keepdim=True))
    norms = torch.stack([value.norm(dim=1) for value in cosines])
    # What rounding leaves of equal cosines.
    flat = (norms <= 1e-6 * math.sqrt(upper.shape[1])).any(0)
    if bool(flat.any()):
        warnings.warn(
            f"{int(flat.sum())} of {len(flat)} images have equal cosines; their agreement is NaN", stacklevel=2
        )
    return ((cosines[0] * cosines[1]).sum(1) / norms.prod(0)).masked_fill(flat, torch.nan)


def _tokens(features: Tensor, hw: Sequence[int] | None) -> tuple[Tensor, tuple[int, int]]:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError("features: a floating-point tensor is needed")
    if features.ndim == 4:
        shape = tuple(features.shape[1:3])
        if hw is not None and tuple(hw) != shape:
            raise ValueError(f"hw: the grid of the features is {shape}, got {tuple(hw)}")
        features, hw = features.flatten(1, 2), shape
    if features.ndim != 3 or not features.numel():
        raise ValueError(f"features: tokens (b, t, d) or grids (b, h, w, d) are needed, got {tuple(features.shape)}")
    if features.shape[1] < 2:
        raise ValueError("features: at least 2 tokens an image are needed, got 1")
    return check_finite(features, "features"), grid_shape(features.shape[1], hw)


def _check_names(metrics: Sequence[str], masks: Tensor | None) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if isinstance(metrics, str) or unknown or not metrics:
        raise ValueError(f"metrics: some of {', '.join(METRICS)}, got {metrics!r}")
    if "srss" in metrics and masks is None:
        raise ValueError("masks: needed for srss")


def _distance(value: int | str, name: str, h: int, w: int) -> float:
    if value == "half":
        return min(h, w) / 2
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: an integer of at least 1 or 'half', got {value!r}")
    return value


def _pair_mean(pairs: Bool[Tensor, "t t"], name: str, value: int | str, h: int, w: int) -> Float[Tensor, "t t"]:
    """Weights whose sum with the cosines is their mean over `pairs`; NaN where there are none."""
    count = int(pairs.sum())
    if not count:
        warnings.warn(f"{name}: a {h}×{w} grid has no pairs for {value!r}; LDS is NaN", stacklevel=3)
    return pairs.double() / (count or torch.nan)


def _slope_weights(distance: Int[Tensor, "t t"], dmax: int, h: int, w: int) -> Float[Tensor, "t t"]:
    """Weights whose sum with the cosines is the slope of their means over the distances 1 … dmax."""
    last = min(dmax, h + w - 2)
    if last < 2:
        warnings.warn(f"dmax: a {h}×{w} grid has only {last} distance; CDS is NaN", stacklevel=3)
        return torch.full(distance.shape, torch.nan, dtype=torch.float64, device=distance.device)
    counts = torch.bincount(distance.flatten(), minlength=last + 1)[: last + 1].double()
    steps = torch.arange(last + 1, dtype=torch.float64, device=distance.device)
    centred = steps - steps[1:].mean()
    per_distance = centred / centred[1:].square().sum() / counts
    per_distance[0] = 0
    return torch.where(distance <= last, per_distance[distance.clamp_max(last)], 0.0)


def _blocks(b: int, t: int) -> list[slice]:
    """Rows of the Gram matrices that are held at once."""
    step = max(1, _GRAM_ENTRIES // (b * t))
    return [slice(start, min(start + step, t)) for start in range(0, t, step)]


def _weighted_cosines(unit: Float[Tensor, "b t d"], weights: Float[Tensor, "m t t"]) -> Float[Tensor, "m b"]:
    b, t, _ = unit.shape
    total = unit.new_zeros(len(weights), b)
    for rows in _blocks(b, t):
        gram = unit[:, rows] @ unit.mT
        total = total + weights[:, rows].flatten(1) @ gram.flatten(1).mT
    return total


def _foreground(masks: Tensor, b: int, h: int, w: int) -> Bool[Tensor, "b t"]:
    if tuple(masks.shape) not in ((b, h * w), (b, h, w)):
        raise ValueError(f"masks: shape {(b, h * w)} or {(b, h, w)} is needed, got {tuple(masks.shape)}")
    return masks.reshape(b, h * w) != 0


def _region_similarity(
    unit: Float[Tensor, "b t d"],
    foreground: Bool[Tensor, "b t"],
    is_near: Bool[Tensor, "t t"],
    is_far: Bool[Tensor, "t t"],
) -> Float[Tensor, " b"]:
    inside = foreground.to(unit)
    total, anchors = unit.new_zeros(len(unit)), unit.new_zeros(len(unit))
    for rows in _blocks(*unit.shape[:2]):
        gram = unit[:, rows] @ unit.mT
        means, counts = [], []
        for pairs, region in ((is_near, inside), (is_far, 1 - inside)):
            chosen = pairs[rows].to(unit) * region[:, None]
            counts.append(chosen.sum(-1))
            means.append((gram * chosen).sum(-1) / counts[-1].clamp_min(1))
        valid = inside[:, rows] * (counts[0] > 0) * (counts[1] > 0)
        total = total + (valid * (means[0] - means[1])).sum(1)
        anchors = anchors + valid.sum(1)
    if bool((anchors == 0).any()):
        warnings.warn(
            f"masks: {int((anchors == 0).sum())} of {len(unit)} images have no foreground token with both a near "
            "foreground and a far background token; their SRSS is NaN",
            stacklevel=3,
        )
    return total / torch.where(anchors > 0, anchors, torch.nan)
