from __future__ import annotations

import numpy as np
import pytest
import torch

from subspan.align import SpaceMap
from subspan.statistics import JointMoments

METHODS = ("translation", "procrustes", "scaled", "ridge", "cca")


def pairs(n: int = 600, d: int = 6, *, noise: float = 0.0, scale: float = 1.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    x = torch.randn(n, d, dtype=torch.float64, generator=generator) + 2
    y = scale * x @ rotation.mT - 1 + noise * torch.randn(n, d, dtype=torch.float64, generator=generator)
    return x, y, rotation


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_planted_rotation_is_found_and_undone(method):
    x, y, rotation = pairs(scale=1.0 if method == "procrustes" else 2.5)
    model = SpaceMap(method, alpha=0.0, shrinkage=0.0).fit(x[:400], y[:400])
    torch.testing.assert_close(model.transform(x[400:]), y[400:], atol=1e-9, rtol=0)
    torch.testing.assert_close(model.inverse_transform(y[400:]), x[400:], atol=1e-9, rtol=0)
    factor = 1.0 if method == "procrustes" else 2.5
    torch.testing.assert_close(model.map_.matrix, factor * rotation, atol=1e-9, rtol=0)


def test_a_planted_shift_is_found_between_equal_and_unequal_widths():
    x, _, _ = pairs()
    for width in (6, 4, 9):
        shifted = torch.nn.functional.pad(x, (0, max(0, width - 6)))[:, :width] - 5
        model = SpaceMap("translation").fit(x[:400], shifted[:400])
        torch.testing.assert_close(model.transform(x[400:]), shifted[400:], atol=1e-12, rtol=0)


def test_procrustes_stays_orthogonal_where_the_data_do_not():
    x, y, _ = pairs(noise=0.5, scale=3.0)
    assert SpaceMap("procrustes").fit(x, y).map_.orthogonality_defect < 1e-12
    assert SpaceMap("ridge").fit(x, y).map_.orthogonality_defect > 1


def test_k_canonical_pairs_give_a_map_of_rank_k():
    x, y, _ = pairs(noise=0.5)
    model = SpaceMap("cca", k=2).fit(x, y)
    assert int(torch.linalg.matrix_rank(model.map_.matrix)) == 2
    assert model.canonical_.correlations.shape == (2,)
    full = SpaceMap("cca", shrinkage=0.0).fit(x, y)
    ridge = SpaceMap("ridge", alpha=0.0).fit(x, y)
    torch.testing.assert_close(full.map_.matrix, ridge.map_.matrix, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_streams_and_parts_give_the_map_of_the_whole(method, tmp_path):
    x, y, _ = pairs(noise=0.3)
    y = y[:, :4].contiguous()
    whole = SpaceMap(method).fit(x.numpy(), y.numpy())
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    streamed = SpaceMap(method).fit(tmp_path / "x.npy", tmp_path / "y.npy")
    parts = SpaceMap(method).fit(list(x.split(100)), list(y.split(100)))
    online = SpaceMap(method)
    for a, b in zip(x.split(250), y.split(250)):
        online.partial_fit(a, b)
    for other in (streamed, parts, online):
        torch.testing.assert_close(other.map_.matrix, whole.map_.matrix, atol=1e-10, rtol=0)
    moments = JointMoments(6, 4).update(x, y)
    assert whole.moments_.cka() == pytest.approx(moments.cka(), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: SpaceMap("magic").fit(x, y), "method"),
        (lambda x, y: SpaceMap().fit(x, y[:-1]), "Y: expected 600 rows"),
        (lambda x, y: SpaceMap().fit([x], [y, y]), "Y: must have as many rows"),
        (lambda x, y: SpaceMap().fit(x.numpy(), y.numpy()[:-1]), "inconsistent numbers"),
        (lambda x, y: SpaceMap().fit(x[:1], y[:1]), "at least 2 pairs"),
        (lambda x, y: SpaceMap().fit(x, y * float("nan")), "Y: 600 of 600 rows"),
        (lambda x, y: SpaceMap().fit(x, torch.ones_like(y)), "constant"),
        (lambda x, y: SpaceMap().fit(x, y).transform(x[:, :2]), "expected 6 columns"),
        (lambda x, y: SpaceMap().fit(x, y).inverse_transform(x[:, :2]), "expected 6 columns"),
        (lambda x, y: SpaceMap("cca", k=9).fit(x, y), "k: must lie"),
    ],
)
def test_bad_input_is_named(call, message):
    x, y, _ = pairs()
    with pytest.raises(ValueError, match=message):
        call(x, y)
