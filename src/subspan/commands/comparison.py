"""Two embeddings of the same rows: how alike they are, and whether a map between them replaces embedding again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspan.align import SpaceMap
from subspan.base import Progress, normalize_rows
from subspan.datasets import Rows
from subspan.geometry import AffineMap, LowRankMap, oas_shrinkage
from subspan.measures import recall_at_k
from subspan.solvers import nearest
from subspan.statistics import JointMoments

from .recall import fitted_width, mean_interval, others, sample, summary
from .switching import verdict_of_maps

RECALL_AT = (1, 10)
SHARED = 0.5
_QUERIES = 1000
_MOST_SHRINKAGE = 0.99
_BASE_ROWS = 50_000


def paired(data: Rows, other: Rows) -> tuple[Rows, Rows]:
    """The two in one order of rows: matched by ids where both have them, else by position.

    Rows that were left out of one of them for NaN or infinity are left out of both. Raises ValueError when the rows of
    the two are not the same otherwise.
    """
    if data.numbered or other.numbered:
        if data.dropped or other.dropped:
            data, other = (part if part.dropped else part.subset(np.arange(len(part))) for part in (data, other))
            return paired(data, other)
        if len(other) != len(data):
            raise ValueError(
                f"{other.name} has {len(other)} rows, {data.name} has {len(data)}; the two must embed the same rows in "
                "the same order (or both have an id column)"
            )
        return data, other
    place = {str(name): row for row, name in enumerate(other.ids)}
    if len(place) != len(other):
        raise ValueError(f"{other.name}: the ids are not unique")
    wanted = [str(name) for name in data.ids]
    common = [name for name in wanted if name in place]
    if len(wanted) - len(common) > other.dropped or len(other) - len(common) > data.dropped:
        missing = [name for name in wanted if name not in place]
        example = f"; {missing[0]!r} is missing in {other.name}" if missing else ""
        raise ValueError(
            f"{other.name} has {len(other)} rows, {data.name} {len(data)}, with {len(common)} ids in common{example}"
        )
    if len(common) < len(wanted):
        data = data.subset(np.flatnonzero([name in place for name in wanted]))
    order = np.array([place[name] for name in common])
    if not np.array_equal(order, np.arange(len(other))):
        other = replace(other.subset(order), ids=data.ids, labels=None, texts=data.texts, images=data.images)
    return data, other


def comparison_facts(data: Rows, other: Rows, *, seed: int, progress: Progress) -> dict[str, Any]:
    """Likeness, shared dimensions and maps, fitted on one half of the rows and judged on the other half."""
    train, held_out = _halves(len(data), seed)
    joint = JointMoments(data.dim, other.dim)
    for batch, partners in zip(_shown(data, train, progress), other.batches(train), strict=True):
        joint.update(batch, partners)
    # Few wide rows: the maps stay in two factors each, for a whole one may be larger than memory.
    fitted = joint.row_spaces() or joint
    canonical = fitted.cca(shrinkage=_shrinkage(joint))
    source, target = (torch.from_numpy(rows.take(held_out)) for rows in (data, other))
    correlations = _held_out_correlations(canonical.transform_x(source), canonical.transform_y(target))
    shared = int((correlations > SHARED).sum())
    maps: dict[str, AffineMap | LowRankMap] = {"Procrustes": fitted.procrustes(), "affine (ridge)": fitted.ridge()}
    if shared:
        maps["CCA-projected"] = fitted.through_canonical(canonical.truncate(shared))
    retrieval, in_common = _retrievals(source, target, maps, seed, progress)
    return {
        "source": data.name,
        "target": other.name,
        "target_argument": other.argument,
        "target_columns": other.dim,
        "rows_left_out": bool(data.dropped or other.dropped),
        "rows_fitted": int(train.sum()),
        "rows_held_out": len(held_out),
        "queries": min(_QUERIES, len(held_out)),
        "cka": joint.cka(),
        "cka_by_chance": joint.chance_cka(),
        "cka_debiased": _debiased(joint),
        "canonical_correlations": correlations.tolist(),
        "shared_dimensions": {"count": shared, "of": min(data.dim, other.dim), "correlation_above": SHARED},
        "retrieval": retrieval,
        "neighbours_in_common": in_common,
        "verdict": verdict_of_maps(retrieval),
    }


def fit_map(data: Rows, other: Rows, method: Any, *, seed: int, progress: Progress) -> tuple[SpaceMap, dict[str, Any]]:
    """The map fitted on all rows, and what a map fitted on one half of them does for the other half.

    Raises ValueError for fewer than 4 rows, of which no half can be fitted to.
    """
    if len(data) < 4:
        raise ValueError(f"{data.name}: {len(data)} rows; a map needs at least 4, half to fit to and half to judge by")
    train, held_out = _halves(len(data), seed)
    half = SpaceMap(method).fit(_shown(data, train, progress), other.batches(train))
    source, target = (torch.from_numpy(rows.take(held_out)) for rows in (data, other))
    retrieval, _ = _retrievals(source, target, {method: half.map_}, seed, progress)
    whole = SpaceMap(method).fit(data.batches(), other.batches())
    joint = half.moments_
    alike = {"cka": joint.cka(), "cka_by_chance": joint.chance_cka(), "cka_debiased": _debiased(joint)}
    return whole, {"rows_fitted": int(train.sum()), "rows_held_out": len(held_out), **alike, "held_out": retrieval}


def _debiased(joint: JointMoments) -> float | None:
    """CKA without what chance adds, or None where the rows are too few for that."""
    try:
        return joint.cka(debiased=True)
    except ValueError:
        return None


def _halves(n: int, seed: int) -> tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """A mask of the half to fit to, and (at most _BASE_ROWS) rows of the other."""
    train = np.zeros(n, dtype=bool)
    train[np.random.default_rng(seed).permutation(n)[: n // 2]] = True
    return train, sample(np.flatnonzero(~train), _BASE_ROWS, seed)


def _shown(data: Rows, chosen: Bool[np.ndarray, " n"], progress: Progress) -> Iterator[Float[Tensor, "m d"]]:
    done = 0
    for batch in data.batches(chosen):
        yield batch
        done += len(batch)
        progress("comparing the two", done / int(chosen.sum()))


def _retrievals(
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "n e"],
    maps: Mapping[str, AffineMap | LowRankMap],
    seed: int,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cross-retrieval without a map and with each, and the share of neighbours that the two have in common anyway."""
    queries = sample(np.arange(len(source)), _QUERIES, seed)
    truth = others(target, queries)[1]
    ways: dict[str, Callable[[], Tensor]] = {"no map": lambda: fitted_width(source, target.shape[1])}
    ways |= {name: (lambda fitted=fitted: fitted.map(source)) for name, fitted in maps.items()}
    retrieval = {}
    for step, (name, mapped) in enumerate(ways.items()):
        retrieval[name] = _retrieval(mapped(), target, queries, truth, seed)
        progress("cross-retrieval", (step + 1) / len(ways))
    both = recall_at_k(others(source, queries)[1], truth).numpy()
    chance = truth.shape[1] / (len(source) - 1)
    return retrieval, {"share": float(both.mean()), "interval": mean_interval(both, seed), "chance": chance}


def _shrinkage(joint: JointMoments) -> float:
    """The smaller of the two sides' shrinkage weights: rows that are white already would be shrunk to nothing."""
    spaces = joint.row_spaces()
    inner = spaces.moments if spaces else joint
    sides = ((inner.cov_xx, joint.d_x), (inner.cov_yy, joint.d_y))
    weights = (oas_shrinkage(covariance, joint.count, d) for covariance, d in sides)
    return min(_MOST_SHRINKAGE, *weights)


def _held_out_correlations(x: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """Correlation of each pair of canonical variables on rows that they were not fitted to."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    scale = torch.linalg.vector_norm(x, dim=0) * torch.linalg.vector_norm(y, dim=0)
    return ((x * y).sum(0) / scale.clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1)


def _retrieval(
    mapped: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    queries: Int[np.ndarray, " q"],
    truth: Int[Tensor, "q k"],
    seed: int,
) -> dict[str, Any]:
    """Queries of the new encoder in the mapped old index: is the row itself found, and are its true neighbours?"""
    mapped = normalize_rows(mapped.to(target.dtype))
    chosen = torch.from_numpy(queries)
    found = nearest(normalize_rows(target[chosen]), mapped, min(max(RECALL_AT), len(mapped)), metric="inner")[1]
    facts: dict[str, Any] = {}
    for k in RECALL_AT:
        hit = (found[:, :k] == chosen.unsqueeze(1)).any(1).double().numpy()
        facts[f"recall@{k}"] = summary(hit, seed)
    kept = recall_at_k(others(mapped, queries, asked=target)[1], truth).numpy()
    facts["neighbours_kept"] = {"share": float(kept.mean()), "interval": mean_interval(kept, seed)}
    return facts
