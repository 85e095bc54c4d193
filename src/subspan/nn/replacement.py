"""Replacing parts of a network by structured layers, by name, with an account of it and a way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """One replaced module: its name, parameters before and after, and multiply-adds of one run where they were counted.

    error: |f(x) - g(x)|_F / |f(x)|_F of the old and the new module on what reached the old one.
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
    """What `replace` did to `model`: `sites`, `report()`, and `undo()`, which puts the very same modules back."""

    def __init__(self, model: nn.Module, originals: dict[str, nn.Module], sites: list[Site]) -> None:
        self.model = model
        self.sites = sites
        self._originals = originals

    def undo(self) -> nn.Module:
        """Put the original modules back; returns the model."""
        for name, module in self._originals.items():
            _put(self.model, name, module)
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
    """Replace submodules of `model`, in place, by what a function makes of each, or by a given module.

    sites: names or patterns ("layers.*.fc") → a function of the old module, such as `Butterfly.from_linear`,
    `HouseholderProjector.from_linear` or `lambda m: nn.Identity()` (the control), or a module. A new module has the old
    one's device and mode. example: an input of the model; with it multiply-adds and errors are measured. Raises
    ValueError for a pattern that names nothing, and, with an example, where shapes would change; then nothing is
    replaced.
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
    originals, made, done = {}, {}, []
    for name, maker in chosen.items():
        old = model.get_submodule(name)
        new = maker if isinstance(maker, nn.Module) else maker(old)
        device = next((p.device for p in old.parameters()), None)
        new = new.to(device).train(old.training)
        originals[name], made[name] = old, new
        done.append(_site(name, old, new, seen.get(name)))
    for name, new in made.items():
        _put(model, name, new)
    return Surgery(model, originals, done)


def multiply_adds(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of all linear and convolution layers in one run of `module`.

    Other layers count where they say so, by a method `multiply_adds(input)`; elementwise operations do not.
    """
    total = 0
    handles = []

    def count(part: Any, given: Any, output: Any) -> None:
        nonlocal total
        if hasattr(part, "multiply_adds"):
            total += part.multiply_adds(given[0])
        elif isinstance(part, nn.Linear):
            total += output.numel() * part.in_features
        else:
            total += output.numel() * part.weight[0].numel()

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for part in module.modules():
        if isinstance(part, (nn.Linear, *convolutions)) or hasattr(part, "multiply_adds"):
            handles.append(part.register_forward_hook(count))
    training = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad():
            module.eval()(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in training:
            part.training = mode
    return total


def _inputs(model: nn.Module, names: list[str], example: Any) -> dict[str, tuple[Any, ...]]:
    seen: dict[str, tuple[Any, ...]] = {}
    handles = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.setdefault(name, inputs)

        return hook

    for name in names:
        handles.append(model.get_submodule(name).register_forward_pre_hook(keep(name)))
    try:
        multiply_adds(model, *(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _site(name: str, old: nn.Module, new: nn.Module, inputs: tuple[Any, ...] | None) -> Site:
    sizes = [sum(p.numel() for p in part.parameters()) for part in (old, new)]
    site = Site(name, type(old).__name__, type(new).__name__, sizes[0], sizes[1])
    if inputs is None:
        return site
    modes = [(part, part.training) for whole in (old, new) for part in whole.modules()]
    with torch.no_grad():
        before, after = old.eval()(*inputs), new.eval()(*inputs)
    for part, mode in modes:
        part.training = mode
    if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape != after.shape:
        raise ValueError(
            f"sites: {name!r} would give {tuple(after.shape)} where it gave {tuple(before.shape)}; nothing was replaced"
        )
    site = replace_fields(
        site, multiply_adds=multiply_adds(old, *inputs), new_multiply_adds=multiply_adds(new, *inputs)
    )
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return site
    error = torch.linalg.norm((after - before).float()) / torch.linalg.norm(before.float()).clamp_min(1e-30)
    return replace_fields(site, error=float(error))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    if last.isdigit() and isinstance(owner, (nn.Sequential, nn.ModuleList)):
        owner[int(last)] = module
    else:
        setattr(owner, last, module)
