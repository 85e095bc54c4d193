"""Coordinate subspaces against the dense ones, blocks against their matrices."""

import numpy as np
import pytest
import torch

from subspan.geometry import Blocks, CoordinateSubspace, SoftSubspace, Subspace
from subspan.geometry.grassmann import random_basis


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def turn(d, seed=0):
    return random_basis(d, d, generator=torch.Generator().manual_seed(seed))


def test_a_set_of_coordinates_does_what_its_basis_does():
    sets = CoordinateSubspace.of([5, 0, 3], 7), CoordinateSubspace.of([3, 1, 5, 6], 7)
    dense = [part.to_subspace() for part in sets]
    x = draw(4, 7)
    for part, basis in zip(sets, dense):
        for name in ("project", "residual", "coordinates"):
            assert torch.equal(getattr(part, name)(x), getattr(basis, name)(x))
        assert torch.equal(part.embed(part.coordinates(x)), part.project(x))
        assert part.complement().to_subspace().overlap(basis) == 0
    assert sets[0].union(sets[1]).indices.tolist() == [0, 1, 3, 5, 6]
    assert sets[0].union(sets[1]).dim == dense[0].union(dense[1]).dim
    assert sets[0].intersection(sets[1]).indices.tolist() == [3, 5]
    assert sets[0].intersection(CoordinateSubspace.of([1], 7)) is None
    assert float(sets[0].overlap(sets[1])) == pytest.approx(float(dense[0].overlap(dense[1]))) == 2 / 3
    other = Subspace.random(7, 2)
    assert float(sets[0].overlap(other)) == pytest.approx(float(dense[0].overlap(other)))


def test_coordinates_keep_kind_dtype_and_gradient():
    part = CoordinateSubspace.of(np.array([True, False, True]))
    assert isinstance(part.project(np.ones((2, 3), np.float32)), np.ndarray)
    assert part.project(np.ones((2, 3), np.float32)).dtype == np.float32
    x = draw(2, 3, dtype=torch.float32).requires_grad_()
    part.embed(part.coordinates(x)).sum().backward()
    assert torch.equal(x.grad, part.mask.float().expand(2, 3))


@pytest.mark.parametrize(
    ("chosen", "d", "message"),
    [
        ([], 3, "at least one"), ([1, 1], 3, "without repetition"), ([0, 3], 3, r"\[0, 2\]"), ([-1], 3, r"\[0, 2\]"),
        ([1], None, "ambient_dim"), ([True, False], 3, "3 entries"), ([0.5], 3, "integers"),
    ],
)  # fmt: skip
def test_wrong_sets_of_coordinates_are_refused(chosen, d, message):
    chosen = torch.tensor(chosen) if chosen else torch.zeros(0, dtype=torch.int64)
    with pytest.raises((ValueError, TypeError), match=message):
        CoordinateSubspace.of(chosen, d)


def test_soft_weights_harden_to_what_was_planted():
    planted = CoordinateSubspace.of([1, 4, 5], 8)
    weights = torch.where(planted.mask, 0.9, 0.1).double() + 0.01 * torch.arange(8)
    soft = SoftSubspace(weights)
    for found in (soft.harden(), soft.harden(top_k=3)):
        assert torch.equal(found.indices, planted.indices)
    assert torch.equal(SoftSubspace(torch.ones(5)).harden(top_k=2).indices, torch.tensor([0, 1]))
    assert float(SoftSubspace(0.3 * planted.mask.double()).effective_dim) == pytest.approx(3)
    q, x = turn(8), draw(3, 8)
    turned = SoftSubspace(weights, q)
    torch.testing.assert_close(turned.scale(x), x @ q @ weights.diag() @ q.mT)
    torch.testing.assert_close(soft.scale(x), x * weights)
    assert turned.harden().distance(Subspace(q[:, planted.indices])) < 1e-7
    # A projection is what is left of the weights once they are hard.
    torch.testing.assert_close(SoftSubspace(planted.mask.double()).scale(x), planted.project(x))


def test_a_batch_of_soft_subspaces_hardens_member_by_member():
    soft = SoftSubspace.from_logits(torch.tensor([[3.0, -1.0, 2.0], [-4.0, -2.0, 1.0]]))
    assert [gate.harden().indices.tolist() for gate in soft] == [[0, 2], [2]]
    assert soft.hard_mask(top_k=1).tolist() == [[True, False, False], [False, False, True]]
    with pytest.raises(ValueError, match="batch"):
        soft.harden()
    with pytest.raises(ValueError, match=r"exceeds 0\.99"):
        soft[0].harden(threshold=0.99)
    with pytest.raises(ValueError, match="weights"):
        SoftSubspace(torch.tensor([0.5, float("nan")]))
    with pytest.raises(ValueError, match="top_k"):
        soft.hard_mask(top_k=4)


LAYOUTS = [
    Blocks({"s": 3, "a": 2, "b": 1}),
    Blocks({"s": 3, "a": 2, "b": 1}, torch.tensor([5, 0, 3, 1, 2, 4])),
    Blocks({"s": 3, "a": 2, "b": 1}, None, turn(6)),
    Blocks({"s": 3, "a": 2, "none": 0, "b": 1}, torch.tensor([5, 0, 3, 1, 2, 4]), turn(6)),
]


@pytest.mark.parametrize("blocks", LAYOUTS)
def test_blocks_are_a_direct_sum(blocks):
    x, donor = draw(4, 6), draw(4, 6, seed=1)
    torch.testing.assert_close(blocks.join(blocks.split(x)), x)
    torch.testing.assert_close(sum(blocks.project(x, name) for name in blocks.sizes), x)
    for name in ("s", "a", "b"):
        torch.testing.assert_close(blocks.project(x, name), blocks.subspace(name).project(x))
        rest = [other for other in blocks.sizes if other != name]
        assert float((blocks.project(x, name) * blocks.project(donor, *rest)).sum(-1).abs().max()) < 1e-12
    swapped = blocks.swap(x, donor, "a", "b")
    for name, whose in (("s", x), ("a", donor), ("b", donor)):
        torch.testing.assert_close(blocks.coordinates(swapped, name), blocks.coordinates(whose, name))
    torch.testing.assert_close(blocks.swap(swapped, x, "a", "b"), x)
    torch.testing.assert_close(blocks.coordinates(x, "b", "a"), blocks.coordinates(x)[..., [5, 3, 4]])


@pytest.mark.parametrize("blocks", LAYOUTS)
def test_blocks_divide_and_merge_without_moving_a_coordinate(blocks):
    x = draw(4, 6)
    finer = blocks.divide("s", {"new": [2, 0], "old": [1]})
    assert list(finer.sizes)[:2] == ["new", "old"]
    torch.testing.assert_close(finer.coordinates(x, "new", "old"), blocks.coordinates(x, "s")[..., [2, 0, 1]])
    torch.testing.assert_close(finer.coordinates(x, "a"), blocks.coordinates(x, "a"))
    torch.testing.assert_close(finer.merge(["b", "old", "new"], "t").project(x, "t"), blocks.project(x, "s", "b"))
    assert next(iter(finer.merge(["b", "old", "new"], "t").sizes)) == "t"
    same = blocks.divide("s", {"two": 2, "one": 1})
    torch.testing.assert_close(same.coordinates(x), blocks.coordinates(x))
    plain = finer.contiguous()
    moved = x if blocks.rotation is not None else x[..., finer.indices()]
    assert plain.order is None
    for name in finer.sizes:
        torch.testing.assert_close(plain.coordinates(moved, name), finer.coordinates(x, name))


def test_rows_of_numpy_and_views_of_torch():
    blocks, x = LAYOUTS[0], draw(4, 6)
    assert blocks.coordinates(x, "a").data_ptr() == x[:, 3:].data_ptr()
    assert all(isinstance(part, np.ndarray) for part in blocks.split(x.numpy()).values())
    np.testing.assert_array_equal(blocks.join(blocks.split(x.numpy())), x.numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.places("c"), "no block 'c'"),
        (lambda b: Blocks({"a": -1, "b": 2}), "whole numbers"),
        (lambda b: Blocks({"a": 0}), "empty"),
        (lambda b: Blocks({"a": 2}, torch.tensor([0, 0])), "once"),
        (lambda b: Blocks({"a": 2}, None, torch.eye(3)), "2 rows"),
        (lambda b: Blocks({"a": 2}, None, torch.ones(2, 2)), "orthonormal"),
        (lambda b: Blocks({"a": 2, "none": 0}).subspace("none"), "'none' is empty"),
        (lambda b: b.divide("s", {"x": [0, 1], "y": [1]}), "once"),
        (lambda b: b.divide("s", {"x": 1, "y": 1}), "3 places"),
        (lambda b: b.divide("s", {"a": 3}), "another block"),
        (lambda b: b.merge(["s", "s"], "t"), "different"),
        (lambda b: b.merge(["s", "a"], "b"), "another block"),
        (lambda b: b.join({"s": torch.ones(3)}), "parts"),
        (lambda b: b.swap(torch.ones(6), torch.ones(5), "s"), "donor"),
        (lambda b: b.swap(torch.ones(6), torch.ones(6)), "names"),
    ],
)
def test_wrong_blocks_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(LAYOUTS[0])
