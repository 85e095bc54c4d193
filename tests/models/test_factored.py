"""Layers whose weight is a product: equal to the dense layer, counted, put in, taken out, kept in files."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from subspan.models import LowRankLinear, SparseDictLinear, load_factored, save_factored
from subspan.models.surgery import multiply_adds, replace

D_IN, ATOMS, D_OUT, S = 6, 5, 9, 3


def sparse(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(ATOMS, generator=generator)[:S].sort().values for _ in range(D_OUT)])
    dictionary, values = torch.randn(D_IN, ATOMS, generator=generator), torch.randn(D_OUT, S, generator=generator)
    return SparseDictLinear(
        dictionary.to(dtype), indices, values.to(dtype), torch.randn(D_OUT, generator=generator).to(dtype)
    )


def low_rank(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(D_OUT, 2, generator=generator), torch.randn(2, D_IN, generator=generator)
    return LowRankLinear(up.to(dtype), down.to(dtype))


@pytest.mark.parametrize("make", [sparse, low_rank])
def test_they_are_the_dense_layer_and_so_are_their_gradients(make):
    layer, x = make(torch.float64), torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)
    weight = layer.to_dense()
    assert weight.shape == layer.shape == (D_OUT, D_IN)
    expected = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    worth = torch.randn_like(expected)
    inputs = [x, *layer.parameters()]
    found, wanted = (torch.autograd.grad((y * worth).sum(), inputs, retain_graph=True) for y in (layer(x), expected))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)
    half = make(torch.bfloat16)
    torch.testing.assert_close(half(x.detach().bfloat16()).double(), expected.detach(), atol=0.2, rtol=0.05)
    assert multiply_adds(layer, x[0, 0].detach()[None]) == sum(
        p.numel() for n, p in layer.named_parameters() if n != "bias"
    )


def test_each_output_reads_its_atoms_alone():
    layer = sparse()
    codes = layer.codes()
    assert codes.shape == (ATOMS, D_OUT)
    assert torch.equal((codes != 0).sum(0), torch.full((D_OUT,), S))
    assert torch.equal(codes.gather(0, layer.indices.long().mT), layer.values.mT)


def test_bits_are_counted_to_the_last_one():
    layer = sparse()
    # Of 5 atoms a mask is shorter than three indices of three bits.
    assert layer.bits() == 16 * (D_IN * ATOMS + D_OUT) + 16 * D_OUT * S + ATOMS * D_OUT
    assert layer.bits(code_bits=14) == layer.bits() - 2 * D_OUT * S
    one = SparseDictLinear(torch.eye(5), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1))
    assert one.bits(32) == 32 * (25 + 4) + 4 * 3
    assert low_rank().bits(8) == 8 * 2 * (D_IN + D_OUT)


def test_truncated_singular_values_are_the_nearest_of_a_rank():
    torch.manual_seed(0)
    linear = nn.Linear(D_IN, D_OUT)
    layer = LowRankLinear.from_linear(linear, 2)
    error = torch.linalg.matrix_norm(layer.to_dense() - linear.weight)
    torch.testing.assert_close(error, torch.linalg.svdvals(linear.weight)[2:].norm())
    x = torch.randn(4, D_IN)
    torch.testing.assert_close(LowRankLinear.from_linear(linear, D_IN)(x), linear(x), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="rank"):
        LowRankLinear.from_linear(linear, D_IN + 1)


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, D_IN), nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, 2))


def test_put_in_saved_loaded_and_taken_out(tmp_path):
    network, x = model(), torch.randn(3, 4)
    before = network(x)
    surgery = replace(network, {"1": sparse(), "2": lambda layer: LowRankLinear.from_linear(layer, 1)}, x)
    after = network(x)
    assert [site.new_parameters for site in surgery.sites] == [D_IN * ATOMS + D_OUT * S + D_OUT, D_OUT + 2 + 2]
    save_factored(network, tmp_path / "layers.safetensors")
    assert torch.equal(surgery.undo()(x), before)
    other = model()
    loaded = load_factored(other, tmp_path / "layers.safetensors")
    assert torch.equal(other(x), after)
    assert torch.equal(other[1].indices, sparse().indices)
    assert torch.equal(loaded.undo()(x), before)
    with pytest.raises(ValueError, match="no LowRankLinear"):
        save_factored(other, tmp_path / "none.safetensors")
    for wrong in (
        nn.Sequential(nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(1, 1), nn.Linear(D_OUT, D_IN), nn.Linear(D_OUT, 2)),
    ):
        with pytest.raises(ValueError, match="the model"):
            load_factored(wrong, tmp_path / "layers.safetensors")


@pytest.mark.parametrize(("atoms", "nonzero"), [(64, 32), (64, 3)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, None])
def test_a_file_is_as_large_as_the_bits_that_are_counted(tmp_path, atoms, nonzero, stored):
    generator = torch.Generator().manual_seed(0)
    dictionary, values = torch.randn(400, atoms, generator=generator), torch.randn(999, nonzero, generator=generator)
    if stored is not None:  # numbers that fit into the bits which are counted for them
        dictionary = dictionary.bfloat16().to(stored)
        values = (values.bfloat16().view(torch.int16) & ~3).view(torch.bfloat16).to(stored)
    indices = torch.rand(999, atoms, generator=generator).topk(nonzero).indices.sort().values
    layer = SparseDictLinear(dictionary, indices, values)
    save_factored(nn.Sequential(layer), tmp_path / "layers.safetensors")
    counted = layer.bits(32) if stored is None else layer.bits(16, code_bits=14)
    assert 1 <= 8 * (tmp_path / "layers.safetensors").stat().st_size / counted <= 1.05
    network = nn.Sequential(nn.Linear(400, 999))
    load_factored(network, tmp_path / "layers.safetensors")
    for name, value in layer.arrays().items():
        assert torch.equal(network[0].arrays()[name], value)
        assert network[0].arrays()[name].dtype == value.dtype


def test_shared_dictionaries_and_atoms_that_are_read_twice_are_stored_once(tmp_path):
    first, second = sparse(), sparse()
    second.indices[0] = second.indices[0, 0]
    second.dictionary = first.dictionary
    save_factored(nn.ModuleDict({"a": first, "b": second}), tmp_path / "layers.safetensors")
    assert sum(":dictionary" in name for name in load_file(tmp_path / "layers.safetensors")) == 1
    network = nn.ModuleDict({name: nn.Linear(D_IN, D_OUT) for name in "ab"})
    load_factored(network, tmp_path / "layers.safetensors")
    assert network["a"].dictionary is network["b"].dictionary
    assert len(set(network["b"].indices[0].tolist())) == S
    torch.testing.assert_close(network["b"].to_dense(), second.to_dense())


def test_bad_input_is_named():
    eye = torch.eye(3)
    for indices, values, named in (
        (torch.tensor([[0, 3]]), torch.ones(1, 2), "indices: must lie"),
        (torch.tensor([[0, -1]]), torch.ones(1, 2), "indices: must lie"),
        (torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0), "indices, values"),
    ):
        with pytest.raises(ValueError, match=named):
            SparseDictLinear(eye, indices, values)
