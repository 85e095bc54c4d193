"""White-box transformer layers."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch.nn import functional as F

from subspan.geometry import Subspace, coding_rate, compression_gradient, compression_rate, rate_reduction
from subspan.geometry.grassmann import random_basis
from subspan.nn import (
    CRATE,
    ISTA,
    CRATEAutoencoder,
    CRATEDecoderLayer,
    CRATELanguageModel,
    CRATELayer,
    SubspaceSelfAttention,
    load_published,
)
from subspan.nn.crate_models import sine_positions


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
    layer = CRATELayer(6, 2, strict="gradient", kappa=0.3).double()
    u = layer.compress.bases.detach()
    gram = torch.cat([*u], 1).mT @ torch.cat([*u], 1)
    torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    z = tokens(2, 7, 6)
    y = layer.compress_norm(z)
    half = y - 0.3 * compression_gradient(y, u)
    torch.testing.assert_close(layer(z), layer.sparsify(layer.sparsify_norm(half)))
    attention = SubspaceSelfAttention(6, 2, tied=True, orthonormal=True).double()
    w = torch.einsum("nd,kdp->knp", z[0], attention.bases)
    mixed = (w @ w.mT / math.sqrt(3)).softmax(-1) @ w
    torch.testing.assert_close(attention(z[0]), torch.einsum("knp,kdp->nd", mixed, attention.bases))
    first = CRATELayer(6, 2, strict="softmax", kappa=0.3).double()
    weight = 0.3 * 3 / (7 * 0.25)
    half = (1 - weight) * y + weight * first.compress(y)
    torch.testing.assert_close(first(z), first.sparsify(first.sparsify_norm(half)))
    with pytest.raises(ValueError, match="causal"):
        CRATELayer(6, 2, strict="gradient", causal=True)


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
    signed = ISTA(5, step=0.05, threshold=0.2, steps=8000, nonnegative=False).double()
    signed.load_state_dict(layer.state_dict())
    free = Lasso(alpha=0.2 / 5, fit_intercept=False, tol=1e-12, max_iter=100_000)
    found = free.fit(d.detach().numpy(), y[0].numpy()).coef_
    assert np.allclose(found, signed(y).detach()[0].numpy(), atol=1e-5)
    wide = ISTA(5, step=0.02, threshold=0.2, steps=2, expansion=3).double()
    once = F.relu(0.02 * y @ wide.dictionary - 0.004)
    twice = F.relu(once + 0.02 * (y - once @ wide.dictionary.mT) @ wide.dictionary - 0.004)
    torch.testing.assert_close(wide(y), twice)
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


@pytest.mark.parametrize(("name", "millions"), [("tiny", 6.09), ("small", 13.12), ("base", 22.80), ("large", 77.64)])
def test_the_published_parameter_counts(name, millions):
    with torch.device("meta"):
        model = CRATE.preset(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_the_language_model_has_its_published_size_and_sees_no_future():
    with torch.device("meta"):
        model = CRATELanguageModel.preset("base")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(60.7, abs=0.1)
    torch.manual_seed(0)
    model = CRATELanguageModel(11, 8, 12, 3, 2).eval()
    ids = torch.randint(11, (2, 8))
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    torch.testing.assert_close(model(changed)[:, :5], model(ids)[:, :5])
    assert not torch.allclose(model(changed)[:, 5:], model(ids)[:, 5:])
    expected = -model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(model.loss(ids), expected)
    assert len(model.subspaces()) == 2


def test_padding_does_not_count_in_the_language_model_s_loss():
    model = CRATELanguageModel(20, 9, 8, 2, 1)
    ids = torch.randint(20, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    each = [F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum") for row in (ids[0], ids[1, :5])]
    torch.testing.assert_close(model.loss(ids, mask), sum(each) / (8 + 4))
    torch.testing.assert_close(model.loss(ids, torch.ones_like(mask)), model.loss(ids))
    with pytest.raises(ValueError, match="padding behind the tokens"):
        model.loss(ids, mask.flip(1))
    with pytest.raises(ValueError, match="nothing is predicted"):
        model.loss(ids, torch.arange(9).expand(2, -1) == 0)


def test_the_overcomplete_layer_adds_a_decoded_token():
    torch.manual_seed(0)
    layer, z = CRATELayer(6, 2, expansion=4).double(), tokens(2, 5, 6)
    half = z + layer.compress(layer.compress_norm(z))
    code = layer.sparsify(layer.sparsify_norm(half))
    assert code.shape == (2, 5, 24)
    torch.testing.assert_close(layer(z), half + code @ layer.decode.weight.mT)


def test_images_classes_attention_maps_and_subspaces():
    torch.manual_seed(0)
    model = CRATE(8, 4, 3, 12, 3, 2, channels=1).eval()
    images = torch.randn(5, 1, 8, 8)
    assert model(images).shape == (5, 3)
    assert [each.basis.shape for each in model.subspaces()] == [(3, 12, 4)] * 2
    layer = model.layers[1]
    z = model.layers[0](model.tokens(images))
    w = layer.compress.subspace_map(layer.compress_norm(z))[..., :4]
    expected = (w @ w.mT / 2).softmax(-1)[:, 0, 1:].reshape(5, 2, 2)
    torch.testing.assert_close(model.attention_maps(images)[:, 0], expected)
    few = model.attention_maps(images, mass=0.5)
    assert few.dtype == torch.bool
    held = (model.attention_maps(images) * few).sum((2, 3)) / model.attention_maps(images).sum((2, 3))
    assert bool((held >= 0.5).all())
    assert not bool(few.all())
    assert model(torch.randn(2, 1, 12, 16)).shape == (2, 3)
    assert CRATE(8, 4, 3, 12, 3, 1, channels=1, pool="mean")(images).shape == (5, 3)


def test_a_silenced_layer_is_named_once():
    model = CRATE(8, 4, 3, 12, 3, 2, channels=1, threshold=1000.0)
    with pytest.warns(UserWarning, match="layer 0 puts out zeros"):
        model(torch.randn(2, 1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(torch.randn(2, 1, 8, 8))


class Released:
    """The authors' forward pass, written plainly on a state in their layout."""

    def __init__(self, state, heads, threshold):
        self.state, self.heads, self.threshold = state, heads, threshold

    def norm(self, x, name, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def attention(self, x, name):
        w = (x @ self.state[f"{name}.fn.qkv.weight"].mT).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = ((w @ w.mT * w.shape[-1] ** -0.5).softmax(-1) @ w).transpose(1, 2).flatten(2)
        return out @ self.state[f"{name}.fn.to_out.0.weight"].mT + self.state[f"{name}.fn.to_out.0.bias"]

    def encoder(self, x, name):
        x = self.attention(self.norm(x, f"{name}.0.norm"), f"{name}.0") + x
        y, d = self.norm(x, f"{name}.1.norm"), self.state[f"{name}.1.fn.weight"]
        return F.relu(y + 0.1 * (y @ d - (y @ d.mT) @ d) - 0.1 * self.threshold)

    def decoder(self, x, name):
        y = self.norm(x, f"{name}.0.norm") @ self.state[f"{name}.0.fn.weight"].mT
        return y - self.attention(self.norm(y, f"{name}.1.norm"), f"{name}.1")


def released_state(layers, extra, d=12):
    made = {}
    for name, kind in layers:
        attention, matrix = ("0", "1") if kind == "encoder" else ("1", "0")
        made |= {f"{name}.{part}.norm.{which}": (d,) for part in "01" for which in ("weight", "bias")}
        made |= {f"{name}.{attention}.fn.qkv.weight": (d, d), f"{name}.{matrix}.fn.weight": (d, d)}
        made |= {f"{name}.{attention}.fn.to_out.0.weight": (d, d), f"{name}.{attention}.fn.to_out.0.bias": (d,)}
    generator = torch.Generator().manual_seed(0)
    shapes = {**made, **extra}
    return {key: 0.4 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_the_published_classifier_is_loaded_and_runs_as_released():
    extra = {"to_patch_embedding.1.weight": (32,), "to_patch_embedding.1.bias": (32,)}
    extra |= {"to_patch_embedding.2.weight": (12, 32), "to_patch_embedding.2.bias": (12,)}
    extra |= {
        f"{name}.{which}": (12,) for name in ("to_patch_embedding.3", "mlp_head.0") for which in ("weight", "bias")
    }
    extra |= {"mlp_head.1.weight": (5, 12), "mlp_head.1.bias": (5,), "cls_token": (1, 1, 12)}
    extra["pos_embedding"] = (1, 5, 12)
    state = released_state([(f"transformer.layers.{i}", "encoder") for i in range(2)], extra)
    model = CRATE(8, 4, 5, 12, 3, 2, channels=2)
    load_published(model, {f"module.{key}": value for key, value in state.items()})
    images = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = Released(state, 3, 0.1)
    patches = images.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    x = plain.norm(patches, "to_patch_embedding.1") @ state["to_patch_embedding.2.weight"].mT
    x = plain.norm(x + state["to_patch_embedding.2.bias"], "to_patch_embedding.3")
    x = torch.cat([state["cls_token"].expand(3, 1, -1), x], 1) + state["pos_embedding"]
    for i in range(2):
        x = plain.encoder(x, f"transformer.layers.{i}")
    expected = plain.norm(x[:, 0], "mlp_head.0") @ state["mlp_head.1.weight"].mT + state["mlp_head.1.bias"]
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
    poor = {key: value for key, value in state.items() if "qkv" not in key} | {"odd": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing: layers\.0\.compress\.subspace_map\.weight.*unexpected: odd"):
        load_published(model, poor)
    with pytest.raises(ValueError, match="position has shape"):
        load_published(model, {**state, "pos_embedding": torch.zeros(1, 7, 12)})


def test_the_published_autoencoder_is_loaded_and_runs_as_released():
    extra = {"patch_embed.proj.weight": (12, 2, 4, 4), "patch_embed.proj.bias": (12,)}
    extra |= {
        "cls_token": (1, 1, 12),
        "mask_token": (1, 1, 12),
        "pos_embed": (1, 5, 12),
        "decoder_pos_embed": (1, 5, 12),
    }
    extra |= {f"{name}.{which}": (12,) for name in ("norm", "decoder_norm") for which in ("weight", "bias")}
    extra |= {"decoder_embed.weight": (12, 12), "decoder_embed.bias": (12,)}
    extra |= {"decoder_pred.weight": (32, 12), "decoder_pred.bias": (32,)}
    state = released_state([("blocks.0.layers.0", "encoder"), ("decoder_blocks.0.layers.0", "decoder")], extra)
    model = CRATEAutoencoder(8, 4, 12, 3, 1, channels=2)
    load_published(model, state)
    images = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    hidden = torch.tensor([[True, False, True, True]] * 3)
    plain = Released(state, 3, 0.5)
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4).flatten(2).mT
    x = torch.where(hidden[..., None], state["mask_token"], x)
    x = torch.cat([state["cls_token"].expand(3, 1, -1), x], 1) + state["decoder_pos_embed"]
    x = plain.norm(plain.encoder(x, "blocks.0.layers.0"), "norm", 1e-6)
    x = plain.norm(plain.decoder(x, "decoder_blocks.0.layers.0"), "decoder_norm", 1e-6)
    x = (x @ state["decoder_pred.weight"].mT + state["decoder_pred.bias"])[:, 1:]
    released = x.unflatten(-1, (4, 4, 2)).movedim(-1, 2).flatten(2)
    torch.testing.assert_close(model(images, hidden), released, atol=1e-4, rtol=1e-4)
    # In the authors' grid the column comes first.
    assert torch.equal(sine_positions(3, 8)[1, 4:], sine_positions(3, 8)[0, 4:])
    assert not torch.equal(sine_positions(3, 8)[1, :4], sine_positions(3, 8)[0, :4])


def test_what_grouping_saves():
    u = bases()
    planted = torch.cat([tokens(50, 3) @ u[0].mT, tokens(50, 3, seed=5) @ u[1].mT])
    labels = torch.arange(2).repeat_interleave(50)
    by_labels = rate_reduction(planted, labels, epsilon=0.5)
    parts = sum(0.5 * coding_rate(planted[labels == k], epsilon=0.5) for k in range(2))
    torch.testing.assert_close(by_labels, coding_rate(planted, epsilon=0.5) - parts)
    assert float(by_labels) > float(rate_reduction(planted, labels.flip(0).roll(25), epsilon=0.5)) >= 0
    by_planes = rate_reduction(planted, Subspace(u), epsilon=0.5)
    torch.testing.assert_close(by_planes, coding_rate(planted, epsilon=0.5) - compression_rate(planted, u, epsilon=0.5))
    with pytest.raises(ValueError, match="labels"):
        rate_reduction(planted, labels[:5])
    with pytest.raises(ValueError, match="expected bases"):
        rate_reduction(planted, torch.zeros(2, 7, 3))


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


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_the_classifier_reads_the_class_token_or_the_mean_of_all(pool):
    torch.manual_seed(0)
    model, images = CRATE(8, 4, 3, 12, 3, 1, pool=pool).eval(), torch.randn(2, 3, 8, 8)
    z = model.layers(model.tokens(images))
    assert z.shape == (2, 5, 12)
    read = z[:, 0] if pool == "class" else z.mean(1)
    torch.testing.assert_close(
        model(images), F.linear(F.layer_norm(read, (12,)), model.head[1].weight, model.head[1].bias)
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_the_autoencoder_s_loss_is_of_hidden_patches_alone(normalize):
    torch.manual_seed(0)
    model = CRATEAutoencoder(8, 2, 12, 3, 1, channels=2, normalize=normalize).eval()
    images = torch.randn(3, 2, 8, 8) * 3 + 1
    hidden = model.draw_mask(3, torch.Generator().manual_seed(4))
    made = model(images, hidden).detach().requires_grad_()
    model.forward = lambda *_: made
    loss = model.loss(images, torch.Generator().manual_seed(4))
    loss.backward()
    errors = []
    for n in range(3):
        for place in range(16):
            row, column = divmod(place, 4)
            patch = images[n, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            if normalize:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            assert bool(made.grad[n, place].any()) == bool(hidden[n, place])
            if hidden[n, place]:
                errors.append((made[n, place] - patch).square().mean())
                expected = 2 * (made[n, place] - patch).detach() / (8 * int(hidden.sum()))
                torch.testing.assert_close(made.grad[n, place], expected)
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_weights_start_as_released():
    torch.manual_seed(0)

    def uniform(weight, bound):
        assert float(weight.abs().max()) == pytest.approx(bound, rel=0.01)
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)

    def normal(weight, deviation):
        assert float(weight.std()) == pytest.approx(deviation, rel=0.2)
        assert float(weight.abs().max()) > 2 * deviation

    classifier = CRATE(32, 2, 10, 96, 3, 1)
    normal(classifier.position.detach(), 1.0)
    normal(classifier.class_token.detach(), 1.0)
    uniform(classifier.layers[0].sparsify.dictionary.detach(), math.sqrt(6 / 96))
    coder = CRATEAutoencoder(32, 2, 96, 3, 1)
    normal(coder.mask_token.detach(), 0.02)
    normal(coder.class_token.detach(), 0.02)
    uniform(coder.encoder[0].sparsify.dictionary.detach(), math.sqrt(6 / 96))
    uniform(coder.decoder[0].expand.weight.detach(), math.sqrt(6 / 96))
    uniform(coder.encoder[0].compress.subspace_map.weight.detach(), math.sqrt(6 / (96 + 96)))
    uniform(coder.embed.weight.detach(), math.sqrt(6 / (12 + 96)))
    assert not any(bool(part.bias.any()) for part in (coder.embed, coder.output, coder.decoder[0].decompress.output[0]))
    model = CRATELanguageModel(300, 64, 96, 3, 1)
    normal(model.token.weight.detach(), 0.02)
    normal(model.position.weight.detach(), 0.02)


def test_the_language_model_is_its_layers_between_embeddings():
    torch.manual_seed(0)
    model, ids = CRATELanguageModel(20, 9, 8, 2, 2), torch.randint(20, (2, 7))
    z = model.token.weight[ids] + model.position.weight[:7]
    for layer in model.layers:
        z = layer(z)
    logits = F.layer_norm(z, (8,)) @ model.token.weight.mT
    torch.testing.assert_close(model(ids), logits)
    each = [F.cross_entropy(logits[n, t], ids[n, t + 1]) for n in range(2) for t in range(6)]
    torch.testing.assert_close(model.loss(ids), torch.stack(each).mean())


def test_refuses_bad_input():
    for call, match in [
        (lambda: SubspaceSelfAttention(6, 4), "heads"),
        (lambda: SubspaceSelfAttention(6, 2)(torch.zeros(2, 5)), "width 6, got 5"),
        (lambda: ISTA(5, step=0), "step"),
        (lambda: ISTA(0), "dim"),
        (lambda: CRATELayer(6, 2, kappa=0), "kappa"),
        (lambda: CRATELayer(6, 2, strict="yes"), "strict"),
        (lambda: CRATE.preset("huge"), "tiny"),
        (lambda: CRATE(8, 4, 3, 12, 3, 1, pool="max"), "pool"),
        (lambda: CRATELanguageModel(11, 4, 12, 3, 1)(torch.zeros(1, 5, dtype=torch.long)), "at most 4"),
        (lambda: CRATE(8, 4, 3, 12, 3, 1).attention_maps(torch.zeros(1, 3, 8, 8), mass=2), "mass"),
        (lambda: CRATE(9, 4, 3, 12, 3, 2), "patch_size"),
        (lambda: CRATE(8, 4, 3, 12, 3, 0), "depth"),
        (lambda: CRATE(8, 4, 3, 12, 3, 1)(torch.zeros(1, 3, 8, 9)), "images"),
        (lambda: CRATEAutoencoder(8, 2, 12, 3, 1, masked=1.0), "masked"),
        (lambda: CRATEAutoencoder(8, 2, 6, 3, 1), "multiple of 4"),
        (lambda: compression_rate(torch.zeros(2, 6), bases().float(), epsilon=0), "epsilon"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
