"""Butterfly factorisations."""

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch

from subspan.nn import Butterfly, butterfly_factorize, butterfly_multiply, butterfly_products
from subspan.nn.butterfly import (
    circulant,
    dct,
    fft,
    hadamard,
    ifft,
    recover_convolution,
    recover_dct,
)
from subspan.nn.butterfly_factors import bit_reversal


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_product(twiddle, increasing=True):
    """The levels as full matrices, entry by entry."""
    levels, half = twiddle.shape[:2]
    product = torch.eye(2 * half, dtype=twiddle.dtype)
    for level in range(levels) if increasing else reversed(range(levels)):
        stride, matrix = 1 << level, torch.zeros(2 * half, 2 * half, dtype=twiddle.dtype)
        for pair in range(half):
            i = pair // stride * 2 * stride + pair % stride
            matrix[[i, i, i + stride, i + stride], [i, i + stride, i, i + stride]] = twiddle[level, pair].flatten()
        product = matrix @ product
    return product


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_levels_are_the_product_of_sparse_matrices_and_their_gradients_are_right(increasing, dtype):
    twiddle, x = gaussian(3, 4, 2, 2, dtype=dtype), gaussian(2, 8, seed=1, dtype=dtype)
    expected = x @ dense_product(twiddle, increasing).mT
    torch.testing.assert_close(butterfly_multiply(twiddle, x, increasing=increasing), expected)
    inputs = (twiddle.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda t, z: butterfly_multiply(t, z, increasing=increasing), inputs)


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("levels", "most"), [(1, 5), (5, 2), (5, 5), (7, 5)])
def test_levels_multiplied_out_to_blocks_are_the_same_map_with_the_same_gradients(
    increasing, dtype, levels, most, monkeypatch
):
    monkeypatch.setattr(butterfly_products, "_MOST_LEVELS", most)
    n = 1 << levels
    twiddle, x = gaussian(2, levels, n // 2, 2, 2, dtype=dtype), gaussian(3, 11, 2, n, seed=1, dtype=dtype)
    dense = torch.stack([dense_product(each, increasing) for each in twiddle])
    inputs = (twiddle.requires_grad_(), x.requires_grad_())
    found = butterfly_multiply(*inputs, increasing=increasing)
    torch.testing.assert_close(found, (dense @ x.unsqueeze(-1)).squeeze(-1))
    weight = gaussian(*x.shape, seed=2, dtype=dtype)
    monkeypatch.setattr(butterfly_products, "_MANY_ROWS", 100)
    gradients = [
        torch.autograd.grad((result * weight).abs().square().sum(), inputs)
        for result in (found, butterfly_multiply(*inputs, increasing=increasing))
    ]
    for blocks, each in zip(*gradients, strict=True):
        torch.testing.assert_close(blocks, each, rtol=1e-10, atol=1e-10 * float(each.abs().max()))
    # Of frozen twiddles, and of rows that are data.
    monkeypatch.setattr(butterfly_products, "_MANY_ROWS", 1)
    for i in range(2):
        alone = [each if i == j else each.detach() for j, each in enumerate(inputs)]
        loss = (butterfly_multiply(*alone, increasing=increasing) * weight).abs().square().sum()
        torch.testing.assert_close(torch.autograd.grad(loss, inputs[i])[0], gradients[0][i])


def test_many_rows_keep_their_input_alone():
    twiddle, x = gaussian(6, 32, 2, 2).requires_grad_(), gaussian(40, 64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        butterfly_multiply(twiddle, x)
    assert sum(t.numel() for t in kept) == twiddle.numel() + x.numel()
    with torch.autocast("cpu", torch.bfloat16):
        low = butterfly_multiply(twiddle.float(), x.float())
    torch.testing.assert_close(low, butterfly_multiply(twiddle.float(), x.float()))


@pytest.mark.parametrize("n", [2, 8, 64])
def test_known_transforms(n):
    x = gaussian(3, n, dtype=torch.float32)
    torch.testing.assert_close(fft(n)(x), torch.fft.fft(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ifft(n)(fft(n)(x)).real, x, atol=1e-5, rtol=1e-4)
    assert np.allclose(dct(n)(x).detach(), scipy.fft.dct(x.numpy()), atol=1e-4)
    torch.testing.assert_close(hadamard(n).to_dense(), torch.tensor(scipy.linalg.hadamard(n), dtype=torch.float32))
    column = gaussian(n, seed=3)
    matrix = torch.tensor(scipy.linalg.circulant(column.numpy()))
    torch.testing.assert_close(circulant(column).to_dense().double(), matrix, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [2, 16, 256])
def test_peeling_recovers_what_is_a_butterfly_to_rounding(n):
    eye = torch.eye(n, dtype=torch.complex128)
    assert butterfly_factorize(torch.fft.fft(eye)).relative_error < 1e-12
    assert butterfly_factorize((1 + 1j) * torch.fft.fft(eye)).relative_error < 1e-12
    sylvester = torch.tensor(scipy.linalg.hadamard(n), dtype=torch.float64)
    assert butterfly_factorize(sylvester, "identity").relative_error < 1e-12
    levels = n.bit_length() - 1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    planted = dense_product(gaussian(levels, n // 2, 2, 2)) if n < 100 else None
    if planted is not None:
        found = butterfly_factorize(planted[:, order.argsort()], order)
        assert found.relative_error < 1e-10
        torch.testing.assert_close(found.to_dense(), planted[:, order.argsort()], atol=1e-8, rtol=1e-8)
    layer, error = recover_dct(torch.tensor(scipy.fft.dct(np.eye(n), axis=0, norm="ortho")))
    assert error < 1e-12
    x = gaussian(2, n, dtype=torch.float32)
    assert np.allclose(layer(x).detach(), scipy.fft.dct(x.numpy(), norm="ortho"), atol=1e-4)
    matrix = torch.tensor(scipy.linalg.circulant(gaussian(n).numpy()))
    layer, error = recover_convolution(matrix)
    assert error < 1e-12
    torch.testing.assert_close(layer(x).double(), x.double() @ matrix.mT, atol=1e-3, rtol=1e-3)


def test_a_dense_matrix_is_projected_and_little_of_it_stays():
    matrix = gaussian(64, 64)
    found = butterfly_factorize(matrix)
    assert 0.5 < found.relative_error < 1
    error = torch.linalg.norm(found.to_dense() - matrix) / torch.linalg.norm(matrix)
    assert found.relative_error == pytest.approx(float(error), abs=1e-12)
    with pytest.warns(UserWarning, match="of its norm away"):
        layer = Butterfly.from_matrix(gaussian(20, 12, dtype=torch.float32), gaussian(20, dtype=torch.float32))
    assert layer.to_dense().shape == (20, 12)
    torch.testing.assert_close(layer.bias.detach(), gaussian(20, dtype=torch.float32))
    exact = Butterfly.from_matrix(hadamard(16).to_dense()[:, bit_reversal(16)], permutation=bit_reversal(16).argsort())
    torch.testing.assert_close(exact.to_dense(), hadamard(16).to_dense()[:, bit_reversal(16)])


OPTIONS = [
    {},
    {"tied": True},
    {"blocks": 2, "permutation": "bit-reversal"},
    {"blocks": 2, "increasing": (False, True), "init": "randn"},
    {"complex": True, "real_part": True},
    {"complex": True, "init": "randn"},
    {"constraint": "orthogonal"},
    {"complex": True, "constraint": "unitary"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("width", "out"), [(8, 8), (6, 19), (1, 1), (12, 3)])
def test_a_layer_is_its_dense_matrix(options, width, out):
    layer = Butterfly(width, out, generator=torch.Generator().manual_seed(0), **options)
    x = gaussian(2, 3, width, dtype=torch.float32)
    dense = layer.to_dense()
    assert dense.shape == (out, width)
    torch.testing.assert_close(layer(x), x.to(dense.dtype) @ dense.mT + layer.bias, atol=1e-5, rtol=1e-4)


def test_sizes():
    assert Butterfly(64, 64, bias=False).factors.numel() == 2 * 64 * 6
    assert Butterfly(64, 64, bias=False, tied=True).factors.numel() == 4 * 63
    assert Butterfly(64, 64, bias=False, constraint="orthogonal").factors.numel() == 32 * 6
    for init in ("ortho", "randn"):
        squares = Butterfly(256, 256, init=init, generator=torch.Generator().manual_seed(0)).to_dense().square().sum()
        assert float(squares) / 256 == pytest.approx(1, rel=0.4)


@pytest.mark.parametrize("constraint", ["orthogonal", "unitary"])
def test_constraints_hold_through_training_and_inverses_undo(constraint):
    layer = Butterfly(16, 16, complex=constraint == "unitary", constraint=constraint)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x, y = gaussian(32, 16, dtype=torch.float32), gaussian(32, 16, seed=1, dtype=torch.float32)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - y).abs().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    dense = layer.to_dense()
    assert float((dense.mH @ dense - torch.eye(16)).abs().max()) < 1e-6
    torch.testing.assert_close(layer.inverse(layer(x)).real, x, atol=1e-5, rtol=0)
    free = Butterfly(8, 8, blocks=2, permutation="bit-reversal", increasing=(True, False))
    torch.testing.assert_close(free.inverse(free(x[:, :8])), x[:, :8], atol=1e-4, rtol=0)


@pytest.mark.parametrize("complex_", [False, True])
def test_random_starts_keep_lengths_on_average_or_exactly(complex_):
    generator = torch.Generator().manual_seed(0)
    starts = {
        init: Butterfly(512, 512, False, complex=complex_, init=init, generator=generator)
        .twiddle.detach()
        .flatten(0, 3)
        for init in ("randn", "ortho", "identity")
    }
    eye = torch.eye(2, dtype=starts["ortho"].dtype)
    gram = starts["randn"].mH @ starts["randn"]
    torch.testing.assert_close(gram.mean(0), eye, atol=0.08, rtol=0)
    assert float((gram - eye).abs().mean()) > 0.3
    torch.testing.assert_close(starts["ortho"].mH @ starts["ortho"], eye.expand(len(starts["ortho"]), -1, -1))
    # Of Haar's measure: half rotations and half reflections, or a share of the first entry that is uniform.
    angles = starts["ortho"][:, 0, 0]
    if complex_:
        share = angles.abs().square()
        assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
        assert float(share.var()) == pytest.approx(1 / 12, abs=0.01)
        for phase in (starts["ortho"][:, 0, 0], starts["ortho"][:, 0, 1], torch.linalg.det(starts["ortho"])):
            assert float((phase / phase.abs()).mean().abs()) < 0.08
        again = Butterfly(512, 512, False, complex=True, constraint="unitary", generator=generator).twiddle.detach()
        share = again[..., 0, 0].abs().square()
        assert float(share.var()) == pytest.approx(1 / 12, abs=0.01)
        assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
    else:
        assert float(angles.mean().abs()) < 0.05
        assert float(angles.square().mean()) == pytest.approx(0.5, abs=0.03)
        assert float((torch.linalg.det(starts["ortho"]) > 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(starts["identity"], eye.expand(len(starts["identity"]), -1, -1))


def test_refuses_bad_input():
    with pytest.raises(ValueError, match="power of two from 2, got 12"):
        fft(12)
    with pytest.raises(ValueError, match="power of two"):
        butterfly_factorize(torch.eye(6))
    with pytest.raises(ValueError, match="NaN"):
        butterfly_factorize(torch.full((4, 4), torch.nan))
    with pytest.raises(ValueError, match="expected 8 columns for 3 levels, got 7"):
        butterfly_multiply(torch.zeros(3, 4, 2, 2), torch.zeros(2, 7))
    layer = Butterfly(8, 8)
    with pytest.raises(ValueError, match="expected 8 columns, got 7"):
        layer(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="is complex"):
        layer(torch.zeros(2, 8, dtype=torch.complex64))
    with pytest.raises(ValueError, match="has an inverse"):
        Butterfly(6, 6).inverse(torch.zeros(1, 6))
    with torch.no_grad():
        layer.factors[0, 0, 5] = 0
    with pytest.raises(ValueError, match="block 0, level 1, pair 1 is singular"):
        layer.inverse(torch.zeros(1, 8))
    for options, match in [
        ({"init": "x"}, "init"),
        ({"constraint": "x"}, "constraint"),
        ({"constraint": "unitary"}, "needs complex=True"),
        ({"real_part": True}, "real_part"),
        ({"blocks": 2, "increasing": [True]}, "increasing"),
        ({"permutation": torch.zeros(8, dtype=torch.long)}, "permutation"),
        ({"permutation": "x"}, "permutation"),
    ]:
        with pytest.raises(ValueError, match=match):
            Butterfly(8, 8, **options)
