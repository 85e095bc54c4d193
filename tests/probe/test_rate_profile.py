"""Coding rate and sparsity of a transformer's layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from subspan.nn import CRATE, CRATELanguageModel
from subspan.probe import rate_profile


def crate(**options):
    torch.manual_seed(0)
    return CRATE(8, 4, 3, 12, 3, 2, channels=1, **options).eval()


def published(w):
    """The authors' measure of (b, k, n, p): unit tokens, the n x n Gram matrix, ε² = 0.01, mean over b."""
    w = F.normalize(w.double(), dim=-1)
    n, p = w.shape[-2:]
    return float(0.5 * torch.logdet(torch.eye(n) + p / (n * 0.01) * w @ w.mT).sum(-1).mean())


@pytest.mark.parametrize("strict", [None, "gradient"])
def test_the_profile_is_the_published_measure(strict):
    model, images = crate(strict=strict), torch.randn(5, 1, 8, 8)
    profile = rate_profile(model, images.split(2))
    z = model.tokens(images)
    for layer, found in zip(model.layers, profile):
        w = layer.compress.subspace_map(layer.compress_norm(z)).unflatten(-1, (3, 4)).transpose(1, 2)
        assert found.compression == pytest.approx(published(w.detach()), rel=1e-4)
        z = layer(z)
        assert found.zeros == pytest.approx(float((z == 0).float().mean()), abs=1e-6)
        assert found.stability == pytest.approx(layer.sparsify.stability)
    assert [each.layer for each in profile] == ["layers.0", "layers.1"]
    without = rate_profile(model, [images], drop_tokens=1)
    w = model.layers[0].compress.coordinates(model.layers[0].compress_norm(model.tokens(images)))
    assert without[0].compression == pytest.approx(published(w[:, :, 1:].detach()), rel=1e-4)


def test_values_of_any_transformer():
    model, images = crate(), torch.randn(4, 1, 8, 8)
    ours = rate_profile(model, [images])
    named = rate_profile(model, [images], "layers.*.compress.subspace_map", heads=3, sparse="layers.*")
    assert [each.compression for each in named] == pytest.approx([each.compression for each in ours])
    assert [each.zeros for each in named] == pytest.approx([each.zeros for each in ours])
    fused = nn.Sequential(nn.Linear(4, 36))
    x = torch.randn(2, 7, 4)
    (found,) = rate_profile(fused, [x], "0", heads=3, fused=True)
    values = fused(x)[..., 24:].unflatten(-1, (3, 4)).transpose(1, 2).detach()
    assert found.compression == pytest.approx(published(values), rel=1e-4)
    assert found.zeros is None


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = nn.Module()
    model.values = nn.Linear(4, 6)
    model.forward = lambda x, attention_mask: model.values(x)
    x = torch.randn(1, 7, 4)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    (found,) = rate_profile(model, [{"x": x, "attention_mask": mask}], "values", heads=2)
    (alone,) = rate_profile(model, [{"x": x[:, 2:], "attention_mask": mask[:, 2:]}], "values", heads=2)
    assert found.compression == pytest.approx(alone.compression, rel=1e-5)


def test_language_models_and_silent_tokens():
    model = CRATELanguageModel(11, 8, 12, 3, 3)
    assert len(rate_profile(model, [torch.randint(11, (2, 8))])) == 3
    silent = nn.Sequential(nn.Linear(4, 6, bias=False))
    with pytest.warns(UserWarning, match="length 0"):
        (found,) = rate_profile(silent, [torch.zeros(1, 3, 4)], "0", heads=2)
    assert found.compression == 0


def test_refuses_bad_input():
    model, images = crate(), torch.randn(2, 1, 8, 8)
    for call, match in [
        (lambda: rate_profile(nn.Linear(2, 2), [images]), "no CRATE layers"),
        (lambda: rate_profile(model, []), "at least one batch"),
        (lambda: rate_profile(model, [images], "layers.*.compress"), "heads"),
        (lambda: rate_profile(model, [images], "layers.*.compress", heads=5), "divided by 5"),
        (lambda: rate_profile(model, [images], "layers.*.compress", heads=3, sparse="layers.0"), "one a layer"),
        (lambda: rate_profile(model, [images], epsilon=0.0), "epsilon"),
        (lambda: rate_profile(model, [images], drop_tokens=-1), "drop_tokens"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
