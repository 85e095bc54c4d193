"""Funnel search: a shortlist by a short prefix, re-ranked by longer ones (Kusupati et al., 2022)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import like, require, save_arrays, saved_object
from subspan.base.estimators import Estimator
from subspan.base.parameters import Count
from subspan.base.saved import Schema
from subspan.geometry import blocks_between, halving_sizes, prefix_sizes, prefix_squared_norms

# What is stored in half precision stays so.
_DTYPES = (np.float64, np.float32, np.float16)
_BLOCK = 1 << 24
_ROWS = 8192
_SAVED: Schema = {
    "dims": list[int] | None,
    "shortlist": int,
    "schedule": str | list[tuple[int, int]],
    "metric": str,
    "backend": str,
    "factory": str,
}


@dataclass(eq=False, repr=False)
class MatryoshkaIndex(Estimator):
    """Nearest neighbours among rows X (n, d) by growing prefixes and shrinking lists; one database serves all sizes.

    Inner products grow by the new block of coordinates only, so a candidate costs what its longest prefix costs. X may
    be a memory map, which stays on disk; only the shortlist's prefix is copied.

    Parameters
    ----------
    dims
        Sizes; None: d, d/2, … down to 8.
    shortlist
        Length of the first list of "funnel" and "two-step".
    schedule
        [(size, list length), …], the first from the whole database, each next re-ranking the list before it; "funnel",
        over `dims` with `shortlist` halved at every size; "two-step", a shortlist by the smallest of `dims`, re-ranked
        by the largest. The last list is as long as what is asked for.
    metric
        "cosine" (every prefix normalised on its own) or "euclidean".
    backend
        "exact", or "faiss" (extra: index) for the shortlist.
    factory
        Of the faiss index, such as "Flat" or "HNSW32".

    Attributes
    ----------
    schedule_
        The stages.
    cost_per_query_
        Multiply-adds a query (after `kneighbors` for approximate shortlists, whose cost is counted).
    exact_cost_
        Those of one search by the last size.

    References
    ----------
    Kusupati et al. (2022), arXiv 2205.13147.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.represent import MatryoshkaIndex
    >>> x = np.random.default_rng(0).normal(size=(500, 32))
    >>> index = MatryoshkaIndex([8, 32], shortlist=50, schedule="two-step").fit(x)
    >>> distances, found = index.kneighbors(x[:3], k=1)
    >>> found[:, 0].tolist(), index.cost_per_query_ < index.exact_cost_
    ([0, 1, 2], True)
    """

    dims: Sequence[Count] | None = None
    shortlist: Count = 200
    schedule: Literal["funnel", "two-step"] | Sequence[Any] = "funnel"
    metric: Literal["cosine", "euclidean"] = "cosine"
    backend: Literal["exact", "faiss"] = "exact"
    factory: str = "HNSW32"

    def fit(self, X: Any, y: Any = None) -> MatryoshkaIndex:
        """Index the rows X (n, d). Raises ValueError for NaN, sizes beyond d, or lists that grow along the schedule.

        Lists longer than the database are cut to it, with a warning.
        """
        self._check_parameters()
        rows = self._rows(X, reset=True, min_rows=1, dtype=_DTYPES)
        stages = self._stages(rows.shape[1])
        if stages[0][1] > len(rows):
            warnings.warn(
                f"shortlist: {stages[0][1]} is longer than the database of {len(rows)} rows and is cut to it",
                stacklevel=2,
            )
        self.schedule_ = [(size, min(length, len(rows))) for size, length in stages]
        self._sizes = tuple(size for size, _ in self.schedule_)
        self.database_ = rows
        first = self._sizes[0]
        head = torch.empty(len(rows), first, dtype=torch.float32, device=rows.device)
        norms = torch.empty(len(rows), len(self._sizes), device=rows.device)
        for start in range(0, len(rows), _ROWS):
            block = rows[start : start + _ROWS].float()
            squares = prefix_squared_norms(block, self._sizes)
            norms[start : start + _ROWS] = squares
            part = block[:, :first]
            if self.metric == "cosine":
                part = part * _inverse(squares[:, :1])
            head[start : start + _ROWS] = part
        self._head, self._squares = head, norms
        self._index = self._faiss_index(head) if self.backend == "faiss" else None
        rerank = sum(
            (self._sizes[level + 1] - self._sizes[level]) * self.schedule_[level][1]
            for level in range(len(self._sizes) - 1)
        )
        self._rerank_cost = rerank
        self.exact_cost_ = float(self._sizes[-1] * len(rows))
        approximate = self._index is not None and self.factory != "Flat"
        self.cost_per_query_ = float("nan") if approximate else float(first * len(rows) + rerank)
        return self

    def _stages(self, d: int) -> list[tuple[int, int]]:
        if isinstance(self.schedule, str):
            sizes = halving_sizes(d) if self.dims is None else prefix_sizes(list(self.dims), d)
            if self.schedule == "two-step":
                sizes = (sizes[0], sizes[-1]) if len(sizes) > 1 else sizes
            return [(size, max(1, self.shortlist >> level)) for level, size in enumerate(sizes)]
        stages = [(int(size), int(length)) for size, length in self.schedule]
        if not stages:
            raise ValueError("schedule: at least one (size, list length) is needed")
        sizes = prefix_sizes([size for size, _ in stages], d, name="schedule")
        lengths = [length for _, length in stages]
        if list(sizes) != [size for size, _ in stages] or lengths != sorted(lengths, reverse=True) or lengths[-1] < 1:
            raise ValueError(f"schedule: sizes must grow and list lengths shrink, got {stages}")
        return stages

    def _faiss_index(self, head: Float[Tensor, "n m"]) -> Any:
        faiss: Any = require("faiss", extra="index")
        # On unit rows the order by inner product is that by distance.
        index = faiss.index_factory(head.shape[1], self.factory, faiss.METRIC_L2)
        rows = np.ascontiguousarray(head.cpu().numpy())
        if not index.is_trained:
            index.train(rows)
        index.add(rows)
        return index

    # ------------------------------------------------------------------ search

    def kneighbors(self, X: Any, k: int = 10) -> tuple[Any, Any]:
        """Distances and row numbers (q, k) of the k nearest rows found for queries X (q, d), nearest first.

        Distances are 1 - cosine, or Euclidean for "euclidean", by the last size. Raises ValueError where a list of the
        schedule is shorter than k (lists of "funnel" and "two-step" behind the shortlist grow to k by themselves).
        """
        check_is_fitted(self, "schedule_")
        queries = self._rows(X, dtype=_DTYPES)
        lengths = self._lengths(k)
        counted = 0
        values, indices = [], []
        # Room for the scores of the whole database, and for the vectors of every list.
        blocks = blocks_between(self._sizes)
        widest = max(length * (block.stop - block.start) for length, block in zip([lengths[0], *lengths], blocks))
        step = max(1, min(_ROWS, _BLOCK // max(len(self.database_), widest)))
        for start in range(0, len(queries), step):
            block = queries[start : start + step].to(self._head.device, torch.float32)
            score, found, visited = self._search(block, lengths)
            counted += visited
            values.append(score)
            indices.append(found)
        if self._index is not None and self.factory != "Flat":
            self.cost_per_query_ = counted * self._sizes[0] / len(queries) + self._rerank_cost
        score, found = torch.cat(values), torch.cat(indices)
        distance = 1 - score if self.metric == "cosine" else (-score).clamp_min(0).sqrt()
        return like(distance, X), like(found, X)

    def _lengths(self, k: int) -> list[int]:
        if isinstance(k, bool) or not 1 <= k <= len(self.database_):
            raise ValueError(f"k: must lie in [1, {len(self.database_)}], got {k}")
        lengths = [length for _, length in self.schedule_]
        growing = isinstance(self.schedule, str)
        if lengths[0] < k or (not growing and min(lengths) < k):
            raise ValueError(f"shortlist: lists of {lengths} are shorter than k = {k}")
        lengths = [max(length, k) for length in lengths]
        return [*lengths[:-1], k]

    def _search(self, queries: Float[Tensor, "q d"], lengths: list[int]) -> tuple[Tensor, Tensor, int]:
        squares = prefix_squared_norms(queries, self._sizes)
        blocks = blocks_between(self._sizes)
        head = queries[:, blocks[0]]
        visited = 0
        if self._index is None:
            products = head @ self._head.mT
            score = products if self.metric == "cosine" else 2 * products - self._squares[:, 0]
            found = score.topk(lengths[0], dim=1).indices
        else:
            found, visited = self._faiss_search(head, squares[:, :1], lengths[0])
        rows = self._stored(found, blocks[0])
        products = torch.einsum("qm,qkm->qk", head, rows)
        score = self._score(products, squares, found, 0)
        for level, block in enumerate(blocks[1:], start=1):
            # The list of the stage before, best first; a shorter list keeps its head.
            found, products = _best(score, lengths[level - 1], found, products)
            products = products + torch.einsum("qm,qkm->qk", queries[:, block], self._stored(found, block))
            score = self._score(products, squares, found, level)
        order = score.argsort(dim=1, descending=True, stable=True)[:, : lengths[-1]]
        return score.gather(1, order), found.gather(1, order), visited

    def _stored(self, found: Int[Tensor, "q k"], block: slice) -> Float[Tensor, "q k m"]:
        return self.database_[:, block][found].float()

    def _score(self, products: Tensor, squares: Tensor, found: Tensor, level: int) -> Tensor:
        theirs = self._squares[:, level][found]
        ours = squares[:, level : level + 1]
        if self.metric == "cosine":
            return products * _inverse(ours) * _inverse(theirs)
        return 2 * products - ours - theirs

    def _faiss_search(self, head: Tensor, squares: Tensor, length: int) -> tuple[Tensor, int]:
        faiss: Any = require("faiss", extra="index")
        query = head * _inverse(squares) if self.metric == "cosine" else head
        statistics = faiss.cvar.hnsw_stats
        statistics.reset()
        index: Any = self._index
        if hasattr(index, "hnsw"):
            # A search list shorter than what is asked for returns places without a row.
            index.hnsw.efSearch = max(index.hnsw.efSearch, length)
        found = index.search(np.ascontiguousarray(query.cpu().numpy()), length)[1]
        if (found < 0).any():
            raise ValueError(f"factory: the index {self.factory!r} found fewer than {length} rows for a query")
        return torch.as_tensor(found, device=head.device), int(statistics.ndis)

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the database and the schedule to a safetensors file, whole or not at all."""
        check_is_fitted(self, "schedule_")
        save_arrays(path, "matryoshka-index", {"database": self.database_}, **self.get_params())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MatryoshkaIndex:
        """Read a file written by `save` and index it anew. Raises ValueError when it is not one."""
        with saved_object(path, "matryoshka-index", {"database": Float[Tensor, "n d"]}, _SAVED) as (arrays, facts):
            return cls(**facts).fit(arrays["database"])


def _inverse(squares: Tensor) -> Tensor:
    """1 / length, and 0 where a prefix is zero."""
    return torch.rsqrt(squares).nan_to_num(posinf=0)


def _best(score: Tensor, length: int, *columns: Tensor) -> tuple[Tensor, ...]:
    if length >= score.shape[1]:
        return columns
    kept = score.topk(length, dim=1).indices
    return tuple(column.gather(1, kept) for column in columns)
