"""Someone's torch modules: modes changed for a while or no more than is needed, and answers block by block."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn


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


@torch.no_grad()
def applied(module: nn.Module, rows: Tensor, method: str = "__call__", *, size: int = 8192) -> Tensor:
    """What a module in evaluation mode makes of rows, in the digits and on the device of the rows, `size` at a time."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    # A copy in double precision where the rows are: the answer for a row must not depend on its block.
    module = copy.deepcopy(module).to(rows.device, wide)
    return torch.cat([getattr(module, method)(block.to(wide)) for block in rows.split(size)]).to(rows.dtype)
