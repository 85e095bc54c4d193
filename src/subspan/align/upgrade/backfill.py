"""Which items of a gallery to embed anew first, when only part of it can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from subspan.base import check_finite, check_matrix, normalize_rows
from subspan.solvers import nearest
from subspan.statistics import UniformSample, batches, is_one_shot

_METRICS = ("euclidean", "cosine")
_ORDERS = ("density", "farthest")
_QUERIES = 2000
_NEAR = 10


def backfill_order(
    gallery: Any,
    labels: Any = None,
    metric: str = "euclidean",
    *,
    order: str = "density",
    queries: Any = None,
    n_clusters: int | None = None,
    random_state: int = 0,
) -> Int[np.ndarray, " n"]:
    """Rows of a gallery, the one to embed anew first at the front.

    On real embeddings "farthest" was mostly worse than a random order; "density" was mostly better where neighbours
    count, and by label no order beat random.

    Parameters
    ----------
    gallery
        (n, d), what the old items look like in the space that is searched (for a forward map F, the rows F(old)): an
        array, a memory map or a list of batches.
    labels
        Of "farthest": any hashable classes (n,); where None, the nearest of `n_clusters` k-means centres stands for the
        class mean.
    metric
        "euclidean" or "cosine". Equal values keep the gallery's order.
    order
        "density", ours: first the items that lie nearest to the ten nearest of the expected queries. "farthest", as
        published: farthest from the mean of its class first.
    queries
        Of "density": the expected ones (q, d), of which at most 2000 are looked at; where None, rows of the gallery
        stand for them.
    n_clusters
        Of "farthest"; None: sqrt(n / 2).
    random_state
        Seed of the draws and of k-means.

    Returns
    -------
    numpy array, (n,), of row numbers.

    Raises
    ------
    ValueError
        For NaN, an unknown metric or order, labels of another length, and arguments of the other order.

    References
    ----------
    "farthest": Ricci et al. (2025), arXiv 2509.16664, section on partial backfilling.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.align import backfill_order
    >>> rng = np.random.default_rng(0)
    >>> gallery = np.vstack([rng.normal(size=(20, 3)), rng.normal(size=(20, 3)) + 50])
    >>> order = backfill_order(gallery, queries=rng.normal(size=(10, 3)))  # all queries are near the first twenty
    >>> sorted(order[:20].tolist()) == list(range(20))
    True
    """
    if metric not in _METRICS:
        raise ValueError(f"metric: expected one of {_METRICS}, got {metric!r}")
    if order not in _ORDERS:
        raise ValueError(f"order: expected one of {_ORDERS}, got {order!r}")
    for name, value, used in (
        ("labels", labels, "farthest"),
        ("n_clusters", n_clusters, "farthest"),
        ("queries", queries, "density"),
    ):
        if value is not None and order != used:
            raise ValueError(f"{name}: used with order={used!r} alone")
    if is_one_shot(gallery):
        raise ValueError("gallery: a generator can be read only once, and this takes two passes")
    if order == "density":
        distances = _to_queries(gallery, queries, metric, random_state)
        return distances.argsort(stable=True).cpu().numpy()
    means, place = _clusters(gallery, n_clusters, random_state) if labels is None else _classes(gallery, labels)
    distances = []
    start = 0
    for rows in _rows(gallery):
        centers = means[place[start : start + len(rows)]].to(rows)
        start += len(rows)
        if metric == "cosine":
            distances.append(1 - (normalize_rows(rows) * normalize_rows(centers)).sum(-1))
        else:
            distances.append(torch.linalg.vector_norm(rows - centers, dim=-1))
    return torch.cat(distances).argsort(descending=True, stable=True).cpu().numpy()


def _rows(gallery: Any) -> Any:
    return (check_finite(rows, "gallery").double() for rows in batches(gallery))


def _to_queries(gallery: Any, queries: Any, metric: str, random_state: int) -> Float[Tensor, " n"]:
    """Mean distance of each row to the nearest queries."""
    generator = torch.Generator().manual_seed(random_state)
    # A row that stands for a query is not its own neighbour.
    own = torch.empty(0, dtype=torch.int64)
    if queries is None:
        asked, own = _sample(gallery, generator)
    else:
        asked = check_matrix(queries, "queries").double()
        asked = asked[torch.randperm(len(asked), generator=generator)[:_QUERIES].to(asked.device)]
    near = min(_NEAR, len(asked) - 1) if len(own) else min(_NEAR, len(asked))
    distances = []
    start = 0
    for rows in _rows(gallery):
        if rows.shape[1] != asked.shape[1]:
            raise ValueError(f"queries: expected {rows.shape[1]} columns, got {asked.shape[1]}")
        found = nearest(rows, asked, near + bool(len(own)), metric="cosine" if metric == "cosine" else "euclidean")[0]
        found = 1 - found if metric == "cosine" else found.clamp_min(0).sqrt()
        if len(own):
            itself = torch.isin(torch.arange(start, start + len(rows)), own).to(found.device)
            found = torch.where(itself.unsqueeze(1), found[:, 1:], found[:, :-1])
        start += len(rows)
        distances.append(found.mean(1))
    return torch.cat(distances)


def _sample(gallery: Any, generator: torch.Generator) -> tuple[Float[Tensor, "q d"], Int[Tensor, " q"]]:
    """Rows drawn at random in one pass, and their places."""
    sample, start = UniformSample(_QUERIES, generator), 0
    for rows in _rows(gallery):
        sample.update(rows, torch.arange(start, start + len(rows)))
        start += len(rows)
    if start < 2:
        raise ValueError(f"gallery: needs at least 2 rows, got {start}")
    drawn, places = sample.rows()
    return drawn, places


def _classes(gallery: Any, labels: Any) -> tuple[Float[Tensor, "c d"], Int[Tensor, " n"]]:
    """Class means, and the class number of each row."""
    names = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if names.ndim != 1:
        raise ValueError(f"labels: expected one label a row, got shape {names.shape}")
    known, numbers = np.unique(names, return_inverse=True)
    place = torch.from_numpy(numbers.reshape(-1))
    sums, start = None, 0
    for rows in _rows(gallery):
        part = place[start : start + len(rows)].to(rows.device)
        start += len(rows)
        if len(part) < len(rows):
            break
        sums = rows.new_zeros(len(known), rows.shape[1]) if sums is None else sums
        sums.index_add_(0, part, rows)
    if sums is None or start != len(place):
        raise ValueError(f"labels: one for each row of the gallery is needed, got {len(place)}")
    return sums / torch.bincount(place, minlength=len(known)).to(sums).unsqueeze(-1), place.to(sums.device)


def _clusters(
    gallery: Any, n_clusters: int | None, random_state: int
) -> tuple[Float[Tensor, "c d"], Int[Tensor, " n"]]:
    """k-means centres, and the number of the nearest one of each row."""
    rows = torch.cat([rows.float().cpu() for rows in _rows(gallery)]).numpy()
    count = max(1, round((len(rows) / 2) ** 0.5)) if n_clusters is None else n_clusters
    if not 1 <= count <= len(rows):
        raise ValueError(f"n_clusters: must lie in [1, {len(rows)}], got {n_clusters}")
    options: dict[str, Any] = {"batch_size": 4096, "n_init": 3, "random_state": random_state}
    model = MiniBatchKMeans(count, **options).fit(rows)
    return torch.from_numpy(model.cluster_centers_).double(), torch.from_numpy(model.predict(rows)).long()
