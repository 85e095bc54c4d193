from __future__ import annotations

import numpy as np
import pytest

from subspan.datasets import procedural_shapes
from subspan.datasets.shapes import FAMILIES, _ball, _box, _disc, _ring, _tube


def test_shapes_are_in_the_unit_ball_and_the_same_for_the_same_seed():
    shapes = procedural_shapes(60, points=100, random_state=1)
    assert shapes.points.shape == (60, 100, 3)
    assert shapes.points.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(shapes.points, axis=2).max(1), 1, atol=1e-5)
    again = procedural_shapes(60, points=100, random_state=1)
    np.testing.assert_array_equal(shapes.points, again.points)
    assert shapes.captions == again.captions
    assert procedural_shapes(60, points=100, random_state=2).captions != shapes.captions


def test_every_family_is_drawn_and_named():
    shapes = procedural_shapes(400, points=16)
    assert set(shapes.families) == set(FAMILIES)
    assert len(FAMILIES) >= 12
    assert len(set(shapes.captions)) > 150
    assert not any("  " in caption or "%" in caption for caption in shapes.captions)


def test_surfaces_have_their_area_and_lie_where_they_should():
    g = np.random.default_rng(0)
    cloud, area = _tube(g, 1.0, 0.5, 2.0)
    assert area == pytest.approx(np.pi * 1.5 * np.hypot(2, 0.5))
    np.testing.assert_allclose(np.hypot(cloud[:, 0], cloud[:, 1]), 1 - cloud[:, 2] / 4, atol=1e-9)
    # More of a cone's mantle lies low, where it is wide: the mean height of this one is 8/9.
    assert cloud[:, 2].mean() == pytest.approx(8 / 9, abs=0.08)
    cloud, area = _box(g, (1.0, 2.0, 4.0), (0, 0, 1))
    assert area == 28
    faces = np.isclose(abs(cloud - [0, 0, 3]), [0.5, 1, 2])
    np.testing.assert_allclose(faces.mean(0), [8 / 14, 4 / 14, 2 / 14], atol=0.08)
    cloud, area = _ring(g, 1.0, 0.25)
    assert area == pytest.approx(4 * np.pi**2 * 0.25)
    np.testing.assert_allclose((np.hypot(cloud[:, 0], cloud[:, 1]) - 1) ** 2 + cloud[:, 2] ** 2, 0.0625, atol=1e-9)
    cloud, area = _ball(g, (1.0, 1.0, 2.0))
    np.testing.assert_allclose(((cloud / [1, 1, 2]) ** 2).sum(1), 1, atol=1e-9)
    assert area == pytest.approx(21.48, rel=0.02)
    cloud, area = _disc(g, 2.0, (0, 0, 1))
    assert np.hypot(cloud[:, 0], cloud[:, 1]).mean() == pytest.approx(4 / 3, abs=0.08)
    assert area == pytest.approx(4 * np.pi)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        procedural_shapes(0)
