"""CoSpaDi: the linear layers of a model as dictionaries and sparse codes, learnt on what goes into them."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Inexact, Int32
from torch import Tensor, nn

from subspan.base import Progress, save_arrays, saved_object, silent
from subspan.base.parameters import Bounds, Count, NonNegative, check_parameters
from subspan.base.saved import optional
from subspan.models import (
    LowRankLinear,
    SiteMoments,
    SparseDictLinear,
    Surgery,
    collect_moments,
    layer_names,
    linear_names,
    linear_weight,
    replace,
)
from subspan.models.layers import Layers, is_conv1d

from .budgets import VALUE_BITS, allocate
from .factorising import (
    Factorisation,
    Solver,
    dense_weight,
    error_curve,
    factorise,
    weighted_error,
    whitener_of,
)

_STEPS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
_KINDS: dict[str, Any] = {"dictionary": SparseDictLinear, "low rank": LowRankLinear}
_PARTS = {
    **{part: optional(Inexact[Tensor, "_ _"]) for part in ("weight", "up", "down", "dictionary", "values")},
    "indices": optional(Int32[Tensor, "_ _"]),
}


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Parameters
    ----------
    name
        Of the layer.
    solver
        "dense" where it stayed as it was.
    d_out, d_in
        Of its weight.
    rank
        Atoms, or the rank.
    nonzero
        Atoms that each output reads.
    bits, dense_bits
        After and before; of a dictionary that several layers share, a layer has its share.
    error
        |X (W - V)'| / |X W'| on the calibration inputs.
    seconds
        Of the solver.
    shift
        What was added to the second moment of its inputs.
    skipped
        Calibration rows that were not finite.

    Examples
    --------
    >>> from subspan.weights import LayerReport
    >>> LayerReport("fc", "svd", 4, 4, 1, None, 128, 256, 0.1, 0.0).ratio
    0.5
    """

    name: str
    solver: str
    d_out: int
    d_in: int
    rank: int
    nonzero: int | None
    bits: int
    dense_bits: int
    error: float
    seconds: float
    shift: float = 0.0
    skipped: int = 0

    @property
    def ratio(self) -> float:
        """Share of the bits that is saved."""
        return 1 - self.bits / self.dense_bits


@dataclass(eq=False, repr=False)
class CoSpaDi:
    """Compress the linear layers of a model to dictionaries with sparse codes, without training it.

    Parameters
    ----------
    ratio
        Share of the bits of the layers to save, in (0, 1), of 16 a number, mask and rounding counted.
    solver, density, max_iter, tolerance, random_state
        As of `factorise`.
    allocation
        "uniform": every layer saves this share. "errors": layers that lose more get more bits, so that the sum of
        the shares of energy that layers lose, as `error_curve` measures them, is least; all together save the ratio.
    group_size
        Layers of one kind (names alike but for numbers) that follow one another and share a dictionary.
    layers
        Which, as in `layer_names`; None: all linear layers inside the model's blocks, so no embedding and no head.
    exclude
        Regular expression of names that stay as they are.
    passes
        Passes over the batches; with more, the moments of only a part of the layers are in memory at a time.

    Attributes
    ----------
    report_ : list of LayerReport
        A layer each.
    layers_ : dict
        Name → factored layer.
    left_out_ : dict
        Name → why a layer was not compressed.

    Raises
    ------
    ValueError
        Where no layer is left, batches do not reach one, or the ratio leaves nothing of one.

    References
    ----------
    CoSpaDi (arXiv 2509.22075); COMPOT (arXiv 2602.15200).

    Examples
    --------
    >>> import torch
    >>> from subspan.weights import CoSpaDi
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.ReLU(), torch.nn.Linear(48, 24))
    >>> small = CoSpaDi(ratio=0.3).fit(model, [torch.randn(200, 24)])
    >>> [layer.name for layer in small.report_], small.saved() >= 0.3
    (['0', '2'], True)
    >>> surgery = small.apply_(model)
    >>> type(model[0]).__name__, type(surgery.undo()[0]).__name__
    ('SparseDictLinear', 'Linear')
    """

    # `fit` checks the values: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    ratio: Annotated[float, Bounds(above=0, below=1)] = 0.2
    solver: Solver = "procrustes"
    allocation: Literal["uniform", "errors"] = "uniform"
    density: Annotated[float, Bounds(least=1)] = 2.0
    group_size: Count = 1
    max_iter: Count | None = None
    tolerance: NonNegative = 1e-3
    layers: Any = None
    exclude: str | None = None
    passes: Count = 1
    random_state: int = 0
    report_: list[LayerReport] = field(default_factory=list, init=False)
    layers_: dict[str, nn.Module] = field(default_factory=dict, init=False)
    left_out_: dict[str, str] = field(default_factory=dict, init=False)

    def fit(
        self,
        model: nn.Module,
        batches: Iterable[Any] | SiteMoments | None = None,
        *,
        keep: str | os.PathLike[str] | None = None,
        progress: Progress = silent,
        **collecting: Any,
    ) -> CoSpaDi:
        """Factor every layer; the model is not changed.

        Parameters
        ----------
        model
            Any torch module.
        batches
            What it takes, a few hundred sequences; gone through once a pass. Or what `collect_moments` has found in
            the inputs of the layers. None: without data, which is far worse.
        keep
            Folder in which each finished layer is kept, so that a killed run of the same settings goes on.
        progress
            Is told each layer.
        **collecting
            Options of `collect_moments`, such as mask or forward.
        """
        check_parameters(self)
        if self.allocation == "errors" and self.solver in ("2:4", "round"):
            raise ValueError(f"allocation: 'errors' is for dictionaries and 'svd', not for {self.solver!r}")
        self.report_, self.layers_, self.left_out_ = [], {}, {}
        groups = self._groups(model, self._names(model))
        size = -(-len(groups) // self.passes)
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        if len(parts) > 1 and isinstance(batches, Iterator):
            raise ValueError("batches: an iterator can be read once; give a list for several passes")
        found: dict[int, Any] = {}

        def moments(number: int) -> Any:
            if batches is None or isinstance(batches, SiteMoments):
                return batches
            if number not in found:
                progress("reading the inputs of the layers", 0.0)
                names = [name for group in parts[number] for name in group]
                found.clear()
                found[number] = collect_moments(model, batches, names, not_finite="skip", **collecting)
            return found[number]

        ratios = self._allocated(model, parts, moments, progress)
        done, total = 0, len(groups)
        for number, part in enumerate(parts):
            known = moments(number)
            files = [
                None if keep is None else Path(keep) / f"{done + place:05}.safetensors" for place in range(len(part))
            ]
            solve = partial(self._solved, model, known)
            with _side_by_side(solve, part, [ratios[group[0]] for group in part], files) as solved:
                for group, (became, seconds) in zip(part, solved):
                    self._record(model, group, known, became, seconds)
                    done += 1
                    progress(f"{self.solver} of {group[0]}", done / total)
        progress(f"{len(self.layers_)} layers", 1.0)
        return self

    def apply_(self, model: nn.Module) -> Surgery:
        """Put the factored layers into a model in place of its own; `undo()` of what is returned puts these back."""
        if not self.layers_:
            raise ValueError("model: nothing is fitted, or every layer stayed dense")
        return replace(model, copy.deepcopy(self.layers_))

    def dense_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What the factored layers multiply by, under the names and in the types of the model's own weights."""
        found = {}
        for name, layer in self.layers_.items():
            old = model.get_submodule(name)
            weight = dense_weight(layer).to(linear_weight(old)[0].dtype)
            found[f"{name}.weight"] = weight.mT.contiguous() if is_conv1d(old) else weight
        return found

    def saved(self) -> float:
        """Share of the bits of all layers together that is saved."""
        return 1 - sum(each.bits for each in self.report_) / sum(each.dense_bits for each in self.report_)

    # ------------------------------------------------------------------ which layers

    def _names(self, model: nn.Module) -> list[str]:
        layers: Layers | None = self.layers
        names = linear_names(model) if layers is None else layer_names(model, layers)
        owners: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            for own in module.parameters(recurse=False):
                owners.setdefault(id(own), []).append(name)
        kept = []
        for name in names:
            module = model.get_submodule(name)
            others = [owner for owner in owners[id(linear_weight(module) and module.weight)] if owner not in names]
            parent = model.get_submodule(name.rpartition(".")[0])
            if self.exclude is not None and re.search(self.exclude, name):
                self.left_out_[name] = "excluded"
            elif others:
                self.left_out_[name] = f"its weight is also that of {others[0]}"
            elif isinstance(parent, nn.MultiheadAttention):
                self.left_out_[name] = "torch's attention reads the weight itself"
            else:
                kept.append(name)
        if not kept:
            raise ValueError(f"layers: none is left of {len(names)}: {next(iter(self.left_out_.values()), '')}")
        return kept

    def _groups(self, model: nn.Module, names: Sequence[str]) -> list[list[str]]:
        """Names that are factored together: those of one tied weight, and `group_size` that follow one another."""
        tied: dict[int, list[str]] = {}
        for name in names:
            tied.setdefault(id(model.get_submodule(name).weight), []).append(name)
        kinds: dict[Any, list[list[str]]] = {}
        for same in tied.values():
            shape = linear_weight(model.get_submodule(same[0]))[0].shape
            alone = same[0] if self.group_size == 1 or len(same) > 1 else ""
            kinds.setdefault((re.sub(r"\d+", "*", same[0]), shape[1], alone), []).append(same)
        found = []
        for group in kinds.values():
            for start in range(0, len(group), self.group_size):
                found.append([name for same in group[start : start + self.group_size] for name in same])
        return sorted(found, key=lambda group: names.index(group[0]))

    def _settings(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    # ------------------------------------------------------------------ one group

    def _weights(self, model: nn.Module, group: Sequence[str]) -> tuple[Tensor, list[slice]]:
        """Weights below one another, a tied one once, and the rows of each name."""
        places: dict[int, slice] = {}
        weights, rows = [], 0
        for name in group:
            module = model.get_submodule(name)
            if id(module.weight) not in places:
                weights.append(linear_weight(module)[0].detach())
                places[id(module.weight)] = slice(rows, rows + len(weights[-1]))
                rows += len(weights[-1])
        return torch.cat(weights), [places[id(model.get_submodule(name).weight)] for name in group]

    def _metric(self, group: Sequence[str], moments: Any) -> Any:
        if moments is None:
            return None
        total = moments[group[0]]
        for name in group[1:]:
            total = total + moments[name]
        return total

    def _solved(
        self, model: nn.Module, moments: Any, group: list[str], ratio: float, stored: Path | None
    ) -> tuple[Factorisation | None, float]:
        """What became of the weights of a group, and seconds; None where they stay. May run in several threads."""
        if ratio == 0:
            return None, 0.0
        weight, _ = self._weights(model, group)
        metric = self._metric(group, moments)
        trace = None if metric is None else [metric.count, float(metric.squares.sum())]
        settings = json.dumps([self._settings(), group, ratio, float(weight.double().norm()), trace], default=str)
        started = time.perf_counter()
        found = None if stored is None else _read(stored, settings)
        if found is None:
            try:
                found = factorise(
                    weight, metric, ratio, solver=self.solver, density=self.density, max_iter=self.max_iter,
                    tolerance=self.tolerance, random_state=self.random_state,
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{group[0]}: {error}") from error
            if stored is not None:
                _write(stored, settings, found)
        return found, (time.perf_counter() - started) / len(group)

    def _record(
        self, model: nn.Module, group: list[str], moments: Any, found: Factorisation | None, seconds: float
    ) -> None:
        """The layers and the lines of the report of a group."""
        weight, rows = self._weights(model, group)
        if found is None:
            self.left_out_ |= dict.fromkeys(group, "its bits are worth more here than elsewhere")
            d_out, d_in = weight.shape
            bits = VALUE_BITS * d_out * d_in
            self.report_.append(
                LayerReport(group[0], "dense", d_out, d_in, min(d_out, d_in), None, bits, bits, 0.0, 0.0)
            )
            return
        counted: set[int] = set()
        for name, place in zip(group, rows):
            module = model.get_submodule(name)
            own, bias = linear_weight(module)
            layer = _part(found.layer, place, bias)
            error = found.error
            if len(group) > 1:
                white = whitener_of(None if moments is None else moments[name], own.shape[1])
                error = weighted_error(own, layer, white)
            # Shares of whole bits that add up to all; what is tied is stored once.
            ends = [found.bits * edge // len(weight) for edge in (place.start, place.stop)]
            bits = 0 if place.start in counted else ends[1] - ends[0]
            dense = 0 if place.start in counted else VALUE_BITS * own.numel()
            counted.add(place.start)
            skipped = 0 if moments is None else moments.skipped.get(moments.leaders[name], 0)
            self.layers_[name] = layer
            facts = (found.rank, found.nonzero, bits, dense, error, seconds, found.shift, skipped)
            self.report_.append(LayerReport(name, self.solver, own.shape[0], own.shape[1], *facts))

    # ------------------------------------------------------------------ bits over layers

    def _allocated(self, model: nn.Module, parts: Any, moments: Any, progress: Progress) -> dict[str, float]:
        groups = [group for part in parts for group in part]
        if self.allocation == "uniform":
            return {group[0]: self.ratio for group in groups}
        options = [min(self.ratio * step, 1 - (1 - self.ratio) / 8) for step in _STEPS]
        options = sorted({*options, self.ratio}, reverse=True)
        bits, losses = [], []
        for number, part in enumerate(parts):
            for group in part:
                progress(f"measuring {group[0]}", len(bits) / len(groups))
                weight, _ = self._weights(model, group)
                curve = error_curve(
                    weight, self._metric(group, moments(number)), options, solver=self.solver, density=self.density
                )
                bits.append([VALUE_BITS * weight.numel() * (1 - option) for option in [*options, 0.0]])
                losses.append([*curve, 0.0])
        chosen = allocate(bits, losses, (1 - self.ratio) * sum(each[-1] for each in bits))
        return {group[0]: [*options, 0.0][place] for group, place in zip(groups, chosen)}


@contextlib.contextmanager
def _side_by_side(solve: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """`map`, one item a thread of torch's: decompositions of middling size gain little from threads inside them."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield map(solve, *arguments)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map(solve, *arguments)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _part(layer: Any, rows: slice, bias: Tensor | None) -> nn.Module:
    """Some outputs of a layer, with what all outputs share still in one place."""
    part: Any
    if isinstance(layer, SparseDictLinear):
        part = SparseDictLinear(layer.dictionary, layer.indices[rows], layer.values[rows], bias)
        part.dictionary = layer.dictionary
    elif isinstance(layer, LowRankLinear):
        part = LowRankLinear(layer.up[rows], layer.down, bias)
        part.down = layer.down
    else:
        part = nn.Linear(layer.weight.shape[1], rows.stop - rows.start, bias=False, device="meta")
        part.weight = nn.Parameter(layer.weight.detach()[rows].clone())
        part.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return part


def _write(path: Path, settings: str, found: Factorisation) -> None:
    layer: Any = found.layer
    arrays = layer.arrays() if hasattr(layer, "arrays") else {"weight": layer.weight}
    facts = {each.name: getattr(found, each.name) for each in fields(found) if each.name not in ("layer", "history")}
    save_arrays(path, "factorised layer", arrays, settings=settings, **facts, history=list(found.history))


def _read(path: Path, settings: str) -> Factorisation | None:
    """What an earlier run of the same settings has finished."""
    kinds: Mapping[str, Any] = {
        "settings": str, "solver": str, "error": float, "bits": int, "dense_bits": int, "shift": float,
        "history": list[float],
    }  # fmt: skip
    try:
        with saved_object(path, "factorised layer", _PARTS, kinds) as (arrays, facts):
            if facts.pop("settings") != settings:
                return None
            if "weight" in arrays:
                layer: Any = nn.Linear(*reversed(arrays["weight"].shape), bias=False, device="meta")
                layer.weight = nn.Parameter(arrays["weight"])
            else:
                layer = _KINDS["dictionary" if "dictionary" in arrays else "low rank"](**arrays)
            return Factorisation(layer, **{**facts, "history": tuple(facts["history"])})
    except (OSError, ValueError):  # none, or one that was not finished
        return None
