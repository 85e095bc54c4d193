"""Products with butterfly matrices: level by level, or a few levels at a time multiplied out to blocks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

# Blocks are worth making for so many rows, and above 2^5 they cost more multiplications than they save passes.
_MANY_ROWS = 32
_MOST_LEVELS = 5


def butterfly_multiply(
    twiddle: Inexact[Tensor, "*s levels half 2 2"], x: Inexact[Tensor, "*n d"], *, increasing: bool = True
) -> Inexact[Tensor, "*m"]:
    """Rows x (…, N) → B x, B the product of log₂ N levels, O(N log N).

    Level l mixes the pairs (i, i + 2^l) by the 2 x 2 matrices twiddle[l], in the order of the pairs. From 32 rows on,
    up to five levels at a time are multiplied out, to blocks of 32 x 32 that pass over the rows once. Their gradient
    goes through them again, so that the input alone is kept.

    Parameters
    ----------
    twiddle
        (…, log₂ N, N/2, 2, 2). Twiddles of several matrices (*s, …) go with rows (…, *s, N).
    x
        Rows (…, N), real or complex.
    increasing
        Whether the level of stride 1 comes first; otherwise last.

    Returns
    -------
    Tensor (…, *s, N), in the wider of the two dtypes.

    Raises
    ------
    ValueError
        Where x has not 2^levels columns.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import butterfly_multiply
    >>> hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).expand(2, 2, 2, 2)
    >>> butterfly_multiply(hadamard, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([10., -2., -4.,  0.])
    """
    levels = twiddle.shape[-4]
    if x.shape[-1] != 1 << levels:
        raise ValueError(f"x: expected {1 << levels} columns for {levels} levels, got {x.shape[-1]}")
    dtype = torch.promote_types(twiddle.dtype, x.dtype)
    twiddle, x = twiddle.to(dtype), x.to(dtype)
    stacks = twiddle.shape[:-4]
    x = x.expand(torch.broadcast_shapes(x.shape[:-1], stacks) + x.shape[-1:])
    # A graph is to hold for any number of rows.
    if (
        torch.compiler.is_compiling()
        or torch.onnx.is_in_onnx_export()
        or x.shape[: x.ndim - 1 - len(stacks)].numel() < _MANY_ROWS
    ):
        each = twiddle.unbind(-4)
        for level in range(levels) if increasing else reversed(range(levels)):
            x = _level(each[level], x, level)
        return x
    shape, count = x.shape, stacks.numel()
    columns = x.reshape(-1, count, shape[-1]).permute(1, 2, 0)
    with torch.autocast(x.device.type, enabled=False):
        columns = _Blocks.apply(twiddle.reshape(count, *twiddle.shape[-4:]), columns, increasing)
    return columns.permute(2, 0, 1).reshape(shape)  # pyright: ignore[reportOptionalMemberAccess]


def _level(twiddle: Tensor, x: Tensor, level: int) -> Tensor:
    aa, ab, ba, bb = twiddle.flatten(-2).unflatten(-2, (-1, 1 << level)).unbind(-1)
    a, b = x.unflatten(-1, (-1, 2, 1 << level)).unbind(-2)
    return torch.stack([aa * a + ab * b, ba * a + bb * b], -2).flatten(-3)


def _stages(levels: int, increasing: bool) -> list[tuple[int, int]]:
    """First level and number of levels of what is multiplied out together, in the order of application."""
    count = -(-levels // _MOST_LEVELS)
    bounds = [levels * i // count for i in range(count + 1)]
    stages = [(first, last - first) for first, last in pairwise(bounds)]
    return stages if increasing else stages[::-1]


def _block(twiddle: Tensor, first: int, count: int, increasing: bool) -> Tensor:
    """R = 2^count: levels of (s, levels, N/2, 2, 2) from `first` on, multiplied out to (s, group, 2^first, R, R)."""
    stride, radix = 1 << first, 1 << count
    part = twiddle[:, first : first + count].unflatten(2, (-1, radix // 2, stride))
    part = part if increasing else part.mT
    # (level, pair, out, in, all that the blocks differ in): the last is long, so that products run along it.
    part = part.permute(1, 3, 5, 6, 0, 2, 4).contiguous()
    product = part[0]
    for level in range(1, count):
        # [[D00, D01], [D10, D11]] diag(M0, M1) = [[D00 M0, D01 M1], [D10 M0, D11 M1]], every D diagonal.
        diagonals = part[level].unflatten(0, (-1, 1 << level)).transpose(1, 2).unsqueeze(4)
        halves = product.unflatten(0, (-1, 1, 2)).transpose(2, 3)
        product = (diagonals * halves).flatten(3, 4).flatten(1, 2)
    block = product[0].permute(2, 3, 4, 0, 1).contiguous()
    return block if increasing else block.mT


def _grouped(columns: Tensor, block: Tensor) -> Tensor:
    """Columns (s, N, n) → (s, group, offset, R, n), which a block multiplies from the left; `_ungrouped` undoes it."""
    return columns.unflatten(1, (block.shape[1], block.shape[-1], block.shape[2])).transpose(2, 3)


def _ungrouped(columns: Tensor) -> Tensor:
    return columns.transpose(2, 3).flatten(1, 3)


class _Blocks(torch.autograd.Function):
    """All levels, as a few blocks; these and the results between are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, twiddle: Tensor, columns: Tensor, increasing: bool) -> Tensor:
        ctx.save_for_backward(twiddle, columns)
        ctx.increasing = increasing
        for first, count in _stages(twiddle.shape[1], increasing):
            block = _block(twiddle, first, count, increasing)
            columns = _ungrouped(block @ _grouped(columns, block))
        return columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        twiddle, columns = ctx.saved_tensors
        source = twiddle.detach().requires_grad_()
        with torch.enable_grad():
            products = [_block(source, *stage, ctx.increasing) for stage in _stages(twiddle.shape[1], ctx.increasing)]
        blocks, inputs = [product.detach() for product in products], [columns]
        for block in blocks[:-1]:
            inputs.append(_ungrouped(block @ _grouped(inputs[-1], block)))
        grad, found = grads[0], []
        for stage in reversed(range(len(blocks))):
            block = blocks[stage]
            grad = _grouped(grad, block)
            found.append(grad @ _grouped(inputs[stage], block).mH)
            if stage or ctx.needs_input_grad[1]:
                grad = _ungrouped(block.mH @ grad)
        found = torch.autograd.grad(products, source, found[::-1])[0]
        return found, grad if ctx.needs_input_grad[1] else None, None
