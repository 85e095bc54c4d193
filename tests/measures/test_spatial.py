from __future__ import annotations

import itertools
import math

import pytest
import torch

from subspan.measures import gram_agreement, spatial_structure
from subspan.measures.spatial import grid_shape, manhattan_distances

ALL = ("lds", "cds", "srss", "rmsc")


def tokens(b: int = 2, h: int = 4, w: int = 4, d: int = 7, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(b, h * w, d, generator=torch.Generator().manual_seed(0), dtype=dtype)


def by_loops(image: torch.Tensor, h: int, w: int, mask: list[bool], near: int, far: int, dmax: int) -> dict[str, float]:
    """The four definitions, pair by pair."""
    places = list(itertools.product(range(h), range(w)))
    unit = [row / row.norm() for row in image]
    cosine = [[float(a @ b) for b in unit] for a in unit]
    distance = [[abs(p[0] - q[0]) + abs(p[1] - q[1]) for q in places] for p in places]
    pairs = [(i, j) for i in range(h * w) for j in range(h * w) if i != j]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    close = mean([cosine[i][j] for i, j in pairs if distance[i][j] <= near])
    distant = mean([cosine[i][j] for i, j in pairs if distance[i][j] >= far])
    steps = [step for step in range(1, dmax + 1) if any(distance[i][j] == step for i, j in pairs)]
    means = [mean([cosine[i][j] for i, j in pairs if distance[i][j] == step]) for step in steps]
    middle = mean([float(step) for step in steps])
    slope = sum((s - middle) * (m - mean(means)) for s, m in zip(steps, means)) / sum((s - middle) ** 2 for s in steps)
    anchors = []
    for i in range(h * w):
        same = [cosine[i][j] for j in range(h * w) if mask[j] and 0 < distance[i][j] <= near]
        other = [cosine[i][j] for j in range(h * w) if not mask[j] and distance[i][j] >= far]
        if mask[i] and same and other:
            anchors.append(mean(same) - mean(other))
    centre = torch.stack(unit).mean(0)
    contrast = math.sqrt(mean([float((u - centre).square().sum()) for u in unit]))
    return {"lds": close - distant, "cds": -slope, "srss": mean(anchors), "rmsc": contrast}


@pytest.mark.parametrize(("h", "w", "far", "dmax"), [(4, 4, 4, 8), (3, 5, 3, 4)])
def test_the_metrics_are_those_of_the_definitions(h: int, w: int, far: int, dmax: int, monkeypatch) -> None:
    # In blocks of a few rows of the Gram matrix, so that their joints are tested too.
    monkeypatch.setattr("subspan.measures.spatial._GRAM_ENTRIES", 3 * 2 * h * w)
    x = tokens(2, h, w)
    masks = torch.arange(h * w).expand(2, -1) < torch.tensor([[w + 1], [2 * w]])
    found = spatial_structure(x, (h, w), metrics=ALL, masks=masks, far=far, dmax=dmax)
    for index in range(2):
        expected = by_loops(x[index], h, w, masks[index].tolist(), 1, far, dmax)
        for name in ALL:
            assert float(found[name][index]) == pytest.approx(expected[name], abs=1e-12), name


def test_half_is_the_definition_of_the_papers_text() -> None:
    x = tokens(1, 6, 6)
    found = spatial_structure(x, near="half", far="half", metrics=["lds"])["lds"]
    unit = x[0] / x[0].norm(dim=1, keepdim=True)
    gram, distance = unit @ unit.mT, manhattan_distances(6, 6)
    expected = gram[(distance > 0) & (distance < 3)].mean() - gram[distance >= 3].mean()
    torch.testing.assert_close(found[0], expected)


def test_rmsc_is_one_minus_the_mean_cosine() -> None:
    x = tokens(3, 5, 5)
    unit = x / x.norm(dim=-1, keepdim=True)
    rmsc = spatial_structure(x, metrics=["rmsc"])["rmsc"]
    torch.testing.assert_close(rmsc.square(), 1 - (unit @ unit.mT).mean((1, 2)))


def test_nothing_depends_on_the_basis_of_the_channels_or_on_scale() -> None:
    x = tokens(2, 7, 7)
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    masks = torch.arange(49).expand(2, -1) < 20
    for name, value in spatial_structure(x, metrics=ALL, masks=masks).items():
        torch.testing.assert_close(spatial_structure(3 * x @ turn, metrics=ALL, masks=masks)[name], value)


def test_structures_that_are_known() -> None:
    constant = torch.ones(1, 64, 5)
    for value in spatial_structure(constant).values():
        assert abs(float(value)) < 1e-6
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    # Steps to a neighbour change the sign: near pairs are opposite, far ones half and half.
    checkerboard = ((rows + columns) % 2 * 2.0 - 1).reshape(1, 64, 1)
    assert float(spatial_structure(checkerboard)["lds"]) < -0.9
    angle = (rows + columns).reshape(1, 64) / 14 * math.pi
    ramp = torch.stack([angle.cos(), angle.sin()], -1)
    found = spatial_structure(ramp)
    assert float(found["cds"]) > 0.05
    assert float(found["lds"]) > 0.5


def test_grids_as_feature_grids_give_them() -> None:
    x = tokens(2, 3, 5)
    apart = spatial_structure(x, (3, 5), far=4)
    for name, value in spatial_structure(x.unflatten(1, (3, 5)), far=4).items():
        torch.testing.assert_close(value, apart[name])


def test_half_precision_is_computed_in_single() -> None:
    x = tokens(1, 8, 8, 32, dtype=torch.float32).half()
    for name, value in spatial_structure(x).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, spatial_structure(x.double())[name].float())


def test_gradients_flow() -> None:
    x = tokens(1, 8, 8).requires_grad_()
    sum(spatial_structure(x).values()).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


def test_what_a_grid_does_not_have_is_nan_and_said() -> None:
    with pytest.warns(UserWarning, match="3×3 grid has no pairs for 6"):
        found = spatial_structure(tokens(2, 3, 3), metrics=["lds", "rmsc"])
    assert bool(found["lds"].isnan().all())
    assert bool(found["rmsc"].isfinite().all())
    with pytest.warns(UserWarning, match="CDS is NaN"):
        assert bool(spatial_structure(tokens(1, 1, 2), (1, 2), metrics=["cds"])["cds"].isnan())
    masks = torch.ones(2, 64, dtype=torch.bool)
    masks[1, 32:] = False
    with pytest.warns(UserWarning, match="1 of 2 images"):
        srss = spatial_structure(tokens(2, 8, 8), metrics=["srss"], masks=masks)["srss"]
    assert srss.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": torch.ones(1, 6, 3)}, "hw: needed"),
        ({"features": torch.ones(1, 6, 3), "hw": (2, 2)}, "hw: a grid of 6"),
        ({"features": torch.ones(1, 1, 3)}, "at least 2 tokens"),
        ({"features": torch.ones(6, 3)}, "features: tokens"),
        ({"features": torch.full((1, 64, 3), torch.nan)}, "NaN"),
        ({"metrics": ["fid"]}, "metrics: some of"),
        ({"metrics": ["srss"]}, "masks: needed"),
        ({"metrics": ["srss"], "masks": torch.ones(1, 63)}, "masks: shape"),
        ({"near": 0}, "near"),
        ({"dmax": 1}, "dmax"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spatial_structure(**{"features": torch.ones(1, 64, 3), **arguments})


def test_integers_are_no_features() -> None:
    with pytest.raises(TypeError, match="features"):
        spatial_structure(torch.ones(1, 64, 3, dtype=torch.int64))


def test_gram_agreement_is_a_correlation_of_cosines() -> None:
    x, y = tokens(2, 4, 4, 6), tokens(2, 4, 4, 9)
    found = gram_agreement(x, y)
    for index in range(2):
        pairs = []
        for value in (x[index], y[index]):
            unit = value / value.norm(dim=1, keepdim=True)
            pairs.append(torch.stack([unit[i] @ unit[j] for i in range(16) for j in range(i)]))
        torch.testing.assert_close(found[index], torch.corrcoef(torch.stack(pairs))[0, 1])
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    torch.testing.assert_close(gram_agreement(x, 2 * x @ turn), torch.ones(2, dtype=torch.float64))


def test_gram_agreement_of_equal_tokens_is_nan_and_said() -> None:
    x = tokens(2, 4, 4)
    y = x.clone()
    y[1] = y[1, :1]
    with pytest.warns(UserWarning, match="1 of 2 images have equal cosines"):
        assert gram_agreement(x, y).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="at least 3 tokens"):
        gram_agreement(x[:, :2], y[:, :2])


def test_grid_shape() -> None:
    assert grid_shape(9) == (3, 3)
    assert grid_shape(6, (2, 3)) == (2, 3)
    with pytest.raises(ValueError, match="hw"):
        grid_shape(0)
