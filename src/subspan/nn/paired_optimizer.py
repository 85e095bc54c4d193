"""One optimizer out of two: geodesic steps for the planes among a model's parameters, any optimizer for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from .riemannian import GrassmannParameter, RiemannianSGD


class WithRiemannian(Optimizer):
    """One optimizer out of two: `inner` for all parameters but planes, `RiemannianSGD` for these.

    One `step`, one `state_dict`, one list of groups, so that schedulers and trainers see a single optimizer. Groups may
    be added, also with planes among other parameters, and the list be changed from outside, as trainers do.
    `with_riemannian` makes it of one optimizer over all parameters.

    Parameters
    ----------
    inner
        Optimizer of the other parameters.
    planes
        Of the `GrassmannParameter`s.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import GrassmannHead, RiemannianSGD, WithRiemannian
    >>> encoder, head = torch.nn.Linear(6, 4), GrassmannHead(4, num_classes=3, rank=2)
    >>> both = WithRiemannian(torch.optim.AdamW(encoder.parameters()), RiemannianSGD(head.parameters()))
    >>> [group["lr"] for group in both.param_groups]
    [0.001, 0.1]
    """

    def __init__(self, inner: Optimizer, planes: RiemannianSGD) -> None:
        self.inner = inner
        self.planes = planes
        # Each group is the very dictionary of one of the two: a scheduler that sets a rate here sets it there.
        super().__init__([*inner.param_groups, *planes.param_groups], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more group, with the options of `inner`; planes in it go to a group behind it, with options of theirs."""
        super().add_param_group(param_group)
        if not any(param_group is group for part in (self.inner, self.planes) for group in part.param_groups):
            self._divide()

    def _divide(self) -> None:
        """Bring the two in line with the list of groups; planes leave the groups of `inner` for one of their own."""
        for part in (self.inner, self.planes):
            part.param_groups = [group for group in part.param_groups if any(group is one for one in self.param_groups)]
        planes = [each for group in self.param_groups if "transport" not in group for each in _take_planes(group)]
        self.param_groups = [group for group in self.param_groups if group["params"]]
        if planes:
            self.param_groups.append({"params": planes, **self.planes.defaults})
        for group in self.param_groups:
            part = self.planes if "transport" in group else self.inner
            if not any(group is one for one in part.param_groups):
                part.add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both; returns what the closure did."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._divide()
        self.inner.step()
        self.planes.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        self._divide()
        return {"inner": self.inner.state_dict(), "planes": self.planes.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the states of both. Raises ValueError for a state of something else."""
        if set(state_dict) != {"inner", "planes"}:
            raise ValueError(f"state_dict: expected the states 'inner' and 'planes', got {sorted(state_dict)}")
        self._divide()
        order = [self.planes if "transport" in group else self.inner for group in self.param_groups]
        self.inner.load_state_dict(state_dict["inner"])
        self.planes.load_state_dict(state_dict["planes"])
        groups = {part: iter(part.param_groups) for part in (self.inner, self.planes)}
        self.param_groups = [next(groups[part]) for part in order]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "inner": self.inner, "planes": self.planes}


def with_riemannian(optimizer: Optimizer, manifold_lr: float = 0.1, **options: Any) -> WithRiemannian:
    """Take the planes out of an optimizer's groups and step them by `RiemannianSGD` beside it.

    So weight decay and adaptive rates do not reach them. A scheduler that scales rates scales both.

    Parameters
    ----------
    optimizer
        Over all parameters; changed in place.
    manifold_lr
        Learning rate of the planes.
    **options
        Of `RiemannianSGD`.

    Returns
    -------
    WithRiemannian

    Raises
    ------
    ValueError
        Where the optimizer holds no `GrassmannParameter`, or nothing else.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import GrassmannHead, with_riemannian
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), GrassmannHead(4, num_classes=3, rank=2))
    >>> optimizer = with_riemannian(torch.optim.AdamW(model.parameters()), manifold_lr=0.5)
    >>> model(torch.randn(8, 6)).square().sum().backward()
    >>> optimizer.step()
    >>> planes = model[1].planes
    >>> torch.allclose(planes @ planes.mT, torch.eye(2), atol=1e-4)
    True
    """
    if not any(isinstance(p, GrassmannParameter) for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer: holds no GrassmannParameter")
    planes = [each for group in optimizer.param_groups for each in _take_planes(group)]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    if not optimizer.param_groups:
        raise ValueError("optimizer: holds nothing but planes; use RiemannianSGD alone")
    return WithRiemannian(optimizer, RiemannianSGD(planes, lr=manifold_lr, **options))


def _take_planes(group: dict[str, Any]) -> list[Any]:
    """The planes of a group, with their names where it has names; the group is left without them."""
    named = "param_names" in group
    entries = list(zip(group["param_names"], group["params"])) if named else group["params"]
    planes = [isinstance(parameter, GrassmannParameter) for parameter in group["params"]]
    rest = [entry for entry, is_plane in zip(entries, planes) if not is_plane]
    group["params"] = [entry[1] for entry in rest] if named else rest
    if named:
        group["param_names"] = [entry[0] for entry in rest]
    return [entry for entry, is_plane in zip(entries, planes) if is_plane]
