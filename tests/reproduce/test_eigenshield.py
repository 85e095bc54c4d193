"""The parts of EigenShield's protocol, and the protocol in small."""

import numpy as np
import pytest
import torch

from subspan.datasets import is_installed, load_model
from subspan.edit import SpikeFilter
from subspan.models.intervene import intervene
from subspan.reproduce import eigenshield
from subspan.reproduce.eigenshield import Defence, Laboratory, Size
from subspan.reproduce.materials import PooledFeatures

TINY = Size(32, 24, 40, 16, 12, 2, (1 / 255, 2 / 255), (1 / 2040,), 40, 12)

needs_network = pytest.mark.skipif(not is_installed("efficientnet-lite0"), reason="EfficientNet-Lite0 is not installed")


@pytest.fixture(scope="module")
def features():
    return PooledFeatures().eval()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))


@pytest.fixture
def without_data(monkeypatch):
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)


@needs_network
def test_folded_batch_norms_change_nothing(features):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = load_model("efficientnet-lite0")
    with torch.no_grad():
        expected = plain.extract_features((x * 255 - 127) / 128).mean((2, 3))
        torch.testing.assert_close(features(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("without_data")
def test_parts_do_not_overlap():
    _, images, labels = eigenshield.parts(TINY, seed=0)
    rows = {part: {image.tobytes() for image in each} for part, each in images.items()}
    assert {part: len(each) for part, each in images.items()} == {
        "head": 24,
        "other": 24,
        "spectrum": 40,
        "pairs": 16,
        "tests": 12,
    }
    assert all(len(labels[part]) == len(each) for part, each in images.items())
    names = list(rows)
    assert all(not rows[a] & rows[b] for i, a in enumerate(names) for b in names[:i])
    np.testing.assert_array_equal(eigenshield.parts(TINY, seed=0)[1]["pairs"], images["pairs"])


@needs_network
@pytest.mark.usefixtures("own_cache", "without_data")
def test_hook_and_features_agree_and_attacks_get_through(features):
    _, images, classes = eigenshield.parts(TINY, seed=0)
    lab = Laboratory(features, TINY)
    # So few pictures need not show every class, and a head has a row only for those it has seen.
    tests, labels = images["tests"], torch.unique(classes["tests"], return_inverse=True)[1]
    clean = lab.clean(tests)
    head = eigenshield.head(clean, labels)
    basis = torch.linalg.qr(torch.randn(1280, 6, generator=torch.Generator().manual_seed(0))).Q
    defence = Defence(head, filter=SpikeFilter(basis, clean.mean(0)))
    model = torch.nn.Sequential(features, head)
    with torch.no_grad(), intervene(model, "0", defence.filter):
        torch.testing.assert_close(model(lab.pixels(tests)), defence.logits(clean), rtol=1e-3, atol=1e-3)
    seen, attacked = lab.seen(tests), lab.attacked(head, tests, labels, 8 / 255, seed=0)
    assert attacked.shape == (12, 3, 1280)
    before, after, success = Defence(head).success(seen, [attacked], labels)
    assert before == 1
    assert after < 0.7
    assert success == pytest.approx(1 - after)
    torch.testing.assert_close(seen[:, 0], clean, rtol=1e-3, atol=1e-4)
