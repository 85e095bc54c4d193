"""What the protocol of orthogonal projections is made of."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lightning", reason="the protocol trains with Lightning")

from subspan.nn import HouseholderProjector
from subspan.reproduce import householder_projector as protocol
from subspan.reproduce.materials.style_generator import FeatureDistance, ModulatedConv, StyleAutoencoder, StyleGenerator

pytestmark = pytest.mark.filterwarnings("ignore")


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


def test_projectors_start_where_the_layers_were_and_recovery_is_timed():
    torch.manual_seed(0)
    base, images = StyleAutoencoder(1, 16).eval(), torch.rand(6, 1, 32, 32) * 2 - 1
    warm, cold = (protocol.projected(base, 4, cold=cold, seed=0) for cold in (False, True))
    old, new, other = (protocol.styles(model)[0] for model in (base, warm, cold))
    assert isinstance(new, HouseholderProjector)
    u, s, vh = torch.linalg.svd(old.weight.detach())
    torch.testing.assert_close(new.weight.detach(), s[:4].mean() * u[:, :4] @ vh[:4], atol=1e-5, rtol=0)
    assert torch.equal(other.gain, new.gain)
    assert not torch.allclose(other.weight, new.weight, atol=1e-2)
    distance = FeatureDistance()
    values = iter([3.0, 2.0, 0.9, 0.8])
    watch = protocol.Recovery.__new__(protocol.Recovery)
    watch.goal, watch.least, watch.steps, watch.now = 1.0, 40, None, lambda: next(values)
    assert [watch(warm, step) for step in (10, 15, 20, 30, 40)] == [False, False, False, False, True]
    assert watch.steps == 30
    found = {m: protocol.found_directions(warm, images, m, 0, 3) for m in ("householder", "jacobian", "random")}
    for directions in found.values():
        assert directions.shape == (3, 16, 3)
        torch.testing.assert_close(directions.mT @ directions, torch.eye(3).expand(3, 3, 3), atol=1e-5, rtol=0)
    edits = protocol.measure(warm, images, found["jacobian"], distance, 0)
    assert edits.pipl > 0
    assert 0 <= edits.mixing <= 1
    assert 0 <= edits.perceptible <= 1
