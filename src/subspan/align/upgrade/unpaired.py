"""Two embedding spaces aligned from their distributions alone, and an honest account of whether that worked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import quadratic_assignment
from sklearn.cluster import KMeans
from torch import Tensor

from subspan.base import normalize_rows
from subspan.geometry import AffineMap, procrustes
from subspan.measures import recall_at_k
from subspan.solvers import nearest, transport_plan
from subspan.statistics import Moments

_ROWS = 4000
_STARTS = 4
_CLUSTERS = 50
_CLUSTERINGS = 24
_ASSIGNMENTS = 15
_WIDTHS = (32, 64, 128)
_TEMPERATURES = (0.05, 0.03, 0.02)
_TRANSPORTS = 8
_BATCH = 1000
_WIDEST = 256
_ROUNDS = 20
_SETTLED = 0.02
_LEAST_AGREEMENT = 0.5
_LEAST_RECALL = 0.5


@dataclass(frozen=True)
class UnpairedReport:
    """Whether alignment without pairs worked.

    Attributes
    ----------
    agreement
        How often the two best maps, found from independent starts, send held-out rows to the same k neighbours.
    chance
        The same for different rows.
    mutual_share
        Rows that are each other's nearest after the map.
    converged, rounds
        Whether the matches settled, and rounds of matching.
    recall
        Of the known pairs that were given to check, else None.
    succeeded, reason
        The verdict: by the recall where it is known, else by the agreement: right maps of few rows may be doubted.
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
    distance: float
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

    Both spaces are clustered several times, each time the centroids are matched by quadratic assignment of their
    similarities, and the matched centroids of all times are pseudo-pairs for a first rotation (mini-vec2vec: Dar,
    2025). Entropic transport between the rows and Procrustes refine it in growing dimensions (Grave et al., 2019), and
    mutual nearest neighbours finish it (Artetxe et al., 2018).
    """
    for name, rows in (("X", x), ("Y", y)):
        if not float(rows.var(0).sum()) > 0:
            raise ValueError(f"{name}: the rows are constant; there is nothing to align")
    generator = torch.Generator().manual_seed(random_state)
    x, y = (rows[torch.randperm(len(rows), generator=generator)[:_ROWS]].double() for rows in (x, y))
    probe, rest = x[: max(5, len(x) // 5)], x[max(5, len(x) // 5) :]
    clouds = _Cloud.of(rest), _Cloud.of(y)
    rng = np.random.default_rng(random_state)
    # The first is the one that brings rows which it has not seen nearest to the other cloud.
    fits = sorted((_fit(*clouds, probe, rng) for _ in range(_STARTS)), key=lambda fit: fit.distance)
    whole = fits[0]
    k = min(k, len(y) - 1)
    found = [nearest(fit.affine.map(probe), y, k, metric=metric)[1] for fit in fits[:2]]
    agreement = float(recall_at_k(*found).mean())
    # Where all rows lie in a few places, maps agree whatever they do.
    chance = max(k / len(y), float(recall_at_k(found[0], found[1].roll(1, 0)).mean()))
    recall, lucky = None, 0.0
    if check is not None:
        mapped, truth = whole.affine.map(check[0].double()), check[1].double()
        k_check = min(k, len(truth) - 1)
        own = torch.arange(len(truth)).unsqueeze(1)
        recall = float(recall_at_k(nearest(mapped, truth, k_check, metric=metric)[1], own).mean())
        lucky = k_check / len(truth)
    reason = ""
    if recall is not None:
        # Known pairs measure what agreement can only suggest.
        if recall < max(_LEAST_RECALL, 5 * lucky):
            reason = f"recall of the known pairs is {recall:.3f} (chance {lucky:.3f})"
    elif not whole.converged:
        reason = f"the matches had not settled after {whole.rounds} rounds"
    elif agreement < max(_LEAST_AGREEMENT, 5 * chance):
        reason = f"the two best maps agree on {agreement:.3f} of the neighbours (chance {chance:.3f})"
    report = UnpairedReport(
        agreement, chance, whole.mutual_share, whole.converged, whole.rounds, recall, not reason, reason
    )
    return whole.affine, whole.affine.inverse(), report


@dataclass(frozen=True)
class _Cloud:
    """Rows, and their coordinates along the principal axes that they span, the strongest first."""

    rows: Float[Tensor, "n d"]
    mean: Float[Tensor, " d"]
    coordinates: Float[Tensor, "n p"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> _Cloud:
        moments = Moments(rows.shape[1]).update(rows)
        values, vectors = torch.linalg.eigh(moments.covariance())
        axes = vectors.flip(1)[:, values.flip(0) > 1e-10 * values[-1]]
        return cls(rows, moments.mean, ((rows - moments.mean) @ axes).float())

    def along(self, width: int) -> Float[Tensor, "n w"]:
        """Leading coordinates, of unit length."""
        return normalize_rows(self.coordinates[:, :width])


def _fit(x: _Cloud, y: _Cloud, probe: Float[Tensor, "p d_x"], rng: np.random.Generator) -> _Fit:
    """One start, refined, and how far the mapped probe lies from y."""
    most = min(x.coordinates.shape[1], y.coordinates.shape[1])
    widths = sorted({min(width, most) for width in _WIDTHS})
    rotation = _matched_clusters(x.along(widths[0]), y.along(widths[0]), rng)
    for width in widths:
        rotation = _transported(x.along(width), y.along(width), rotation, rng)
    wide = min(_WIDEST, most)
    left, right, converged, rounds = _mutual_rounds(x.along(wide), y.along(wide), rotation)
    # The final rotation is fitted in the spaces themselves, where the strong directions count by their variance.
    cross = (x.rows[left] - x.mean).mT @ (y.rows[right] - y.mean) / len(left)
    rank = min(most, len(left))
    affine = procrustes(cross, mean_x=x.mean, mean_y=y.mean, rank=rank if rank < min(cross.shape) else None)
    near = normalize_rows(affine.map(probe) - y.mean) @ normalize_rows(y.rows - y.mean).mT
    share = len(left) / min(len(x.rows), len(y.rows))
    return _Fit(affine, 1 - float(near.amax(1).mean()), share, converged, rounds)


def _matched_clusters(
    a: Float[Tensor, "n p"], b: Float[Tensor, "m p"], rng: np.random.Generator
) -> Float[Tensor, "p p"]:
    """Rotation of k-means centroids of a to those of b, matched by their similarities, over several clusterings."""
    count = max(2, min(_CLUSTERS, *(len(rows.unique(dim=0)) // 10 for rows in (a, b))))
    cross = torch.zeros(a.shape[1], b.shape[1])
    for _ in range(_CLUSTERINGS):
        centroids, similarities = [], []
        for rows in (a, b):
            options: dict[str, Any] = {"n_init": 1, "max_iter": 50, "random_state": int(rng.integers(2**31))}
            model = KMeans(count, **options).fit(rows.numpy())
            found = normalize_rows(torch.from_numpy(model.cluster_centers_))
            centroids.append(found)
            similarities.append(_standardized((found @ found.mT).double().numpy()))
        search = {"maximize": True, "P0": "randomized", "rng": rng}
        tried = [quadratic_assignment(*similarities, options=search) for _ in range(_ASSIGNMENTS)]
        order = max(tried, key=lambda result: result.fun).col_ind
        cross += centroids[0].mT @ centroids[1][order]
    return procrustes(cross).matrix


def _standardized(similarity: np.ndarray) -> np.ndarray:
    """Similarities to the others in units of their spread.

    Each one's similarity to itself is the same under every assignment, but makes the relaxed problem convex, whose
    maxima are corners near where the search begins; without it the best assignment is found in a few tries.
    """
    others = similarity[~np.eye(len(similarity), dtype=bool)]
    standard = (similarity - others.mean()) / max(others.std(), 1e-12)
    np.fill_diagonal(standard, 0.0)
    return standard


def _transported(
    a: Float[Tensor, "n p"], b: Float[Tensor, "m p"], rotation: Float[Tensor, "r r"], rng: np.random.Generator
) -> Float[Tensor, "p p"]:
    """Rotation refined by entropic transport between batches of rows, at falling temperatures."""
    width = a.shape[1]
    grown = torch.zeros(width, width)
    grown[: len(rotation), : len(rotation)] = rotation
    for temperature in _TEMPERATURES:
        for _ in range(_TRANSPORTS):
            some_a, some_b = (
                rows[torch.from_numpy(rng.choice(len(rows), min(_BATCH, len(rows)), replace=False))] for rows in (a, b)
            )
            plan = transport_plan(some_a @ grown.mT @ some_b.mT, temperature)
            grown = procrustes(some_a.mT @ plan @ some_b).matrix
    return grown


def _mutual_rounds(
    a: Float[Tensor, "n p"], b: Float[Tensor, "m p"], rotation: Float[Tensor, "r r"]
) -> tuple[Tensor, Tensor, bool, int]:
    """Mutual nearest neighbours → rotation → mutual nearest neighbours, until they settle."""
    grown = torch.zeros(a.shape[1], a.shape[1])
    grown[: len(rotation), : len(rotation)] = rotation
    left, right = _mutual(a @ grown.mT, b)
    for done in range(1, _ROUNDS + 1):
        before = left * len(b) + right
        left, right = _mutual(a @ procrustes(a[left].mT @ b[right]).matrix.mT, b)
        kept = int(torch.isin(left * len(b) + right, before).sum())
        if kept >= (1 - _SETTLED) * len(left):
            return left, right, True, done
    return left, right, False, _ROUNDS


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
