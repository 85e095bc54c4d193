"""The small style-modulated generator and the distance of its pictures."""

import torch
from torch.nn import functional as F

from subspan.reproduce.materials import FeatureDistance, ModulatedConv, StyleGenerator


def test_modulating_the_input_is_modulating_the_weight():
    torch.manual_seed(0)
    layer, x, w = ModulatedConv(5, 3, 4), torch.randn(2, 3, 6, 6), torch.randn(2, 5)
    rows = []
    for one, code in zip(x, w):
        weight = layer.weight * layer.style(code)[None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        rows.append(2**0.5 * F.leaky_relu(F.conv2d(one[None], weight, layer.bias, padding=1), 0.2))
    torch.testing.assert_close(layer(x, w), torch.cat(rows), atol=1e-5, rtol=1e-4)


def test_each_latent_moves_its_own_layer():
    torch.manual_seed(0)
    model, w = StyleGenerator(1, 8), torch.randn(2, 8)
    same = w[:, None].repeat(1, 3, 1)
    torch.testing.assert_close(model(w, same), model(w))
    changed = same.clone()
    changed[:, 1] += 1
    inputs = []
    for part in model.first:
        part.style.register_forward_pre_hook(lambda m, i: inputs.append(i[0]))
    model(w, changed)
    assert [torch.equal(each, w) for each in inputs] == [True, False, True]


def test_distances_are_zero_for_the_same_and_grow():
    distance, x = FeatureDistance(), torch.rand(3, 1, 32, 32) * 2 - 1
    assert float(distance(x, x).max()) == 0
    near, far = distance(x, x + 0.05), distance(x, x.flip(0))
    assert bool((near[[0, 2]] < far[[0, 2]]).all())
