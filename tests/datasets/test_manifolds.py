from __future__ import annotations

from typing import Any

import pytest
import torch

from subspan.datasets import MANIFOLDS, ManifoldZoo
from subspan.measures import two_nn

ZOO = ManifoldZoo(variants=2, ambient_dim=24, random_state=3)


def test_every_manifold_fills_its_subspace_and_weighs_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    assert len(ZOO) == 16 == len(ZOO.names) == len(ZOO.subspaces)
    for number, (name, space) in enumerate(zip(ZOO.names, ZOO.subspaces)):
        points = ZOO.points(number, 4000, generator=generator)
        assert space.dim == MANIFOLDS[name.split()[0]].dim
        assert float(space.residual(points).abs().max()) < 1e-5, name
        assert float(torch.linalg.svdvals(space.coordinates(points))[-1]) > 1, name
        assert float(points.square().sum(1).mean()) == pytest.approx(1, abs=0.06), name
        assert float(points.mean(0).norm()) < 0.06, name


@pytest.mark.parametrize(
    ("kind", "dim"),
    [("circle", 1), ("sphere", 2), ("torus", 2), ("moebius", 2), ("helix", 1), ("disk", 2), ("segment", 1)],
)
def test_manifolds_have_as_many_dimensions_as_parameters(kind: Any, dim: int) -> None:
    zoo = ManifoldZoo((kind,), variants=1, ambient_dim=4)
    found = two_nn(zoo.points(0, 1500, generator=torch.Generator().manual_seed(0)))
    assert found == pytest.approx(dim, abs=0.3)


def test_circles_and_spheres_are_round_and_a_moebius_strip_has_one_side() -> None:
    for kind in ("circle", "sphere"):
        radius = ZOO.points(ZOO.names.index(f"{kind} 0.5"), 300).norm(dim=1)
        torch.testing.assert_close(radius, torch.ones(300), atol=0.03, rtol=0)
    strip = MANIFOLDS["moebius"]
    start, end = (strip.points(torch.tensor([[turn, 0.9], [turn, 0.1]]), 0.5) for turn in (0.0, 1.0))
    torch.testing.assert_close(start, end.flip(0), atol=1e-5, rtol=0)


def test_rows_are_sums_of_as_many_contributions_as_asked() -> None:
    drawn = ZOO.sample(500, 3, random_state=5, contributions=True)
    assert drawn.contributions is not None
    assert drawn.active.sum(1).tolist() == [3] * 500
    torch.testing.assert_close(drawn.contributions.sum(1), drawn.x, atol=1e-4, rtol=0)
    assert not bool(drawn.contributions[~drawn.active].any())
    rows, points = drawn.manifold(4)
    assert torch.equal(points, drawn.contributions[rows, 4])
    assert bool(drawn.active[rows, 4].all())
    assert float(drawn.active.float().mean(0).min()) > 0.1
    plain = ZOO.sample(500, 3, random_state=5)
    assert torch.equal(plain.x, drawn.x)
    assert not torch.equal(ZOO.sample(500, 3, random_state=6).x, drawn.x)
    with pytest.raises(ValueError, match="contributions"):
        plain.manifold(0)


def test_the_seed_draws_the_subspaces() -> None:
    again, other = (ManifoldZoo(variants=2, ambient_dim=24, random_state=seed) for seed in (3, 4))
    assert torch.equal(again.subspaces[5].basis, ZOO.subspaces[5].basis)
    assert float(other.subspaces[5].angles(ZOO.subspaces[5]).max()) > 0.1


def test_bad_input_is_refused() -> None:
    for options, said in (
        ({"kinds": ("circle", "klein")}, "kinds: .* got klein"),
        ({"kinds": ()}, "kinds"),
        ({"variants": 7}, "variants"),
        ({"ambient_dim": 3}, "ambient_dim: a manifold needs 4"),
    ):
        with pytest.raises(ValueError, match=said):
            ManifoldZoo(**options)
    with pytest.raises(ValueError, match="l0"):
        ZOO.sample(10, 17)
