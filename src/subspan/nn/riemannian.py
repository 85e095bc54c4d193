"""Optimisation on the Grassmann manifold: marked parameters take geodesic steps, all others what they always took."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from subspan.geometry.grassmann import geodesic_functions

_TRANSPORTS = ("project", "parallel")
# Of the rows of one block of planes: a core's second cache holds about that.
_BLOCK_BYTES = 1 << 21


class _Marked(type(nn.Parameter)):
    def __instancecheck__(self, instance: object) -> bool:
        # As torch knows a parameter of another tensor type, such as a shard, by a mark.
        return super().__instancecheck__(instance) or getattr(instance, "_is_grassmann", False)


class GrassmannParameter(nn.Parameter, metaclass=_Marked):
    """A parameter (…, k, d) whose orthonormal rows stand for their span; `RiemannianSGD` knows it by its type.

    Copies and pickles keep the type. A parameter that takes its place in a module (assigned from a state, made real
    from the meta device, sharded) would not have it: see `GrassmannModule`.

    Parameters
    ----------
    data
        Rows (…, k, d).
    requires_grad
        Whether it is trained.

    Examples
    --------
    >>> import copy
    >>> import torch
    >>> from subspan.nn import GrassmannParameter
    >>> isinstance(copy.deepcopy(GrassmannParameter(torch.eye(2, 4))), GrassmannParameter)
    True
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return GrassmannParameter, (self.data, self.requires_grad)


torch.serialization.add_safe_globals([GrassmannParameter])


class GrassmannModule(nn.Module):
    """A module that keeps its planes: what takes the place of a `GrassmannParameter`, by its name, becomes one.

    A forward pass also sees parameters that were put in place past the module. `planes_of` gives the rows to compute
    with.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import GrassmannModule, GrassmannParameter
    >>> module = GrassmannModule()
    >>> module.planes = GrassmannParameter(torch.eye(2, 4))
    >>> module.planes = torch.nn.Parameter(torch.eye(2, 4).flip(1))
    >>> isinstance(module.planes, GrassmannParameter)
    True
    """

    _plane_names: frozenset[str] = frozenset()
    _warned = False

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_mark)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, GrassmannParameter) and name in self._parameters:
            self._plane_names = self._plane_names | {name}
        elif name in self._plane_names:
            _mark(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _mark(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GrassmannModule:
        super()._apply(fn, recurse)
        _mark(self)
        return self

    def planes_of(self, name: str) -> Float[Tensor, "*b k d"]:
        """Orthonormal rows of the planes of parameter `name`: the parameter itself, or rows of the same spans.

        Averaged planes have shorter rows, and an optimizer that knows of no planes stretches and tilts them; their
        spans are planes all the same, with a gradient. Warns, once, in training. Raises ValueError for NaN, infinity
        and dependent rows.
        """
        planes = getattr(self, name)
        if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or planes.is_meta:
            return planes
        wide = planes.to(torch.promote_types(planes.dtype, torch.float32))
        defect = _defect(wide.detach())
        if defect <= _allowed(planes.dtype):
            return planes
        if not math.isfinite(defect):
            raise ValueError(f"{name}: the planes contain NaN or infinity")
        if self.training and not self._warned:
            self._warned = True
            warnings.warn(
                f"{name}: the planes' rows are orthonormal only to {defect:.2g}: something other than RiemannianSGD or "
                "with_riemannian moves them; their spans are used",
                stacklevel=3,
            )
        return _orthonormal_rows(wide, name).to(planes.dtype)


def _mark(module: GrassmannModule, *_: Any) -> None:
    for name in module._plane_names:
        value = module._parameters.get(name)
        if value is None or isinstance(value, GrassmannParameter):
            continue
        if type(value) is nn.Parameter:
            # In place, since an optimizer may hold it already.
            value.__class__ = GrassmannParameter
        else:
            value._is_grassmann = True  # pyright: ignore[reportAttributeAccessIssue]


def check_planes(planes: Tensor, name: str) -> None:
    """Raise ValueError for rows (…, k, d) that are neither orthonormal nor a mean of orthonormal ones."""
    planes = _local(planes)
    wide = planes.double()
    # A mean shortens rows and does not stretch them; below a tenth it is no longer near any plane.
    squares = torch.linalg.eigvalsh(wide @ wide.mT) if bool(wide.isfinite().all()) else wide.new_full((1,), torch.nan)
    if not bool(((squares > 0.01) & (squares < 1 + 10 * _allowed(planes.dtype))).all()):
        raise ValueError(
            f"{name}: rows are orthonormal only to {_defect(wide):.1g}; mend them first "
            "(geometry.grassmann.orthonormalize on the transpose)"
        )


def _allowed(dtype: torch.dtype) -> float:
    # What steps leave behind is far below; planes of half precision have no better rows.
    return 1e-4 if dtype == torch.promote_types(dtype, torch.float32) else 2e-2


def _defect(planes: Float[Tensor, "*b k d"]) -> float:
    """The largest entry of |P P' - I|; NaN where there is one."""
    gram = planes @ planes.mT
    return float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max())


def _orthonormal_rows(planes: Float[Tensor, "*b k d"], name: str) -> Float[Tensor, "*b k d"]:
    """Rows of the same spans, by Cholesky: differentiable, also where rows are nearly orthonormal."""
    wide = planes.double()
    factor = torch.linalg.cholesky_ex(wide @ wide.mT)[0]
    heights = factor.detach().diagonal(dim1=-2, dim2=-1)
    dependent = ~(heights > 1e-6 * heights.amax(-1, keepdim=True)).all(-1)
    if bool(dependent.any()):
        raise ValueError(f"{name}: the rows of {int(dependent.sum())} planes are dependent and span less")
    return torch.linalg.solve_triangular(factor, wide, upper=False).to(planes.dtype)


class RiemannianSGD(Optimizer):
    """Stochastic gradient descent by geodesics for `GrassmannParameter`s, plain SGD for all other parameters.

    The tangent part of a plane's gradient is added to the momentum; the step is exact (`geodesic_functions`), k x k
    work a plane. Rows are mended when they are taken up and with each step, so they stay orthonormal. State in float32
    at least.

    Parameters
    ----------
    params
        Parameters or groups of them, as in torch.
    lr
        Learning rate.
    momentum
        In [0, 1).
    weight_decay, nesterov
        For the other parameters alone: planes have no scale.
    transport
        The momentum of planes is carried along the step ("parallel") or made tangent again at the new point
        ("project").
    max_angle
        Longest step of a plane, in radians along the geodesic, √(Σ angle²); None: no bound. It stands in for gradient
        clipping, since a step's length is an angle already.

    Raises
    ------
    ValueError
        For values out of range.

    References
    ----------
    Edelman, Arias & Smith (1998); Wang et al. (2023).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import GrassmannParameter, RiemannianSGD
    >>> line, target = GrassmannParameter(torch.tensor([[0.6, 0.8, 0.0]])), torch.tensor([0.0, 1.0, 0.0])
    >>> optimizer = RiemannianSGD([line], lr=0.2, momentum=0)
    >>> for _ in range(30):
    ...     optimizer.zero_grad()
    ...     (line @ target).square().neg().sum().backward()
    ...     optimizer.step()
    >>> bool((line @ target).abs() > 0.999)
    True
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
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more group; rows of planes that are not orthonormal are replaced by such of the same spans."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if isinstance(parameter, GrassmannParameter) and not parameter.is_meta:
                planes = _local(parameter)
                wide = planes.to(torch.promote_types(planes.dtype, torch.float32))
                if planes.numel() and not _defect(wide) <= _allowed(planes.dtype):
                    planes.copy_(_orthonormal_rows(wide, "params"))

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
        momenta = _local(self._momenta(parameter, dtype)) if group["momentum"] else None
        gradient: Any = _local(parameter.grad)
        parameter = _local(parameter)
        shape = (parameter.shape[:-2].numel(), *parameter.shape[-2:])
        planes, gradients = parameter.reshape(shape), gradient.reshape(shape)
        momenta = None if momenta is None else momenta.view(shape)
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
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
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


def _local(tensor: Any) -> Tensor:
    """A tensor, or this process's whole planes of one that is sharded."""
    if not hasattr(tensor, "to_local"):
        return tensor
    if any(each.is_shard() and each.dim >= tensor.ndim - 2 for each in tensor.placements):
        raise ValueError(f"params: planes {tuple(tensor.shape)} can be sharded between planes, got {tensor.placements}")
    return tensor.to_local()


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
