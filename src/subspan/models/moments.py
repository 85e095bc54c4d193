"""Moments of what goes into, or comes out of, any layers of a model, in one pass over batches."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn

from subspan.base import save_arrays, saved_object
from subspan.base.modules import evaluation
from subspan.base.saved import Schema, optional
from subspan.statistics import GroupedMoments, Moments

from .capture import Capture, Site, pool_states, select_tokens, split_mask
from .layers import Layers, layer_names
from .layout import Layout, check_layout

_STATES: Schema = {
    "*:count": Float[Tensor, "1"],
    "*:mean": Inexact[Tensor, " _"],
    "*:scatter": optional(Inexact[Tensor, "_ _"]),
    "*:factor": optional(Inexact[Tensor, "_ _"]),
}


class SiteMoments(Mapping[str, Any]):
    """Moments by the name of a site, one object for all sites that see the same tensor; see `collect_moments`.

    `a + b` merges two passes, `all_reduce` those of several processes, `save` and `load` keep them in one file.

    Parameters
    ----------
    site
        "input" or "output": what of the layers.
    moments
        Name of a leader → its `Moments`, or `GroupedMoments`.
    leaders
        Name of a site → name of the first site that sees the same tensor, maybe its own.
    skipped
        Name of a leader → rows left out since they were not finite.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import collect_moments
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> first, second = (collect_moments(model, torch.randn(5, 8, 4), ["0", "1"]) for _ in range(2))
    >>> found = first + second
    >>> list(found), found["0"].count
    (['0', '1'], 80.0)
    """

    def __init__(self, site: Site, moments: dict[str, Any], leaders: dict[str, str], skipped: dict[str, int]) -> None:
        self.site: Site = site
        self.leaders, self.skipped = leaders, skipped
        self._moments = moments

    def __getitem__(self, name: str) -> Any:
        return self._moments[self.leaders[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaders)

    def __len__(self) -> int:
        return len(self.leaders)

    def __repr__(self) -> str:
        size = f"{self.nbytes / 2**20:.0f} MiB"
        return f"SiteMoments({len(self)} {self.site}s, {len(self._moments)} of them different, {size})"

    @property
    def distinct(self) -> dict[str, Any]:
        """The different moments, by the name of their leader."""
        return self._moments

    @property
    def nbytes(self) -> int:
        """Bytes that the moments hold: 8 d² a site (a group of it) in double precision, less for few rows."""
        parts = [m for each in self._moments.values() for m in getattr(each, "by_group", {"": each}).values()]
        return sum(value.nbytes for part in parts for value in part.state().values())

    def __add__(self, other: SiteMoments) -> SiteMoments:
        """Of the rows of both; sites that only one has are its own."""
        if not isinstance(other, SiteMoments):
            return NotImplemented
        if other.site != self.site:
            raise ValueError(f"other: has moments of {other.site}s, expected {self.site}s")
        moments: dict[str, Any] = {}
        leaders: dict[str, str] = {}
        by_pair: dict[tuple[str | None, str | None], str] = {}
        for name in dict.fromkeys([*self, *other]):
            # Sites stay together where they are in both.
            pair = (self.leaders.get(name), other.leaders.get(name))
            leaders[name] = by_pair.setdefault(pair, name)
            if leaders[name] == name:
                mine, theirs = (side.get(name) for side in (self, other))
                moments[name] = theirs if mine is None else mine if theirs is None else mine + theirs
        skipped = {
            name: sum(side.skipped.get(side.leaders[name], 0) for side in (self, other) if name in side)
            for name in moments
        }
        return SiteMoments(self.site, moments, leaders, skipped)

    def all_reduce(self, group: Any = None) -> SiteMoments:
        """Merge over the processes of a torch.distributed group, in place; all must have the same sites shared."""
        for name in self._moments:
            self._moments[name].all_reduce(group)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all. Raises ValueError for moments by group."""
        grouped = [name for name, each in self._moments.items() if isinstance(each, GroupedMoments)]
        if grouped:
            raise ValueError(f"save: {grouped[0]!r} has moments by group; save `pooled()` or each group's own")
        arrays = {f"{name}:{part}": value for name, m in self._moments.items() for part, value in m.state().items()}
        facts = {"site": self.site, "leaders": self.leaders, "skipped": self.skipped}
        save_arrays(path, "site moments", arrays, **facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SiteMoments:
        """Read a file written by `save`. Raises ValueError where it is not one."""
        facts = {"site": Literal["input", "output"], "leaders": dict[str, str], "skipped": dict[str, int]}
        with saved_object(path, "site moments", _STATES, facts) as (arrays, found):
            states: dict[str, dict[str, Tensor]] = {}
            for key, value in arrays.items():
                name, _, part = key.rpartition(":")
                states.setdefault(name, {})[part] = value
            if set(found["leaders"].values()) != set(states) or not set(states) <= set(found["leaders"]):
                raise ValueError("its moments are not those of its leaders")
            moments = {name: Moments.from_state(state) for name, state in states.items()}
            return cls(found["site"], moments, found["leaders"], found["skipped"])


def collect_moments(
    model: nn.Module,
    batches: Iterable[Any],
    sites: Layers,
    *,
    site: Site = "input",
    item: int = 0,
    pool: Literal["rows", "sum", "mean", "last", "first"] = "rows",
    mask: str | Callable[[Any], Tensor] | None = "attention_mask",
    drop_tokens: int = 0,
    labels: Callable[[Any], Sequence[Hashable] | Tensor] | None = None,
    not_finite: Literal["error", "skip"] = "error",
    share: bool = True,
    layout: Layout = "auto",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> SiteMoments:
    """Moments of the inputs (or outputs) of layers over all batches: one pass, nothing kept but the moments.

    Rows are taken in the hook of each layer, so that no more than one layer's states are held. Layers that see the same
    tensor (queries, keys and values; gate and up projections) share one `Moments`, which is updated once.

    Parameters
    ----------
    model
        Any torch module; runs without gradients, in evaluation mode, up to the last site.
    batches
        What the model takes, as in `iterate_representations`; read once.
    sites
        Layers as in `layer_names`, such as `linear_names(model)`.
    site, item, mask, drop_tokens, layout, forward
        As in `iterate_representations`; masked tokens are left out.
    pool
        "rows": every selected token or position is a row; else a row a sample.
    labels
        Function of a batch → labels (b,), or tensor (b, t) of a label a token: `GroupedMoments` a site.
    not_finite
        Rows with NaN or infinity: ValueError, or left out and counted (half precision overflows in some models).
    share
        Whether layers that see the same tensor share their moments.
    dtype, device
        Of the moments; device None: where the states are.

    Returns
    -------
    SiteMoments, a mapping from the names of the sites.

    Raises
    ------
    ValueError
        Where there are no batches, a site is not reached, or labels do not fit.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import collect_moments
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> found = collect_moments(model, torch.randn(5, 8, 4), ["0", "2"])
    >>> found["0"].count, found["2"].d
    (40.0, 3)
    """
    if pool not in ("rows", "sum", "mean", "last", "first"):
        raise ValueError(f"pool: one of rows, sum, mean, last, first, got {pool!r}")
    if not_finite not in ("error", "skip"):
        raise ValueError(f"not_finite: 'error' or 'skip', got {not_finite!r}")
    check_layout(layout)
    collector = _Collector(
        model, layer_names(model, sites), SiteMoments(site, {}, {}, {}), item, pool, mask, drop_tokens, labels,
        not_finite, share, layout, dtype, device, forward,
    )  # fmt: skip
    for batch in batches:
        collector.run(batch)
    found = collector.found
    if not found:
        raise ValueError("batches: at least one is needed")
    return SiteMoments(site, found.distinct, {name: found.leaders[name] for name in collector.names}, found.skipped)


@dataclass
class _Collector:
    """One call of `collect_moments`, batch by batch."""

    model: nn.Module
    names: list[str]
    found: SiteMoments
    item: int
    pool: Any
    mask: str | Callable[[Any], Tensor] | None
    drop_tokens: int
    labels: Callable[[Any], Sequence[Hashable] | Tensor] | None
    not_finite: str
    share: bool
    layout: Layout
    dtype: torch.dtype
    device: torch.device | str | None
    forward: Callable[[nn.Module, Any], object] | None

    def run(self, batch: Any) -> None:
        inputs, mask = split_mask(batch, self.mask)
        labels = None if self.labels is None else self.labels(batch)
        seen: dict[Any, tuple[Any, str]] = {}
        hooks: dict[str, Callable[[Tensor], Tensor]] = {}
        captured = Capture(self.model, self.names, site=self.found.site, item=self.item, transform=hooks)

        def take(name: str, states: Tensor) -> Tensor:
            if self._leads(name, _first_with(states, name, seen) if self.share else name):
                if mask is not None and states.ndim == 2 and len(states) == mask.numel() != captured.samples:
                    states = states.unflatten(0, mask.shape)  # the model has put all tokens into one axis
                tokens, selected = captured.tokens(name, states, mask, self.layout)
                self._add(name, *self._rows(tokens, selected, labels))
            return states.new_empty(0)

        hooks |= {name: partial(take, name) for name in self.names}
        with torch.no_grad(), evaluation(self.model), captured:
            captured.run(inputs, forward=self.forward)

    def _leads(self, name: str, first: str) -> bool:
        """Whether a site has moments of its own; `first`: the first one that sees the same tensor in this pass."""
        leader = self.found.leaders.setdefault(name, first)
        if leader not in (name, first):
            raise ValueError(
                f"sites: {name!r} and {leader!r} saw the same tensor at first and do not in a later batch; "
                "give share=False"
            )
        return leader == name

    def _rows(
        self, states: Tensor, mask: Tensor | None, labels: Sequence[Hashable] | Tensor | None
    ) -> tuple[Tensor, list[Hashable] | None]:
        """Rows and, where there are labels, one of each."""
        rows = pool_states(states, mask, pool=self.pool, drop_tokens=self.drop_tokens, layout=self.layout)
        if labels is None:
            return rows, None
        index = labels if isinstance(labels, Tensor) else torch.arange(len(labels))
        if self.pool == "rows" and states.ndim == 3:
            chosen = select_tokens(states, mask, self.drop_tokens).cpu()
            owner = index.cpu().reshape(len(index), -1)
            if len(owner) != len(chosen) or owner.shape[1] not in (1, chosen.shape[1]):
                raise ValueError(
                    f"labels: {tuple(chosen.shape)[:1]} or {tuple(chosen.shape)} are needed, got {tuple(index.shape)}"
                )
            index = owner.expand_as(chosen)[chosen]
        elif self.pool == "rows" and states.ndim > 3:
            index = index.repeat_interleave(len(rows) // max(len(states), 1))
        names = index.tolist()
        return rows, names if isinstance(labels, Tensor) else [labels[i] for i in names]

    def _add(self, name: str, rows: Tensor, labels: list[Hashable] | None) -> None:
        if self.not_finite == "skip":
            kept = torch.isfinite(rows).all(-1)
            left_out = int((~kept).sum())
            self.found.skipped[name] = self.found.skipped.get(name, 0) + left_out
            if left_out:
                rows = rows[kept]
                labels = labels and [label for label, keep in zip(labels, kept.tolist()) if keep]
        if name not in self.found.distinct:
            kind = Moments if labels is None else GroupedMoments
            device = rows.device if self.device is None else self.device
            self.found.distinct[name] = kind(rows.shape[-1], dtype=self.dtype, device=device)
        try:
            self.found.distinct[name].update(rows, *([] if labels is None else [labels]))
        except ValueError as error:
            raise ValueError(f"sites: {name!r}: {error}") from error


def _first_with(states: Tensor, name: str, seen: dict[Any, tuple[Any, str]]) -> str:
    """The first site of this pass that saw the very same tensor: alive still, in the same memory, not changed since."""
    version = 0 if states.is_inference() else states._version
    key = (states.data_ptr(), states.shape, states.stride(), states.dtype, version)
    if key not in seen or seen[key][0]() is None:
        seen[key] = (weakref.ref(states), name)
    return seen[key][1]
