"""Two embedding spaces aligned from their distributions alone, and an honest account of whether that worked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry.arrays import normalize_rows
from ..geometry.maps import AffineMap, procrustes
from ..solvers import nearest
from ..statistics import Moments

_ROWS = 4000
_ROUNDS = 40
_STARTS = 16
_FINALISTS = 2
_SIGNED_AXES = 8
_START_ROWS = 400
_SETTLED = 0.005
_LEAST_AGREEMENT = 0.25
_LEAST_RECALL = 0.5


@dataclass(frozen=True)
class UnpairedReport:
    """Whether alignment without pairs worked.

    agreement: two maps, fitted to disjoint halves, send held-out rows to the same k neighbours this often; chance: what
    unrelated maps would reach. Where known pairs are given their recall decides, else the agreement, which is cautious:
    a right map of all rows is doubted where one of the halves was too small to find it. mutual_share: rows that are
    each other's nearest after the map. recall: of the known pairs that were given to check, else None. converged: the
    matches settled.
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

    Principal axes, half whitened, are matched by several starts (the best signs of the leading eight axes, sorted
    similarity profiles), each refined by mutual nearest neighbours and Procrustes in growing dimensions; the start
    whose clouds lie nearest to each other wins. Sources: Hoshen & Wolf (2018); Artetxe et al. (2018).
    """
    for name, rows in (("X", x), ("Y", y)):
        if not float(rows.var(0).sum()) > 0:
            raise ValueError(f"{name}: the rows are constant; there is nothing to align")
    generator = torch.Generator().manual_seed(random_state)
    x, y = (rows[torch.randperm(len(rows), generator=generator)[:_ROWS]].double() for rows in (x, y))
    probe, rest = x[: max(5, len(x) // 5)], x[max(5, len(x) // 5) :]
    halves = [_fit(rest[part::2], y[part::2]) for part in (0, 1)]
    whole = _fit(rest, y, starts=[half.affine for half in halves])
    k = min(k, len(y) - 1)
    found = [nearest(half.affine.map(probe), y, k, metric=metric)[1] for half in halves]
    agreement = float((found[0].unsqueeze(1) == found[1].unsqueeze(2)).any(-1).double().mean())
    chance = k / len(y)
    recall, lucky = None, 0.0
    if check is not None:
        mapped, truth = whole.affine.map(check[0].double()), check[1].double()
        k_check = min(k, len(truth) - 1)
        own = torch.arange(len(truth)).unsqueeze(1)
        recall = float((nearest(mapped, truth, k_check, metric=metric)[1] == own).any(1).double().mean())
        lucky = k_check / len(truth)
    reason = ""
    if recall is not None:
        # Known pairs measure what agreement can only suggest.
        if recall < max(_LEAST_RECALL, 5 * lucky):
            reason = f"recall of the known pairs is {recall:.3f} (chance {lucky:.3f})"
    elif not whole.converged:
        reason = f"the matches had not settled after {whole.rounds} rounds"
    elif agreement < max(_LEAST_AGREEMENT, 5 * chance):
        reason = f"maps fitted to two halves agree on {agreement:.3f} of the neighbours (chance {chance:.3f})"
    report = UnpairedReport(
        agreement, chance, whole.mutual_share, whole.converged, whole.rounds, recall, not reason, reason
    )
    return whole.affine, whole.affine.inverse(), report


def _fit(
    x: Float[Tensor, "n d_x"],
    y: Float[Tensor, "m d_y"],
    starts: list[AffineMap] | None = None,
) -> _Fit:
    """The best of several starts, refined; `starts`: maps to begin from instead of the usual ones."""
    means = x.mean(0), y.mean(0)
    axes = min(x.shape[1], y.shape[1], len(x) - 1, len(y) - 1)
    zx, zy = _principal(x, axes), _principal(y, axes)
    pairs = _starts(zx, zy) if starts is None else (_mutual(s.map(x), y) for s in starts)
    most = min(zx.shape[1], zy.shape[1])
    first = [_refine(zx, zy, left, right, [min(_SIGNED_AXES, most), min(24, most)], 15) for left, right in pairs]
    first.sort(key=lambda result: result[0])
    wide = sorted({min(24, most), min(64, most), min(256, most)})
    finished = [_refine(zx, zy, left, right, wide, _ROUNDS) for _, left, right, _, _ in first[:_FINALISTS]]
    _, left, right, converged, rounds = min(finished, key=lambda result: result[0])
    share = len(left) / min(len(x), len(y))
    # The final rotation is fitted in the spaces themselves, where the strong directions count by their variance.
    a, b = x[left], y[right]
    cross = (a - means[0]).mT @ (b - means[1]) / len(a)
    rank = min(axes, len(a))
    affine = procrustes(cross, mean_x=means[0], mean_y=means[1], rank=rank if rank < min(cross.shape) else None)
    return _Fit(affine, share, converged, rounds)


def _principal(rows: Float[Tensor, "n d"], axes: int) -> Float[Tensor, "n p"]:
    """Coordinates along the principal axes, strongest first, divided by the root of the standard deviation.

    Half whitening keeps the order of the axes and still lets two spectra of different decay meet.
    """
    moments = Moments(rows.shape[1]).update(rows)
    values, vectors = torch.linalg.eigh(moments.covariance())
    values, vectors = values.flip(0)[:axes], vectors.flip(1)[:, :axes]
    kept = values > 1e-10 * values[0]
    values = values[kept] / values[kept].sum()
    return (rows - moments.mean) @ vectors[:, kept] / moments.total_variance**0.5 / values.pow(0.25)


def _distance(a: Float[Tensor, "n p"], b: Float[Tensor, "m p"]) -> float:
    """Mean distance to the nearest point of the other cloud, both ways."""
    between = torch.cdist(a, b)
    return float(between.amin(0).mean() + between.amin(1).mean())


def _mutual(a: Float[Tensor, "n p"], b: Float[Tensor, "m p"]) -> tuple[Tensor, Tensor]:
    """Rows of a and of b that are each other's nearest by cosine."""
    cosine = normalize_rows(a) @ normalize_rows(b).mT
    # Nearness is taken against each row's own neighbourhood, or a few hubs would match everything (CSLS).
    near = min(10, *cosine.shape)
    rows, columns = cosine.topk(near, 1).values.mean(1, keepdim=True), cosine.topk(near, 0).values.mean(0, keepdim=True)
    similarity = 2 * cosine - rows - columns
    forward, backward = similarity.argmax(1), similarity.argmax(0)
    left = (backward[forward] == torch.arange(len(a), device=a.device)).nonzero()[:, 0]
    return left, forward[left]


def _starts(zx: Float[Tensor, "n p"], zy: Float[Tensor, "m p"]) -> Iterator[tuple[Tensor, Tensor]]:
    """First matches: by sorted similarity profiles, and by the signs of leading axes that bring the clouds nearest."""
    size = min(len(zx), len(zy))
    profiles = []
    for z in (zx, zy):
        cosines = (normalize_rows(z) @ normalize_rows(z[:size]).mT).sort(1).values
        profiles.append(cosines - cosines.mean(0))
    yield _mutual(*profiles)
    width = min(_SIGNED_AXES, zx.shape[1], zy.shape[1])
    a, b = zx[:, :width], zy[:, :width]
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=zx.dtype)] * width).reshape(-1, width)
    distances = torch.tensor([_distance(a[:_START_ROWS] * sign, b[:_START_ROWS]) for sign in signs])
    for sign in signs[distances.argsort()[:_STARTS]]:
        yield _mutual(a * sign, b)


def _refine(
    zx: Float[Tensor, "n p"], zy: Float[Tensor, "m p"], left: Tensor, right: Tensor, widths: list[int], most_rounds: int
) -> tuple[float, Tensor, Tensor, bool, int]:
    """Matches → rotation → matches on more and more axes, until they settle: distance, matches, settled, rounds."""
    rounds, converged, distance = 0, False, float("inf")
    for width in widths:
        a, b = zx[:, :width], zy[:, :width]
        converged, previous, rotation = False, 0.0, torch.eye(width, dtype=zx.dtype)
        for _ in range(most_rounds):
            if len(left) < 2:
                break
            rounds += 1
            rotation = procrustes(a[left].mT @ b[right]).matrix
            before = left * len(b) + right
            left, right = _mutual(a @ rotation.mT, b)
            share = len(left) / min(len(a), len(b))
            kept = int(torch.isin(left * len(b) + right, before).sum())
            if kept >= (1 - _SETTLED) * len(left) or (rounds > 10 and abs(share - previous) < _SETTLED / 5):
                converged = True
                break
            previous = share
        distance = _distance(a @ rotation.mT, b)
    return distance, left, right, converged, rounds
