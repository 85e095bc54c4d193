"""Optimisation on the Grassmann manifold: marked parameters take geodesic steps, all others what they always took."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from ..geometry.grassmann import geodesic_functions

_TRANSPORTS = ("project", "parallel")
# Of the rows of one block of planes: a core's second cache holds about that.
_BLOCK_BYTES = 1 << 21


class GrassmannParameter(nn.Parameter):
    """A parameter (…, k, d) whose orthonormal rows stand for their span; `RiemannianSGD` knows it by its type."""


class RiemannianSGD(Optimizer):
    """Stochastic gradient descent by geodesics for `GrassmannParameter`s, plain SGD for all other parameters.

    Planes: the tangent part of the gradient is added to the momentum, which is carried along the step ("parallel"
    transport) or made tangent again at the new point ("project"); the step is exact (`geodesic_functions`), k x k work
    a plane. max_angle: longest step, in radians along the geodesic, √(Σ angle²); None = no bound. It stands in for
    gradient clipping, since a step's length is an angle already. weight_decay, nesterov: for the other parameters
    alone, planes have no scale. Rows are mended with each step, so they stay orthonormal; state in float32 at least.
    Raises ValueError for values out of range. Source: Edelman, Arias & Smith (1998); Wang et al. (2023).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        transport: str = "project",
        max_angle: float | None = math.pi / 4,
    ) -> None:
        if transport not in _TRANSPORTS:
            raise ValueError(f"transport: expected one of {_TRANSPORTS}, got {transport!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: must lie in [0, 1), got {momentum}")
        if not (lr >= 0 and weight_decay >= 0):
            raise ValueError(f"lr, weight_decay: must not be negative, got {lr} and {weight_decay}")
        if nesterov and momentum == 0:
            raise ValueError("nesterov: needs a momentum above 0")
        if max_angle is not None and not max_angle > 0:
            raise ValueError(f"max_angle: must be positive, or None for no bound, got {max_angle}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "transport": transport,
            "max_angle": max_angle,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters that have a gradient; returns what the closure did."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if isinstance(parameter, GrassmannParameter):
                    self._step_planes(parameter, group)
                else:
                    self._step_plain(parameter, group)
        return loss

    def _step_planes(self, parameter: Tensor, group: dict[str, Any]) -> None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        shape = (-1, *parameter.shape[-2:])
        gradient: Any = parameter.grad
        planes, gradients = parameter.reshape(shape), gradient.reshape(shape)
        momenta = self._momenta(parameter, dtype).view(shape) if group["momentum"] else None
        for part in _blocks(planes, dtype):
            rows = planes[part].to(dtype)
            if momenta is None:
                velocity = gradients[part].to(dtype, copy=True)
            else:
                velocity = torch.add(gradients[part], momenta[part], alpha=group["momentum"], out=momenta[part])
            planes[part] = _moved(rows, velocity, group)
        if planes.data_ptr() != parameter.data_ptr():
            parameter.copy_(planes.view_as(parameter))

    def _momenta(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        # A state that was loaded has the type of the parameter.
        state["momentum_buffer"] = state["momentum_buffer"].to(dtype).contiguous()
        return state["momentum_buffer"]

    def _step_plain(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient: Any = parameter.grad
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        if group["momentum"]:
            state = self.state[parameter]
            if "momentum_buffer" in state:
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
            else:
                buffer = state["momentum_buffer"] = gradient.clone()
            gradient = gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        parameter.add_(gradient, alpha=-group["lr"])


def _blocks(planes: Tensor, dtype: torch.dtype) -> list[slice]:
    """Planes of which rows, momentum and result stay in a core's cache through all the products of a step."""
    if planes.device.type != "cpu":
        return [slice(None)]
    block = max(1, _BLOCK_BYTES * torch.get_num_threads() // (planes.shape[1] * planes.shape[2] * dtype.itemsize))
    return [slice(start, start + block) for start in range(0, len(planes), block)]


def _moved(
    rows: Float[Tensor, "b k d"], velocity: Float[Tensor, "b k d"], group: dict[str, Any]
) -> Float[Tensor, "b k d"]:
    """The rows one step on; the velocity is made tangent and carried, in place."""
    # The momentum too: it was carried to rows that differed by rounding.
    velocity.baddbmm_(velocity @ rows.mT, rows, alpha=-1)
    gram = velocity @ velocity.mT
    length = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
    t = torch.full_like(length, -float(group["lr"]))
    if group["max_angle"] is not None:
        t = t * (group["max_angle"] / (t.abs() * length).clamp_min(1e-30)).clamp_max(1)
    # In float64: the eigenvectors of float32 would cost the rows a digit of orthonormality.
    cosine, sine, _ = (each.to(rows.dtype) for each in geodesic_functions(gram.double(), t.double()))
    # Rows that rounding moved a little from orthonormal set out mended, by one Newton-Schulz step.
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    mended = 1.5 * eye - 0.5 * (rows @ rows.mT)
    # Without a velocity there is no step, not even one of rounding.
    start = torch.where((length == 0).view(-1, 1, 1), eye, cosine @ mended)
    moved = torch.bmm(start, rows).baddbmm_(sine, velocity)
    if group["transport"] == "parallel":
        # A velocity carried along itself: V cos(ts) - S s sin(ts).
        velocity.copy_(torch.bmm(cosine, velocity).baddbmm_(gram @ sine @ mended, rows, alpha=-1))
    return moved


class WithRiemannian(Optimizer):
    """One optimizer out of two: `inner` for all parameters but planes, `RiemannianSGD` for these.

    One `step`, one `state_dict`, one list of groups, so that schedulers and trainers see a single optimizer.
    """

    def __init__(self, inner: Optimizer, planes: RiemannianSGD) -> None:
        self.inner = inner
        self.planes = planes
        super().__init__([*inner.param_groups, *planes.param_groups], {})
        self._gather()

    def _gather(self) -> None:
        # The groups are those of the two themselves: a scheduler that sets a rate here sets it there.
        self.param_groups = [*self.inner.param_groups, *self.planes.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both; returns what the closure did."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.inner.step()
        self.planes.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"inner": self.inner.state_dict(), "planes": self.planes.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the states of both. Raises ValueError for a state of something else."""
        if set(state_dict) != {"inner", "planes"}:
            raise ValueError(f"state_dict: expected the states 'inner' and 'planes', got {sorted(state_dict)}")
        self.inner.load_state_dict(state_dict["inner"])
        self.planes.load_state_dict(state_dict["planes"])
        self._gather()


def with_riemannian(optimizer: Optimizer, manifold_lr: float = 0.1, **options: Any) -> WithRiemannian:
    """Take the planes out of an optimizer's groups and step them by `RiemannianSGD` beside it.

    So weight decay and adaptive rates do not reach them. options: of `RiemannianSGD`. A scheduler that scales rates
    scales both. Raises ValueError where the optimizer holds no `GrassmannParameter`.
    """
    planes = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, GrassmannParameter)]
    if not planes:
        raise ValueError("optimizer: holds no GrassmannParameter")
    if not any(len(_others(group["params"])) for group in optimizer.param_groups):
        raise ValueError("optimizer: holds nothing but planes; use RiemannianSGD alone")
    for group in optimizer.param_groups:
        group["params"] = _others(group["params"])
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return WithRiemannian(optimizer, RiemannianSGD(planes, lr=manifold_lr, **options))


def _others(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p for p in parameters if not isinstance(p, GrassmannParameter)]
