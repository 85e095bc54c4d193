"""What the protocol of orthogonal projections is made of."""

import pytest
import torch

pytest.importorskip("lightning", reason="the protocol trains with Lightning")

from subspan.nn import HouseholderProjector
from subspan.reproduce import householder_projector as protocol
from subspan.reproduce.materials import FeatureDistance, StyleAutoencoder

pytestmark = pytest.mark.filterwarnings("ignore")


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
    assert edits["PIPL"] > 0
    assert 0 <= edits["mean |cos|"] <= 1
    assert 0 <= edits["perceptible"] <= 1
