"""Replacing parts of a network by structured layers, by name, with an account of it and a way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from subspan.base.modules import evaluation


@dataclass(frozen=True)
class Site:
    """One replaced module, before and after.

    Attributes
    ----------
    name
        Of the module.
    before, after
        Names of the classes.
    parameters, new_parameters
        Their numbers.
    multiply_adds, new_multiply_adds
        Of one run, where they were counted.
    error
        |f(x) - g(x)|_F / |f(x)|_F of the old and the new module on what reached the old one, where it was measured.
    """

    name: str
    before: str
    after: str
    parameters: int
    new_parameters: int
    multiply_adds: int | None = None
    new_multiply_adds: int | None = None
    error: float | None = None


class Surgery:
    """What `replace` did to a model; `undo()` puts the very same modules back, `report()` is a line a site.

    Parameters
    ----------
    model
        The changed model.
    originals
        The old modules, by name.
    sites
        An account of each replacement.
    reversals
        What `undo` calls, the last one first.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import replace
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    >>> surgery = replace(model, {"0": torch.nn.Identity()})
    >>> surgery.sites[0].after, surgery.undo()[0]
    ('Identity', Linear(in_features=8, out_features=8, bias=True))
    """

    def __init__(
        self, model: nn.Module, originals: dict[str, nn.Module], sites: list[Site], reversals: list[Callable[[], Any]]
    ) -> None:
        self.model = model
        self.sites = sites
        self._originals = originals
        self._reversals = reversals

    def undo(self) -> nn.Module:
        """Put the original modules back; returns the model."""
        for name, module in self._originals.items():
            _put(self.model, name, module)
        while self._reversals:
            self._reversals.pop()()
        return self.model

    def report(self) -> str:
        """One line a site, and a sum."""
        lines = []
        for site in self.sites:
            line = (
                f"{site.name}: {site.before} → {site.after}, {site.parameters:,} → {site.new_parameters:,} parameters"
            )
            if site.multiply_adds is not None:
                line += f", {site.multiply_adds:,} → {site.new_multiply_adds:,} multiply-adds"
            lines.append(line if site.error is None else f"{line}, error {site.error:.3g}")
        saved = sum(site.parameters - site.new_parameters for site in self.sites)
        return "\n".join([*lines, f"{saved:,} parameters fewer"])


def replace(
    model: nn.Module,
    sites: Mapping[str, Callable[[Any], nn.Module]] | Mapping[str, nn.Module],
    example: Any = None,
) -> Surgery:
    """Replace submodules of a model, in place, by what a function makes of each, or by a given module.

    A new module has the old one's device and mode. In a model of half precision it stays as it is, and tensors are
    converted on the way in and out.

    Parameters
    ----------
    model
        Any torch module; changed in place.
    sites
        Names or patterns ("layers.*.fc") → a function of the old module, such as `Butterfly.from_linear`,
        `HouseholderProjector.from_linear` or `lambda m: nn.Identity()` (the control), or a module.
    example
        An input of the model, a tuple of them, or a mapping of keywords (what a tokenizer gives). With it multiply-adds
        and errors are measured. Where the old module gave a tuple, as the attention of torch and of transformers does,
        the new one is given its first tensor and has its output put first in such a tuple.

    Returns
    -------
    Surgery

    Raises
    ------
    ValueError
        For a pattern that names nothing, and, with an example, where shapes would change; then nothing is replaced.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import LowRankLinear, replace
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    >>> surgery = replace(model, {"0": lambda old: LowRankLinear.from_linear(old, rank=2)}, example=torch.randn(5, 8))
    >>> surgery.sites[0].parameters, surgery.sites[0].new_parameters, model(torch.randn(5, 8)).shape
    (72, 40, torch.Size([5, 8]))
    """
    chosen: dict[str, Any] = {}
    for pattern, maker in sites.items():
        names = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
        if not names:
            linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
            raise ValueError(f"sites: {pattern!r} names no module; linear layers are {', '.join(linear) or 'none'}")
        chosen |= dict.fromkeys(names, maker)
    for name in chosen:
        if any(name.startswith(f"{other}.") for other in chosen):
            raise ValueError(f"sites: {name!r} lies inside another module that is replaced")
    seen = {} if example is None else _inputs(model, list(chosen), example)
    originals: dict[str, nn.Module] = {}
    made: dict[str, nn.Module] = {}
    done: list[Site] = []
    reversals: list[Callable[[], Any]] = []
    try:
        for name, maker in chosen.items():
            old = model.get_submodule(name)
            new = maker if isinstance(maker, nn.Module) else maker(old)
            like = next(old.parameters(), None)
            if like is not None:
                new = new.to(like.device)
            # Parts of a new module in that mode may be in the other on purpose, such as frozen batch norms.
            originals[name], made[name] = old, new if new.training == old.training else new.train(old.training)
            done.append(_site(name, old, new, seen.get(name), reversals))
    except BaseException:
        for reverse in reversals:
            reverse()
        raise
    for name, new in made.items():
        reversals += _leave_fast_path(model, name, new)
        _put(model, name, new)
    return Surgery(model, originals, done, reversals)


def multiply_adds(module: nn.Module, *inputs: Any, **named: Any) -> int:
    """Multiply-adds of all linear maps and convolutions in one run of a module.

    Other layers count where they say so, by a method `multiply_adds(input)`; products of activations with one another
    and elementwise operations do not.

    Parameters
    ----------
    module
        Any torch module; runs in evaluation mode.
    *inputs, **named
        What it is called with.

    Returns
    -------
    int

    Examples
    --------
    >>> import torch
    >>> from subspan.models import multiply_adds
    >>> multiply_adds(torch.nn.Linear(8, 2), torch.randn(5, 8))
    80
    """
    return _counted_run(module, *inputs, **named)[1]


def _counted_run(module: nn.Module, *inputs: Any, **named: Any) -> tuple[Any, int]:
    """(output, multiply-adds) in evaluation mode; modes are put back."""
    total = 0
    handles = []

    def count(part: Any, args: Any, keywords: Any, output: Any) -> None:
        nonlocal total
        if hasattr(part, "multiply_adds"):
            total += part.multiply_adds(_first_tensor((*args, *keywords.values())))
        elif isinstance(part, nn.MultiheadAttention):
            # It reads the weights of its linear maps without calling them.
            query, key, value = (*args, *keywords.values())[:3]
            total += part.embed_dim * (2 * query.numel() + key.numel() + value.numel())
        elif isinstance(part, nn.Linear):
            total += output.numel() * part.in_features
        else:
            total += output.numel() * part.weight[0].numel()

    counted = (nn.Linear, nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for part in module.modules():
        if isinstance(part, counted) or hasattr(part, "multiply_adds"):
            handles.append(part.register_forward_hook(count, with_kwargs=True))
    try:
        with torch.no_grad(), evaluation(module):
            return module(*inputs, **named), total
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(values: Any) -> Tensor:
    values = values if isinstance(values, (tuple, list)) else (values,)
    return next(value for value in values if isinstance(value, Tensor))


def _inputs(model: nn.Module, names: list[str], example: Any) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What reaches the modules first, by name: positional inputs and keywords."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if name not in seen:
                # A cache of keys and values would be longer after the run.
                seen[name] = copy.deepcopy((inputs, named))

        return hook

    for name in names:
        handles.append(model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True))
    try:
        if isinstance(example, Mapping):
            multiply_adds(model, **example)
        else:
            multiply_adds(model, *(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _site(
    name: str,
    old: nn.Module,
    new: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None,
    reversals: list[Callable[[], Any]],
) -> Site:
    """The account of one replacement; hooks on the new module let it be called as the old one was."""
    sizes = [sum(p.numel() for p in part.parameters()) for part in (old, new)]
    site = Site(name, type(old).__name__, type(new).__name__, sizes[0], sizes[1])
    half = next((p.dtype for p in old.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if inputs is None:
        reversals += _adapt(new, half, None)
        return site

    def run(module: nn.Module) -> tuple[Any, int]:
        given, named = copy.deepcopy(inputs)
        return _counted_run(module, *given, **named)

    before, cost = run(old)
    takes_the_same = isinstance(new, type(old))
    reversals += _adapt(new, half, len(before) if isinstance(before, tuple) and not takes_the_same else None)
    after, new_cost = run(new)
    site = replace_fields(site, multiply_adds=cost, new_multiply_adds=new_cost)
    if not all(isinstance(output, (Tensor, tuple)) for output in (before, after)):
        return site
    first, second = _first_tensor(before), _first_tensor(after)
    if first.shape != second.shape:
        raise ValueError(
            f"sites: {name!r} would give {tuple(second.shape)} where it gave {tuple(first.shape)}; nothing was replaced"
        )
    error = torch.linalg.norm((second - first).float()) / torch.linalg.norm(first.float()).clamp_min(1e-30)
    return replace_fields(site, error=float(error))


def _adapt(new: nn.Module, half: torch.dtype | None, length: int | None) -> list[Callable[[], Any]]:
    """Hooks that give a float32 layer what a caller in half precision has, or that put its output into a tuple."""
    types = [p.dtype for p in new.parameters() if p.is_floating_point()]
    own = next(iter(types), None)
    # One that has a part in half precision, as wrappers of the old module do, sees to the rest itself.
    if half is None or own is None or half in types:
        half = own = None
    if half is None and length is None:
        return []

    def widened(value: Any) -> Any:
        return value.to(own) if half is not None and isinstance(value, Tensor) and value.dtype == half else value

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        if length is not None:
            inputs, named = (_first_tensor((*inputs, *named.values())),), {}
        return tuple(map(widened, inputs)), {key: widened(value) for key, value in named.items()}

    def after(module: nn.Module, inputs: Any, output: Any) -> Any:
        if half is not None and isinstance(output, Tensor):
            output = output.to(half)
        # One module put in several places has been here before.
        if length is None or isinstance(output, tuple):
            return output
        return (output, *[None] * (length - 1))

    handles = (new.register_forward_pre_hook(before, with_kwargs=True), new.register_forward_hook(after))
    return [handle.remove for handle in handles]


def _leave_fast_path(model: nn.Module, name: str, new: nn.Module) -> list[Callable[[], Any]]:
    """Have torch's own encoder layers call their parts, whose weights they else read in evaluation."""
    reversals = []

    def change(module: nn.Module, attribute: str, value: Any) -> None:
        known = getattr(module, attribute)
        reversals.append(lambda: setattr(module, attribute, known))
        setattr(module, attribute, value)

    above = [name.rsplit(".", depth)[0] if depth <= name.count(".") else "" for depth in range(1, name.count(".") + 2)]
    for part in (model.get_submodule(one) for one in above):
        if isinstance(part, nn.TransformerEncoder):
            change(part, "use_nested_tensor", False)
        elif isinstance(part, nn.TransformerEncoderLayer):
            change(part, "activation_relu_or_gelu", 0)
            if part.self_attn is model.get_submodule(name) and not hasattr(new, "batch_first"):
                setattr(new, "batch_first", False)  # noqa: B010
                reversals.append(lambda: delattr(new, "batch_first"))
    return reversals


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    if last.isdigit() and isinstance(owner, (nn.Sequential, nn.ModuleList)):
        owner[int(last)] = module
    else:
        setattr(owner, last, module)
