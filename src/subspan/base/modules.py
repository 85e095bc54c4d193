"""Modes of someone's torch modules, changed for a while or no more than is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; every module's own training flag is put back after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def release(module: nn.Module) -> nn.Module:
    """Let a frozen module be trained; one of which only parts are frozen stays as it is, since they are on purpose."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.requires_grad_(True)
    return module
