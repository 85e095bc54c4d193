"""White-box transformer layers."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch.nn import functional as F

from subspan.geometry import coding_rate
from subspan.geometry.grassmann import random_basis
from subspan.nn import (
    CRATE,
    ISTA,
    CRATEAutoencoder,
    CRATEDecoderLayer,
    CRATELayer,
    SubspaceSelfAttention,
    compression_gradient,
    compression_rate,
)


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bases(k=2, d=6, p=3, seed=1):
    whole = random_basis(d, k * p, generator=torch.Generator().manual_seed(seed))
    return whole.unflatten(1, (k, p)).movedim(1, 0)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_a_plain_loop_over_heads_and_tokens(causal):
    torch.manual_seed(0)
    layer = SubspaceSelfAttention(6, 2, causal=causal).double()
    z = tokens(5, 6)
    w = z @ layer.subspace_map.weight.mT
    heads = []
    for part in w.split(3, 1):
        rows = []
        for t in range(5):
            seen = part[: t + 1] if causal else part
            weights = torch.exp(seen @ part[t] / math.sqrt(3))
            rows.append((weights / weights.sum()) @ seen)
        heads.append(torch.stack(rows))
    torch.testing.assert_close(layer(z), layer.output(torch.cat(heads, 1)))
    maps = layer.attention(z)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(maps[0] @ w[:, :3], heads[0])
    if causal:
        changed = z.clone()
        changed[3:] += 1
        assert torch.equal(layer(changed)[:3], layer(z)[:3])


@pytest.mark.parametrize("n", [2, 7])
def test_the_rate_s_gradient_is_the_closed_form(n):
    z, u = tokens(4, n, 6).requires_grad_(), bases()
    rate = compression_rate(z, u, epsilon=0.7)
    (gradient,) = torch.autograd.grad(rate.sum(), z)
    torch.testing.assert_close(compression_gradient(z.detach(), u, epsilon=0.7), gradient, atol=1e-12, rtol=1e-9)
    stepped = z.detach() - 0.1 * gradient
    assert bool((compression_rate(stepped, u, epsilon=0.7) < rate).all())


def test_small_tokens_feel_the_first_order_form_and_blocks_never_cost_less():
    u = bases()
    z = 1e-3 * tokens(7, 6)
    scale = 3 / (7 * 0.25)
    torch.testing.assert_close(compression_gradient(z, u) / scale, z, atol=1e-6, rtol=0)
    planted = torch.cat([tokens(50, 3) @ u[0].mT, tokens(50, 3, seed=5) @ u[1].mT])
    # Fischer: with equal constants the sum over blocks is at least the whole, equal for uncorrelated blocks.
    whole = coding_rate(planted, epsilon=0.5)
    parts = compression_rate(planted, u, epsilon=0.5 * math.sqrt(3 / 6))
    torch.testing.assert_close(parts, whole)
    turn = torch.linalg.matrix_exp(0.3 * (lambda a: a - a.mT)(tokens(6, 6, seed=8)))
    turned = compression_rate(planted, (turn @ u), epsilon=0.5 * math.sqrt(3 / 6))
    assert float(turned) > float(whole)


def test_strict_layers_follow_the_gradient_on_orthonormal_subspaces():
    torch.manual_seed(0)
    layer = CRATELayer(6, 2, strict=True, kappa=0.3).double()
    u = layer.compress.bases.detach()
    gram = torch.cat([*u], 1).mT @ torch.cat([*u], 1)
    torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    z = tokens(2, 7, 6)
    y = layer.compress_norm(z)
    half = y - 0.3 * compression_gradient(y, u)
    torch.testing.assert_close(layer(z), layer.sparsify(layer.sparsify_norm(half)))
    attention = SubspaceSelfAttention(6, 2, strict=True).double()
    w = torch.einsum("nd,kdp->knp", z[0], attention.bases)
    mixed = (w @ w.mT / math.sqrt(3)).softmax(-1) @ w
    torch.testing.assert_close(attention(z[0]), torch.einsum("knp,kdp->nd", mixed, attention.bases))
    with pytest.raises(ValueError, match="causal"):
        CRATELayer(6, 2, strict=True, causal=True)


def test_sparse_steps_are_the_proximal_formula_and_reach_the_lasso():
    torch.manual_seed(0)
    layer, y = ISTA(5, step=0.05, threshold=0.2).double(), tokens(3, 5)
    d = layer.dictionary
    torch.testing.assert_close(layer(y), F.relu(y + 0.05 * (y - y @ d.mT) @ d - 0.05 * 0.2))
    many = ISTA(5, step=0.05, threshold=0.2, steps=4000).double()
    many.load_state_dict(layer.state_dict())
    assert many.stability < 2
    lasso = Lasso(alpha=0.2 / 5, positive=True, fit_intercept=False, tol=1e-12, max_iter=100_000)
    with torch.no_grad():
        found = many(y)
    for row, code in zip(y, found):
        assert np.allclose(lasso.fit(d.detach().numpy(), row.numpy()).coef_, code.numpy(), atol=1e-5)
    fixed = ISTA(5, threshold=0.0).double()
    torch.nn.init.eye_(fixed.dictionary)
    torch.testing.assert_close(fixed(y.abs()), y.abs())


def test_layers_are_the_released_forward_pass():
    torch.manual_seed(0)
    layer, z = CRATELayer(6, 2).double(), tokens(2, 5, 6)
    half = z + layer.compress(layer.compress_norm(z))
    y = layer.sparsify_norm(half)
    d = layer.sparsify.dictionary
    torch.testing.assert_close(layer(z), F.relu(y + 0.1 * ((y - y @ d.mT) @ d) - 0.1 * 0.1))
    decoder = CRATEDecoderLayer(6, 2).double()
    y = decoder.expand_norm(z) @ decoder.expand.weight.mT
    torch.testing.assert_close(decoder(z), y - decoder.decompress(decoder.decompress_norm(y)))


@pytest.mark.parametrize(
    ("dim", "heads", "depth", "millions"),
    [(384, 6, 12, 6.09), (576, 12, 12, 13.12), (768, 12, 12, 22.80), (1024, 16, 24, 77.64)],
)
def test_the_published_parameter_counts(dim, heads, depth, millions):
    with torch.device("meta"):
        model = CRATE(224, 16, 1000, dim, heads, depth)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_images_classes_profiles_and_subspaces():
    torch.manual_seed(0)
    model = CRATE(8, 4, 3, 12, 3, 2, channels=1).eval()
    images = torch.randn(5, 1, 8, 8)
    assert model(images).shape == (5, 3)
    profile = model.rate_profile(images)
    assert len(profile) == 2
    z = model.layers[0](model.tokens(images))
    assert profile[0].zeros == pytest.approx(float((z == 0).float().mean()))
    layer = model.layers[1].compress
    w = F.normalize(layer.subspace_map(model.layers[1].compress_norm(z)).unflatten(-1, (3, 4)), dim=-1)
    rates = [
        0.5 * torch.logdet(torch.eye(4) + 4 / (5 * 0.01) * w[i, :, k].mT @ w[i, :, k])
        for i in range(5)
        for k in range(3)
    ]
    assert profile[1].compression == pytest.approx(float(torch.stack(rates).sum()) / 5, rel=1e-4)
    assert [each.basis.shape for each in model.subspaces()] == [(3, 12, 4)] * 2


def test_the_autoencoder_sees_only_what_is_not_hidden():
    torch.manual_seed(0)
    model = CRATEAutoencoder(8, 2, 12, 3, 1, channels=1).eval()
    images = torch.randn(2, 1, 8, 8)
    hidden = model.draw_mask(2, torch.Generator().manual_seed(0))
    assert hidden.sum(1).tolist() == [12, 12]
    changed = torch.where(F.fold(hidden.float().unsqueeze(1).expand(-1, 4, -1), 8, 2, stride=2) > 0, images + 1, images)
    assert torch.equal(model(changed, hidden), model(images, hidden))
    model.loss(images).backward()
    assert bool(model.mask_token.grad.any())


def test_refuses_bad_input():
    for call, match in [
        (lambda: SubspaceSelfAttention(6, 4), "heads"),
        (lambda: SubspaceSelfAttention(6, 2)(torch.zeros(2, 5)), "width 6, got 5"),
        (lambda: ISTA(5, step=0), "step"),
        (lambda: ISTA(0), "dim"),
        (lambda: CRATELayer(6, 2, kappa=0), "kappa"),
        (lambda: CRATE(9, 4, 3, 12, 3, 2), "patch_size"),
        (lambda: CRATE(8, 4, 3, 12, 3, 0), "depth"),
        (lambda: CRATE(8, 4, 3, 12, 3, 1)(torch.zeros(1, 1, 8, 8)), "images"),
        (lambda: CRATEAutoencoder(8, 2, 12, 3, 1, masked=1.0), "masked"),
        (lambda: CRATEAutoencoder(8, 2, 6, 3, 1), "multiple of 4"),
        (lambda: compression_rate(torch.zeros(2, 6), bases().float(), epsilon=0), "epsilon"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
