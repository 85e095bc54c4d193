"""Small whole numbers in as many bits as they take, row by row."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor


def pack_bits(x: Int[Tensor, "n m"], width: int) -> UInt8[Tensor, "n b"]:
    """Numbers of `width` bits each, the lowest bit first, every row filled up to whole bytes."""
    bits = (x.cpu().numpy()[:, :, None] >> np.arange(width)) & 1
    return torch.from_numpy(np.packbits(bits.astype(np.uint8).reshape(len(x), -1), axis=1, bitorder="little"))


def unpack_bits(packed: UInt8[Tensor, "n b"], width: int, count: int) -> Int[Tensor, "n m"]:
    """The first `count` numbers of each row that `pack_bits` packed. Raises ValueError where bytes do not fit."""
    if packed.shape[1] != -(-count * width // 8):
        raise ValueError(f"{packed.shape[1]} bytes a row are not {count} numbers of {width} bits")
    bits = np.unpackbits(packed.cpu().numpy(), axis=1, bitorder="little")
    if bits[:, count * width :].any():
        raise ValueError("bits beyond the last number are set")
    numbers = bits[:, : count * width].reshape(len(packed), count, width)
    return torch.from_numpy(numbers.astype(np.int64) @ (1 << np.arange(width)))
