"""Activation checkpointing: parts of a model that run again in the backward pass, and hooks on them."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils import checkpoint


def is_recomputing() -> bool:
    """Whether a backward pass is going on, in which checkpointed parts of a model run a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_detached() -> bool:
    """Whether what runs now is the first run of re-entrant checkpointing, whose results have no gradients."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is checkpoint.CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def is_to_be_recomputed() -> bool:
    """Whether results of what runs now are not kept for the backward pass, by checkpointing that is not re-entrant."""
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    return hooks is not None and hooks[0].__module__ == checkpoint.__name__


class Recomputation:
    """Counts what hooks gave to checkpointed layers and these have still to be given again, in the backward pass."""

    def __init__(self) -> None:
        self.with_gradient = False
        self._pending = 0

    def watched(self, states: Tensor) -> Tensor:
        """States that a hook gives to a layer."""
        if is_recomputing():
            # The other kind tells by its gradients: it may stop before this layer.
            self._pending -= not is_to_be_recomputed()
        elif self.with_gradient and is_detached():
            self._pending += 1
        elif states.requires_grad and is_to_be_recomputed():
            self._pending += 1
            states.register_hook(self._passed)
        return states

    def check(self) -> None:
        """Raise ValueError where some have not been."""
        if self._pending > 0:
            raise ValueError(
                "layers: some run under activation checkpointing, and again in the backward pass; run that within the "
                "block too, or use torch.no_grad() where no gradients are needed"
            )

    def _passed(self, _: Tensor) -> None:
        self._pending -= 1
