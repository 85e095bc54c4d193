"""Classes as subspaces."""

import math

import pytest
import torch

from subspan.base import normalize_rows
from subspan.geometry import expected_overlap, principal_angles, subspace_overlap
from subspan.geometry.grassmann import random_basis
from subspan.nn import GrassmannHead, RiemannianSGD
from subspan.statistics import GroupedMoments


def head(**options):
    return GrassmannHead(**{"in_features": 10, "num_classes": 4, "rank": 3, **options})


def test_a_logit_is_the_cosine_of_the_angle_to_the_plane():
    layer = head(generator=torch.Generator().manual_seed(0))
    x = torch.randn(6, 10)
    angles = torch.stack(
        [principal_angles((row / row.norm()).expand(4, -1).unsqueeze(-1), layer.subspaces().basis)[:, 0] for row in x]
    )
    torch.testing.assert_close(layer(x), 25 * angles.cos(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer(7 * x), layer(x))


def test_logits_depend_on_the_planes_alone():
    layer = head()
    x = torch.randn(6, 10)
    before = layer(x)
    turn = random_basis(3, 3, batch=(4,), dtype=torch.float32)
    layer.planes.data.copy_(turn @ layer.planes.data)
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)


def test_whole_space_and_lines():
    x = torch.randn(5, 10)
    torch.testing.assert_close(head(rank=10)(x), torch.full((5, 4), 25.0))
    line = head(rank=1)
    cosine = torch.nn.functional.normalize(x, dim=-1) @ line.planes[:, 0].mT
    torch.testing.assert_close(line(x), 25 * cosine.abs())


def test_zero_rows_have_zero_logits_and_a_finite_gradient():
    x = torch.zeros(2, 10)
    x[0] = 1
    x.requires_grad_()
    with pytest.warns(UserWarning, match="1 rows are zero"):
        logits = head()(x)
    assert not bool(logits[1].any())
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert bool(x.grad.isfinite().all())


def planted(classes=6, d=24, k=3, n=40):
    generator = torch.Generator().manual_seed(3)
    planes = random_basis(d, k, batch=(classes,), generator=generator, dtype=torch.float32)
    labels = torch.arange(classes).repeat_interleave(n)
    x = (planes[labels] @ torch.randn(len(labels), k, 1, generator=generator)).squeeze(-1)
    return planes, x + 0.02 * torch.randn(x.shape, generator=generator), labels


def test_planted_planes_are_found_where_vectors_must_fail():
    planes, x, labels = planted()
    layer = head(in_features=24, num_classes=6, generator=torch.Generator().manual_seed(1))
    linear = torch.nn.Linear(24, 6)
    for model, optimizer in (
        (layer, RiemannianSGD(layer.parameters(), lr=0.05)),
        (linear, torch.optim.Adam(linear.parameters(), lr=0.01)),
    ):
        for _ in range(100):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    assert float((layer(x).argmax(1) == labels).float().mean()) >= 0.99
    assert float((linear(x).argmax(1) == labels).float().mean()) < 0.7
    # What separates classes best is not what holds most of each: the planes are near the planted ones, not the same.
    assert float(subspace_overlap(layer.subspaces().basis, planes).min()) > 4 * expected_overlap(3, 3, 24)


def test_moments_start_at_the_principal_planes():
    planes, x, labels = planted()
    moments = GroupedMoments(24).update(normalize_rows(x), labels)
    layer = head(in_features=24, num_classes=6)
    layer.init_from(moments)
    assert float(principal_angles(layer.subspaces().basis, planes).max()) < math.radians(5)
    few = GroupedMoments(24).update(normalize_rows(x[:2]), [0, 0])
    before = layer.planes.detach().clone()
    layer.init_from(few)
    assert torch.equal(layer.planes[1:], before[1:])
    inside = layer.subspaces().basis[0]
    torch.testing.assert_close(inside @ (inside.mT @ x[:2].mT), x[:2].mT, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="groups are class numbers below 6, got 9"):
        layer.init_from(GroupedMoments(24).update(x[:3], [9, 9, 9]))
    with pytest.raises(ValueError, match="expected 24 features"):
        layer.init_from(GroupedMoments(5).update(x[:3, :5], [1, 1, 1]))


def test_refuses_bad_input():
    for options in ({"rank": 11}, {"rank": 0}, {"num_classes": 0}, {"scale": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            head(**options)
    with pytest.raises(ValueError, match="expected 10 columns, got 9"):
        head()(torch.randn(2, 9))
    x = torch.randn(3, 10)
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="1 of 3 rows contain NaN"):
        head()(x)
    stretched = head()
    with pytest.raises(ValueError, match="orthonormal only to"):
        stretched.load_state_dict({"planes": 2 * stretched.planes.detach()})
