"""A model whose weights are a function of coefficients and masks, so that both can be learnt."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from subspan.models import StateDelta


class MergedModule(nn.Module):
    """A model with the weights θ + Σ_t λ_t m ⊙ τ_t: differentiable in the coefficients λ and in the masks m.

    The base is copied, frozen and put into evaluation mode; it is never written to. Tensors are summed in float32 or
    wider, and used in the type of the base.

    Parameters
    ----------
    base
        The model that all experts were tuned from.
    deltas
        Task → update; tensors that no task changed are left out.
    coefficients
        "fixed"; "task": one learnt coefficient a task; "tensor": one for each task and tensor.
    scaling
        Where the coefficients start.
    clamp
        Use coefficients cut to [0, 1]; one outside has no gradient then.
    forward_fn
        ``forward_fn(model, batch)`` → what the heads take; by default ``model(batch)``.
    exclude
        Regular expression of tensors that stay the base's.
    buffers
        Running statistics are the "base"'s, or the "mean" of the experts'.

    Raises
    ------
    ValueError
        Where an update does not fit the base, or nothing is left to merge.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.weights import MergedModule
    >>> base, expert = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    >>> merged = MergedModule(base, {"task": StateDelta.between(base, expert)}, scaling=1.0)
    >>> x = torch.randn(4, 3)
    >>> bool(torch.allclose(merged(x), expert(x), atol=1e-6))
    True
    """

    def __init__(
        self,
        base: nn.Module,
        deltas: Mapping[str, StateDelta],
        *,
        coefficients: Literal["fixed", "task", "tensor"] = "fixed",
        scaling: float = 0.3,
        clamp: bool = True,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        exclude: str | None = None,
        buffers: Literal["base", "mean"] = "base",
    ) -> None:
        super().__init__()
        if not deltas:
            raise ValueError("deltas: at least one task is needed")
        self.called = _Called(copy.deepcopy(base).requires_grad_(False).eval(), forward_fn)
        self.tasks, self.scaling, self.clamp = tuple(deltas), float(scaling), clamp
        parameters = dict(self.called.model.named_parameters())
        left_out = re.compile(exclude) if exclude else None
        names = []
        for name in next(iter(deltas.values())):
            if left_out and left_out.search(name):
                continue
            if name not in parameters:
                if buffers == "mean":
                    self._shift_buffer(name, torch.stack([delta[name] for delta in deltas.values()]).mean(0))
                continue
            updates = torch.stack([delta[name].to(parameters[name].device) for delta in deltas.values()])
            if updates.shape[1:] != parameters[name].shape:
                raise ValueError(
                    f"deltas: {name!r} is {tuple(updates.shape[1:])}, the base has {tuple(parameters[name].shape)}"
                )
            if bool(updates.any()):
                self.register_buffer(f"update_{len(names)}", updates, persistent=False)
                names.append(name)
        if not names:
            raise ValueError("deltas: all are zero, or nothing is left to merge; are these the experts of this base?")
        self.names = tuple(names)
        shape = (len(deltas), len(names)) if coefficients == "tensor" else (len(deltas), 1)
        start = torch.full(shape, self.scaling, device=parameters[names[0]].device)
        self.coefficients = nn.Parameter(start, requires_grad=coefficients != "fixed")

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the tensors that are merged, by name."""
        return {name: self.updates(name).shape[1:] for name in self.names}

    def updates(self, name: str) -> Float[Tensor, "t ..."]:
        """The update of every task of a tensor."""
        return self.get_buffer(f"update_{self.names.index(name)}")

    @torch.no_grad()
    def reset_coefficients(self) -> None:
        """All coefficients back to where they start."""
        self.coefficients.fill_(self.scaling)

    def used_coefficients(self) -> Float[Tensor, "t k"]:
        """The coefficients as they are used: cut to [0, 1] where `clamp` is set."""
        return self.coefficients.clamp(0, 1) if self.clamp else self.coefficients

    def weights(
        self, masks: Mapping[str, Tensor] | None = None, rates: Float[Tensor, "t k"] | None = None
    ) -> dict[str, Tensor]:
        """Name → merged tensor; `masks` are of the shapes of the tensors, one for all tasks; `rates` in place of λ."""
        rates = self.used_coefficients() if rates is None else rates
        found = {}
        for number, name in enumerate(self.names):
            updates = self.get_buffer(f"update_{number}")
            rate = rates[:, number if rates.shape[1] > 1 else 0].to(updates.dtype)
            change = torch.tensordot(rate, updates, 1)
            if masks is not None:
                change = change * masks[name]
            base = self.called.model.get_parameter(name)
            found[name] = (base.to(change.dtype) + change).to(base.dtype)
        return found

    def forward(self, batch: Any, weights: Mapping[str, Tensor] | None = None) -> Any:
        """What the merged model gives for a batch; `weights` of an earlier call of `weights()` save the merging."""
        weights = self.weights() if weights is None else weights
        return functional_call(self.called, {f"model.{name}": value for name, value in weights.items()}, (batch,))

    @torch.no_grad()
    def unloaded(
        self, masks: Mapping[str, Tensor] | None = None, rates: Float[Tensor, "t k"] | None = None
    ) -> nn.Module:
        """An ordinary copy of the base, in evaluation mode, with the merged weights in it."""
        model = copy.deepcopy(self.called.model)
        for name, value in self.weights(masks, rates).items():
            model.get_parameter(name).copy_(value)
        return model.requires_grad_(True)

    def _shift_buffer(self, name: str, change: Tensor) -> None:
        buffer = self.called.model.get_buffer(name)
        buffer.copy_((buffer.to(change.dtype) + change.to(buffer.device)).to(buffer.dtype))


class _Called(nn.Module):
    """A model as it is used, so that a function of it sees the merged weights too."""

    def __init__(self, model: nn.Module, forward_fn: Callable[[nn.Module, Any], Any] | None) -> None:
        super().__init__()
        self.model, self.forward_fn = model, forward_fn

    def forward(self, batch: Any) -> Any:
        return self.model(batch) if self.forward_fn is None else self.forward_fn(self.model, batch)
