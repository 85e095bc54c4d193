"""Everything a report says, as plain numbers: one function a section, each returning a JSON-able dict."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspan.base import Progress, normalize_rows, silent
from subspan.datasets import Rows
from subspan.detect import SubspaceDetector, counted_votes
from subspan.geometry import (
    MarchenkoPastur,
    Subspace,
    effective_rank,
    expected_overlap,
    explained_ratio,
    participation_ratio,
    power_law_exponent,
    principal_angles,
    rank_rule,
    subspace_overlap,
)
from subspan.select import rank_rows
from subspan.select.baselines import NEAR_DUPLICATE, k_center, k_medoids, random_rows
from subspan.solvers import nearest
from subspan.statistics import GroupedMoments

from .comparison import comparison_facts, paired
from .origin import origin
from .recall import NEIGHBOURS, RESAMPLES, mean_interval, others, recall_curve, sizes_up_to
from .survey import Measured, Survey, measure, survey

KEPT = (0.9, 0.95, 0.99)
_CLASSES_SHOWN = 24
_CLASS_DIM = 8
_CANDIDATES = 5000
_RANDOM_DRAWS = 5
_EXAMPLES = 9
_RULES = ("marchenko-pastur", "gavish-donoho", "effective", "elbow")


def describe(
    data: Rows,
    other: Rows | None = None,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """All facts of a report as one JSON-able dict: a section each, None where the data has nothing for it.

    other: a second embedding of the same rows. Takes two passes over the rows, O(d^2) memory beside a sample of them,
    and samples of rows for all that asks for neighbours. Raises ValueError for NaN, constant rows and unpaired rows.
    """
    started = time.perf_counter()
    pair = None if other is None else paired(data, other)
    stages = ["reading", "measuring", "shortening", "subset"]
    stages += ["labels"] * (data.labels is not None) + ["against"] * (pair is not None)

    def stage(name: str) -> Progress:
        return lambda message, fraction: progress(message, (stages.index(name) + fraction) / len(stages))

    seen = survey(data, seed=seed, progress=stage("reading"))
    measured = measure(data, seen, progress=stage("measuring"))
    facts = {
        "data": {"name": data.name, "source": data.origin},
        "contents": contents_facts(data, seen, seed=seed),
        "spectrum": spectrum_facts(data, measured, seed=seed),
        "shortening": shortening_facts(data, seen, seed=seed, progress=stage("shortening")),
        "outliers": outlier_facts(data),
        "subset": subset_facts(data, seen, measured, seed=seed, progress=stage("subset")),
        "labels": None if data.labels is None else label_facts(data, seen, seed=seed, progress=stage("labels")),
        "against": None if pair is None else comparison_facts(*pair, seed=seed, progress=stage("against")),
    }
    return {
        **facts,
        **origin(started, seed, "torch", "numpy"),
    }


# ---------------------------------------------------------------------- contents


def contents_facts(data: Rows, seen: Survey, *, seed: int) -> dict[str, Any]:
    """What is there: size, repeated and empty rows, norms, anisotropy, and how near the nearest neighbours are."""
    n, d = data.shape
    copies = seen.first_copy != np.arange(n)
    groups = np.bincount(seen.first_copy, minlength=n)
    unit_mean_square = float(seen.unit_mean.square().sum())
    with_direction = n - int(seen.zero.sum())
    # |sum of unit rows|^2 counts every ordered pair and, with cosine one, every row with itself.
    mean_cosine = ((n * n * unit_mean_square) - with_direction) / (with_direction * (with_direction - 1))
    second_moment = float(np.mean(seen.norms**2))
    similarity, neighbour = others(seen.base, seen.queries, "inner", k=1)
    similarity, neighbour = similarity[:, 0].numpy(), neighbour[:, 0].numpy()
    rows, partners = seen.base_index[seen.queries], seen.base_index[neighbour]
    same = seen.first_copy[rows] == seen.first_copy[partners]
    near = (similarity >= NEAR_DUPLICATE) & ~same
    pairs = []
    for position in np.argsort(-np.where(near, similarity, -np.inf), kind="stable")[: int(near.sum())]:
        pair = sorted((int(rows[position]), int(partners[position])))
        if pair not in [entry["rows"] for entry in pairs]:
            pairs.append({"rows": pair, "cosine": float(similarity[position])})
    # Neighbours in the order of the file are often of one kind, so the partners are drawn.
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(~seen.zero[seen.base_index]))[: len(seen.queries)]
    random_pairs = seen.base[seen.queries] * seen.base[drawn]
    return {
        "rows": n,
        "columns": d,
        "dtype": data.stored_dtype,
        "megabytes": n * d * data.values.dtype.itemsize / 1e6,
        "rows_with_nan_left_out": data.dropped,
        "zero_rows": int(seen.zero.sum()),
        "duplicate_rows": int(copies.sum()),
        "largest_duplicate_group": {"count": int(groups.max()), "row": int(groups.argmax())} if copies.any() else None,
        "near_duplicates": {
            "cosine_at_least": NEAR_DUPLICATE,
            "share_of_sampled_rows": float(near.mean()),
            "share_with_exact_copy": float(same.mean()),
            "sampled_rows": len(near),
            "pairs": pairs[:6],
        },
        "norms": _quantiles(seen.norms),
        "norm_histogram": _histogram(seen.norms),
        "unit_norm": bool(np.all(np.abs(seen.norms[~seen.zero] - 1) < 1e-3)),
        "mean_cosine": float(mean_cosine),
        "mean_share_of_energy": float(seen.moments.mean.square().sum()) / second_moment,
        "cosine_to_nearest": _quantiles(similarity),
        "cosine_histograms": _shared_histograms(
            {"nearest neighbour": similarity, "random pair": random_pairs.sum(1).numpy()}
        ),
    }


# ---------------------------------------------------------------------- spectrum


def spectrum_facts(data: Rows, measured: Measured, *, seed: int) -> dict[str, Any]:
    """Variances along the principal directions, the edge of pure noise, and the rank by each rule."""
    n, d = data.shape
    assert measured.directions.spectrum is not None
    spectrum = measured.directions.spectrum[: min(n - 1, d)]
    values = spectrum.numpy()
    rule = MarchenkoPastur()
    visible = int((values > values[0] * 1e-12).sum())
    return {
        "variances": values.tolist(),
        "explained": explained_ratio(spectrum).tolist(),
        "noise_variance": rule.noise(values, n, d),
        "noise_edge": rule.edge(values, n, d),
        "effective_rank": {
            "value": float(effective_rank(spectrum)),
            "interval": effective_rank_interval(measured.block_energy, seed),
            "level": 0.95,
            "method": f"multinomial bootstrap over {len(measured.block_energy)} blocks of rows, directions held fixed",
        },
        "participation_ratio": float(participation_ratio(spectrum)),
        "power_law_exponent": float(power_law_exponent(spectrum, last=visible)) if visible > 2 else None,
        "ranks": {
            **{f"{share:.0%} of the variance": rank_rule(share)(values, n, d) for share in KEPT},
            **{name: rank_rule(name)(values, n, d) for name in _RULES},
        },
    }


def effective_rank_interval(
    block_energy: Float[np.ndarray, "b d"], seed: int, resamples: int = RESAMPLES
) -> list[float]:
    """95 % interval of the effective rank when blocks of rows are drawn again with replacement.

    To first order the eigenvalues of a reweighted covariance are its variances along the fixed directions, so a
    resample costs b d instead of an eigendecomposition.
    """
    count = len(block_energy)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    ranks = effective_rank(torch.from_numpy(weights @ block_energy)).numpy()
    return np.quantile(ranks, (0.025, 0.975)).tolist()


# ---------------------------------------------------------------------- shortening


def shortening_facts(data: Rows, seen: Survey, *, seed: int, progress: Progress) -> dict[str, Any]:
    """Recall@10 of the neighbours by cosine after PCA and after keeping the first columns, against dimensions."""
    d, base = data.dim, seen.base
    # Directions of the uncentred second moment keep inner products, and so cosines, best.
    basis = seen.moments.subspace(1.0, center=False).basis.to(base.dtype)
    ways = {"pca": lambda size: base @ basis[:, :size], "prefix": lambda size: base[:, :size]}
    sizes = [size for size in sizes_up_to(min(d, len(data) - 1)) if size < d]
    curves = recall_curve(base, ways, sizes, seen.queries, metric="inner", unit=True, seed=seed, progress=progress)
    for curve in curves.values():
        curve.append({"dims": d, "recall": 1.0, "interval": [1.0, 1.0]})
    return {
        "metric": "cosine",
        "k": NEIGHBOURS,
        "queries": len(seen.queries),
        "searched_rows": len(base),
        "curves": curves,
        "smallest": {
            name: {
                f"{share:.0%}": next((point["dims"] for point in curve if point["recall"] >= share), d)
                for share in KEPT
            }
            for name, curve in curves.items()
        },
        "bytes_per_row": {"full": d * data.values.dtype.itemsize, "itemsize": data.values.dtype.itemsize},
    }


# ---------------------------------------------------------------------- outliers


def outlier_facts(data: Rows) -> dict[str, Any]:
    """The rows that `subspan detect` scores highest, and how many it calls outliers."""
    detector = SubspaceDetector(contamination="fence").fit(data.array())
    scores = np.concatenate([detector.anomaly_score(block) for _, block in data.blocks()])
    fence = -detector.offset_
    order = np.argsort(-scores, kind="stable")[:_EXAMPLES]
    return {
        "rank": detector.subspace_.dim,
        "explained": float(detector.subspace_.explained_ratio),
        "scores": _quantiles(scores),
        "histogram": _histogram(scores, tail=0.999),
        "fence": float(fence),
        "beyond_fence": int((scores > fence).sum()),
        "examples": [{"row": int(row), "score": float(scores[row])} for row in order],
    }


# ---------------------------------------------------------------------- representative subset


def subset_facts(data: Rows, seen: Survey, measured: Measured, *, seed: int, progress: Progress) -> dict[str, Any]:
    """A few rows chosen in several ways, what they cover, and the way that leaves half of the rows nearest to one."""
    size = int(np.clip(len(data) // 50, 10, 100))
    rng = np.random.default_rng(seed)
    # The first two read every candidate for every row they choose.
    candidates = np.sort(rng.choice(len(seen.base), min(len(seen.base), _CANDIDATES), replace=False))
    pool, place = seen.base[candidates], seen.base_index[candidates]
    picks = {
        "medoids": [place[k_medoids(pool, size, random_state=seed)]],
        "farthest": [place[k_center(pool, size, random_state=seed)]],
        "leverage": [rank_rows(measured.leverage)[:size]],
        "random": [random_rows(len(data), size, random_state=seed + draw) for draw in range(_RANDOM_DRAWS)],
    }
    methods = {}
    for step, (name, draws) in enumerate(picks.items()):
        methods[name] = _coverage(data, seen, measured.main, draws)
        progress("representative rows", (step + 1) / len(picks))
    best = min(methods, key=lambda name: methods[name]["distance_to_nearest"]["median"])
    chosen = np.sort(picks[best][0])
    nearest_pick = _nearest_picks(data, seen, chosen)[1]
    stands_for = np.bincount(nearest_pick.numpy(), minlength=size)
    return {
        "size": size,
        "rank": measured.rank,
        "methods": methods,
        "best": best,
        "selected": chosen.tolist(),
        "examples": [
            {"row": int(chosen[i]), "stands_for": int(stands_for[i])}
            for i in np.argsort(-stands_for, kind="stable")[:_EXAMPLES]
        ],
        "searched_rows": len(seen.base),
    }


def _nearest_picks(data: Rows, seen: Survey, index: Int[np.ndarray, " k"]) -> tuple[Tensor, Tensor]:
    """Cosine of each sampled row with the nearest of the rows `index`, and the position of that one."""
    picked = normalize_rows(torch.from_numpy(data.take(index)).to(seen.base.dtype))
    similarity, found = nearest(seen.base, picked, 1, metric="inner")
    return similarity[:, 0], found[:, 0]


def _coverage(data: Rows, seen: Survey, main: Subspace, draws: list[Int[np.ndarray, " k"]]) -> dict[str, Any]:
    """Mean over the draws of: energy of the main directions kept, cosine distance to the nearest pick, labels met."""
    retained, met, distances = [], [], []
    for index in draws:
        retained.append(_retained_energy(torch.from_numpy(data.take(index)).double(), main))
        distances.append((1 - _nearest_picks(data, seen, index)[0]).clamp_min(0).numpy())
        if data.labels is not None:
            met.append(len(np.unique(data.labels[index])) / len(np.unique(data.labels)))
    apart = np.concatenate(distances)
    return {
        "energy_retained": float(np.mean(retained)),
        "distance_to_nearest": _quantiles(apart),
        "distance_curve": np.quantile(apart, np.linspace(0, 1, 101)).tolist(),
        "labels_met": float(np.mean(met)) if met else None,
    }


def _retained_energy(rows: Float[Tensor, "m d"], main: Subspace) -> float:
    """Share of the energy in the main directions that the rows' own leading directions span (`select.retention`)."""
    assert main.center is not None
    assert main.variances is not None
    own = Subspace.fit(rows - main.center, rank=1.0, center=False)
    cosines = main.basis.mT @ own.truncate(min(own.dim, main.dim)).basis
    return float((main.variances.unsqueeze(1) * cosines.square()).sum() / main.variances.sum())


# ---------------------------------------------------------------------- labels


def label_facts(data: Rows, seen: Survey, *, seed: int, progress: Progress) -> dict[str, Any]:
    """Class subspaces and the principal angles between them, and how often neighbours share a label."""
    assert data.labels is not None
    names, counts = np.unique(data.labels, return_counts=True)
    if len(names) < 2:
        raise ValueError(
            f"labels: {data.label_name} has one value only ({names[0]!r}), so there are no classes to compare"
        )
    order = np.argsort(-counts, kind="stable")
    large = [str(names[i]) for i in order if counts[i] > 2][:_CLASSES_SHOWN]
    facts: dict[str, Any] = {
        "name": data.label_name,
        "classes": len(names),
        "largest": [{"label": str(names[i]), "rows": int(counts[i])} for i in order[:_CLASSES_SHOWN]],
        **_neighbour_purity(data, seen, dict(zip(names.tolist(), counts.tolist())), seed),
    }
    grouped = GroupedMoments(data.dim)
    for start, block in data.blocks():
        labels = data.labels[start : start + len(block)]
        kept = np.isin(labels, large)
        grouped.update(torch.from_numpy(block[kept]), labels[kept])
        progress("labels", (start + len(block)) / len(data))
    pooled = grouped.pooled()
    total, between = pooled.total_variance, float(grouped.between().diagonal().sum())
    facts["variance_between_classes"] = between / total
    varied = [name for name in large if grouped.by_group[name].total_variance > 1e-12 * total]
    if len(varied) < 2:
        return {**facts, "subspaces": None}
    dim = max(1, min(_CLASS_DIM, data.dim // 4, *(int(grouped.by_group[name].count - 1) for name in varied)))
    subspaces = {name: grouped.by_group[name].subspace(dim) for name in varied}
    basis = torch.stack([subspaces[name].basis for name in varied])
    count = len(varied)
    angles = torch.rad2deg(principal_angles(*_every_pair(basis))).reshape(count, count, -1)
    overlap = subspace_overlap(*_every_pair(basis)).reshape(count, count)
    upper = np.triu_indices(count, 1)
    nearest_pairs = np.argsort(-overlap.numpy()[upper], kind="stable")[:8]
    facts["subspaces"] = {
        "labels": varied,
        "dim": dim,
        "mean_angle": angles.mean(-1).tolist(),
        "smallest_angle": angles[..., 0].tolist(),
        "overlap": overlap.tolist(),
        "overlap_of_random_subspaces": expected_overlap(dim, dim, data.dim),
        "most_alike": [
            {
                "labels": [varied[upper[0][i]], varied[upper[1][i]]],
                "overlap": float(overlap[upper[0][i], upper[1][i]]),
                "smallest_angle": float(angles[upper[0][i], upper[1][i], 0]),
            }
            for i in nearest_pairs
        ],
    }
    return facts


def _every_pair(basis: Float[Tensor, "c d k"]) -> tuple[Float[Tensor, "cc d k"], Float[Tensor, "cc d k"]]:
    count = len(basis)
    return basis.repeat_interleave(count, 0), basis.repeat(count, 1, 1)


def _neighbour_purity(data: Rows, seen: Survey, counts: dict[Any, int], seed: int) -> dict[str, Any]:
    assert data.labels is not None
    labels = data.labels[seen.base_index]
    found = others(seen.base, seen.queries, "inner")[1].numpy()
    asked = seen.base_index[seen.queries]
    votes = counted_votes(labels[found], data.labels[asked])
    suspects = np.flatnonzero(votes.suspect)
    share = votes.own
    chance = float(sum((count / len(data)) ** 2 for count in counts.values()))
    return {
        "neighbours_with_same_label": {
            "k": int(found.shape[1]),
            "share": float(share.mean()),
            "interval": mean_interval(share, seed),
            "chance": chance,
        },
        "suspects": [
            {
                "row": int(asked[position]),
                "label": str(data.labels[asked[position]]),
                "neighbours_say": str(votes.suggested[position]),
                "votes": round(votes.share[position] * found.shape[1]),
            }
            for position in suspects[np.argsort(-votes.share[suspects], kind="stable")][:_EXAMPLES]
        ],
        "suspects_found": len(suspects),
        "rows_asked": len(share),
    }


# ---------------------------------------------------------------------- numbers


def _quantiles(values: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Smallest, quartiles, 95th and 99th percentile, largest."""
    names = {"min": 0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1}
    return {name: float(np.quantile(values, q)) for name, q in names.items()}


def _histogram(values: Float[np.ndarray, " n"], tail: float = 1.0) -> dict[str, Any]:
    """Counts in equal bins from the smallest value to the `tail` quantile, where the rest is counted in the last."""
    bins = int(np.clip(2 * len(values) ** 0.5, 8, 48))
    top = float(np.quantile(values, tail))
    counts, edges = np.histogram(np.minimum(values, top), bins=bins)
    return {"counts": counts.tolist(), "edges": edges.tolist(), "last_bin_open": tail < 1}


def _shared_histograms(samples: dict[str, Float[np.ndarray, " n"]]) -> dict[str, Any]:
    """Shares of several samples in common bins."""
    every = np.concatenate(list(samples.values()))
    bins = int(np.clip(len(every) ** 0.5, 12, 60))
    edges = np.histogram_bin_edges(every, bins=bins)
    shares = {name: np.histogram(values, edges)[0] / len(values) for name, values in samples.items()}
    return {"edges": edges.tolist(), "shares": {name: values.tolist() for name, values in shares.items()}}
