"""Which items of a gallery to embed anew first, when only part of it can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from ..geometry.arrays import check_finite, normalize_rows
from ..statistics import batches, is_one_shot

_METRICS = ("euclidean", "cosine")


def backfill_order(
    gallery: Any,
    labels: Any = None,
    metric: str = "euclidean",
    *,
    n_clusters: int | None = None,
    random_state: int = 0,
) -> Int[np.ndarray, " n"]:
    """Rows of a gallery (n, d), the one to embed anew first at the front: farthest from the mean of its class first.

    gallery: what the old items look like in the space that is searched (for a forward map F, the rows F(old)); an
    array, a memory map or a list of batches. labels (n,): any hashable classes; where None, the nearest of
    `n_clusters` k-means centres (by default sqrt(n / 2)) stands for the class mean, which is ours. metric:
    "euclidean", or "cosine" (1 - cosine to the class mean). Equal distances keep the order of the gallery.
    Raises ValueError for NaN, an unknown metric, or labels of another length.
    Source: Ricci et al. (2025), arXiv 2509.16664, section on partial backfilling.
    """
    if metric not in _METRICS:
        raise ValueError(f"metric: expected one of {_METRICS}, got {metric!r}")
    if is_one_shot(gallery):
        raise ValueError("gallery: a generator can be read only once, and the means need a pass of their own")
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
    model = MiniBatchKMeans(count, batch_size=4096, n_init=3, random_state=random_state).fit(rows)
    return torch.from_numpy(model.cluster_centers_).double(), torch.from_numpy(model.predict(rows)).long()
