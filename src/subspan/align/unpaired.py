"""Two embedding spaces aligned from their distributions alone, and an honest account of whether that worked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..geometry.arrays import normalize_rows
from ..geometry.maps import AffineMap, procrustes
from ..solvers import nearest
from ..statistics import Moments

_ROWS = 4000
_ROUNDS = 40
_RESTARTS = 6
_SETTLED = 0.005
_LEAST_AGREEMENT = 0.25


@dataclass(frozen=True)
class UnpairedReport:
    """Whether alignment without pairs worked.

    agreement: two maps, fitted to disjoint halves, send held-out rows to the same k neighbours this often; chance: what
    unrelated maps would reach. mutual_share: rows that are each other's nearest after the map. recall: of the known
    pairs that were given to check, else None. converged: the matches settled.
    """

    agreement: float
    chance: float
    mutual_share: float
    converged: bool
    rounds: int
    recall: float | None
    succeeded: bool
    reason: str

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Fit:
    affine: AffineMap
    mutual_share: float
    converged: bool
    rounds: int


def align_unpaired(
    x: Float[Tensor, "n d_x"],
    y: Float[Tensor, "m d_y"],
    *,
    k: int = 10,
    metric: str = "cosine",
    check: tuple[Tensor, Tensor] | None = None,
    random_state: int = 0,
) -> tuple[AffineMap, AffineMap, UnpairedReport]:
    """Isometry from x to y without pairs, its inverse, and the report.

    Whitened principal axes are matched by several starts (signs from skewness, sorted similarity profiles), each
    refined by mutual nearest neighbours and Procrustes in growing dimensions; the start with the most mutual
    neighbours wins. Sources: Hoshen & Wolf (2018); Artetxe et al. (2018).
    """
    generator = torch.Generator().manual_seed(random_state)
    x, y = (rows[torch.randperm(len(rows), generator=generator)[:_ROWS]].double() for rows in (x, y))
    probe, rest = x[: max(5, len(x) // 5)], x[max(5, len(x) // 5) :]
    halves = [_fit(rest[part::2], y[part::2], generator) for part in (0, 1)]
    whole = _fit(rest, y, generator, starts=[half.affine for half in halves])
    k = min(k, len(y) - 1)
    found = [nearest(half.affine.map(probe), y, k, metric=metric)[1] for half in halves]
    agreement = float((found[0].unsqueeze(1) == found[1].unsqueeze(2)).any(-1).double().mean())
    chance = k / len(y)
    recall = None
    if check is not None:
        mapped, truth = whole.affine.map(check[0].double()), check[1].double()
        k_check = min(k, len(truth) - 1)
        own = torch.arange(len(truth)).unsqueeze(1)
        recall = float((nearest(mapped, truth, k_check, metric=metric)[1] == own).any(1).double().mean())
        lucky = k_check / len(truth)
    reason = ""
    if not whole.converged:
        reason = f"the matches had not settled after {whole.rounds} rounds"
    elif agreement < max(_LEAST_AGREEMENT, 5 * chance):
        reason = f"maps fitted to two halves agree on {agreement:.3f} of the neighbours (chance {chance:.3f})"
    elif recall is not None and recall < 2 * lucky + 1 / len(check[0]):  # pyright: ignore[reportOptionalSubscript]
        reason = f"recall of the known pairs is {recall:.3f} (chance {lucky:.3f})"
    report = UnpairedReport(
        agreement, chance, whole.mutual_share, whole.converged, whole.rounds, recall, not reason, reason
    )
    return whole.affine, whole.affine.inverse(), report


def _fit(
    x: Float[Tensor, "n d_x"],
    y: Float[Tensor, "m d_y"],
    generator: torch.Generator,
    starts: list[AffineMap] | None = None,
) -> _Fit:
    """The best of several starts, refined; `starts`: maps to begin from instead of the usual ones."""
    means = x.mean(0), y.mean(0)
    axes = min(x.shape[1], y.shape[1], len(x) - 1, len(y) - 1)
    zx, zy = _principal(x, axes), _principal(y, axes)
    pairs = _starts(zx, zy, generator) if starts is None else (_mutual(s.map(x), y) for s in starts)
    best: tuple[float, Tensor, Tensor, bool, int] | None = None
    for left, right in pairs:
        result = _refine(zx, zy, left, right)
        if best is None or result[0] > best[0]:
            best = result
    assert best is not None
    share, left, right, converged, rounds = best
    # The final rotation is fitted in the spaces themselves, where the strong directions count by their variance.
    a, b = x[left], y[right]
    cross = (a - means[0]).mT @ (b - means[1]) / len(a)
    rank = min(axes, len(a))
    affine = procrustes(cross, mean_x=means[0], mean_y=means[1], rank=rank if rank < min(cross.shape) else None)
    return _Fit(affine, share, converged, rounds)


def _principal(rows: Float[Tensor, "n d"], axes: int) -> Float[Tensor, "n p"]:
    """Coordinates along the principal axes, strongest first, to unit variance; signs with positive skewness."""
    moments = Moments(rows.shape[1]).update(rows)
    values, vectors = torch.linalg.eigh(moments.covariance())
    values, vectors = values.flip(0)[:axes], vectors.flip(1)[:, :axes]
    kept = values > 1e-10 * values[0]
    z = (rows - moments.mean) @ vectors[:, kept] / values[kept].sqrt()
    return z * torch.where(z.pow(3).mean(0) < 0, -1.0, 1.0).to(z)


def _mutual(a: Float[Tensor, "n p"], b: Float[Tensor, "m p"]) -> tuple[Tensor, Tensor]:
    """Rows of a and of b that are each other's nearest by cosine."""
    similarity = normalize_rows(a) @ normalize_rows(b).mT
    # Nearness is taken against each row's own neighbourhood, or a few hubs would match everything (CSLS).
    near = min(10, *similarity.shape)
    similarity = 2 * similarity
    similarity = similarity - (similarity.topk(near, 1).values.mean(1, keepdim=True)) / 2
    similarity = similarity - (similarity.topk(near, 0).values.mean(0, keepdim=True)) / 2
    forward, backward = similarity.argmax(1), similarity.argmax(0)
    left = (backward[forward] == torch.arange(len(a), device=a.device)).nonzero()[:, 0]
    return left, forward[left]


def _starts(
    zx: Float[Tensor, "n p"], zy: Float[Tensor, "m p"], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """First matches: by sorted similarity profiles, by skewness of few axes, and by random signs of the same axes."""
    size = min(len(zx), len(zy))
    profiles = []
    for z in (zx, zy):
        rows = normalize_rows(z)
        cosines = (rows @ rows[:size].mT).sort(1).values
        profiles.append(cosines - cosines.mean(0))
    yield _mutual(*profiles)
    width = min(16, zx.shape[1], zy.shape[1])
    for restart in range(_RESTARTS):
        signs = torch.ones(width, dtype=zx.dtype)
        if restart:
            # The axes whose skewness is least certain are the ones to flip.
            certainty = zx[:, :width].pow(3).mean(0).abs() * (len(zx) / 6) ** 0.5
            flips: Bool[Tensor, " w"] = torch.rand(width, generator=generator, dtype=zx.dtype) < 0.5 * torch.exp(
                -certainty / 4
            )
            signs[flips] = -1.0
        yield _mutual(zx[:, :width] * signs, zy[:, :width])


def _refine(
    zx: Float[Tensor, "n p"], zy: Float[Tensor, "m p"], left: Tensor, right: Tensor
) -> tuple[float, Tensor, Tensor, bool, int]:
    """Matches → rotation → matches, in growing numbers of axes, until they settle: share, matches, settled, rounds."""
    most = min(zx.shape[1], zy.shape[1])
    rounds, converged = 0, False
    for width in sorted({min(16, most), min(64, most), min(256, most)}):
        a, b = zx[:, :width], zy[:, :width]
        converged, previous = False, 0.0
        for _ in range(_ROUNDS):
            if len(left) < 2:
                break
            rounds += 1
            rotation = procrustes(a[left].mT @ b[right]).matrix
            before = {*zip(left.tolist(), right.tolist())}
            left, right = _mutual(a @ rotation.mT, b)
            share = len(left) / min(len(a), len(b))
            changed = 1 - len(before & {*zip(left.tolist(), right.tolist())}) / max(1, len(left))
            if changed < _SETTLED or (rounds > 10 and abs(share - previous) < _SETTLED / 5):
                converged = True
                break
            previous = share
    return len(left) / min(len(zx), len(zy)), left, right, converged, rounds
