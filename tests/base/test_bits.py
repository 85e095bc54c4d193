"""Whole numbers in as many bits as they take."""

import pytest
import torch

from subspan.base.bits import pack_bits, unpack_bits


@pytest.mark.parametrize("width", [1, 5, 8, 14])
@pytest.mark.parametrize("count", [1, 13, 16])
def test_what_is_packed_comes_back_and_takes_whole_bytes_a_row(width, count):
    numbers = torch.randint(1 << width, (7, count), generator=torch.Generator().manual_seed(0))
    packed = pack_bits(numbers, width)
    assert packed.shape == (7, -(-width * count // 8))
    assert torch.equal(unpack_bits(packed, width, count), numbers)


def test_bytes_that_are_no_numbers_are_refused():
    packed = pack_bits(torch.tensor([[1, 2, 3]]), 5)
    for count in (1, 5):
        with pytest.raises(ValueError, match="2 bytes a row are not"):
            unpack_bits(packed, 5, count)
    with pytest.raises(ValueError, match="beyond the last"):
        unpack_bits(packed | 128, 5, 3)
