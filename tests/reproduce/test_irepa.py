from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="flow matching trains with Lightning (extra: train)")
pytest.importorskip("skimage", reason="the bundled photographs are scikit-image's")

from subspan.reproduce import irepa
from subspan.reproduce.irepa import ARMS, Recipe
from subspan.reproduce.materials import LabelledImages

TINY = Recipe(steps=3, batch=4, width=16, depth=2)


def images(n: int = 24, m: int = 12) -> LabelledImages:
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (n + m, 32, 32, 3), dtype=np.uint8)
    index = np.arange(n + m)
    return LabelledImages("noise", pictures, index % 3, index[:n], index[n:], ("a", "b", "c"))


def maps(pictures: np.ndarray) -> torch.Tensor:
    """A teacher that sees mean colours of patches."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.avg_pool2d(pixels, 4).repeat(1, 2, 1, 1).half()


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(irepa, "teacher_maps", maps)
    monkeypatch.setattr(irepa, "small_images", lambda n_train=None: images())


def test_the_arms_share_all_but_the_alignment() -> None:
    data = irepa.material(images(), 8)
    models = {
        name: irepa.train(data, arm, Recipe(steps=1, batch=4, width=16, depth=2), 0) for name, arm in ARMS.items()
    }
    assert models["none"].alignment is None
    sizes = [
        sum(parameter.numel() for parameter in model.alignment.parameters())
        for name, model in models.items()
        if name != "none"
    ]
    assert max(sizes) / min(sizes) < 1.05
    # One step moves the last layer by the denoising loss alone, which does not depend on the arm.
    for model in models.values():
        assert set(dict(model.denoiser.named_parameters())) == set(dict(models["none"].denoiser.named_parameters()))
        torch.testing.assert_close(model.denoiser.label.weight.shape, models["none"].denoiser.label.weight.shape)
    judged = irepa.judge(models["iREPA"], data)
    assert judged == irepa.judge(models["iREPA"], data)
    assert -1 <= judged["Gram agreement"] <= 1


def test_the_protocol_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [torch.rand(6, 4, 10, 10), 3 + torch.rand(6, 8, 5, 5)]
    monkeypatch.setattr(irepa, "photographs", lambda n=9: ("noise", range(n)))
    monkeypatch.setattr(irepa, "block_maps", lambda name, pictures: blocks)
    monkeypatch.setattr(irepa, "Recipe", lambda **_: TINY)
    outcome = irepa.protocol(quick=False, seed=0, progress=lambda message, fraction: None)
    assert set(outcome.baselines) == set(ARMS) - {"iREPA"}
    assert [len(table.rows) for table in outcome.tables] == [5, 5, 6, 6]
    by_seed = {row[0]: row[1:] for row in outcome.tables[1].rows}
    least = min(a - b for a, b in zip(by_seed["iREPA"], by_seed["REPA"]))
    assert outcome.main is not None
    assert outcome.main.value == pytest.approx(least, abs=2e-4)
    gain = next(check for check in outcome.checks if "RMSC" in check.name)
    assert gain.holds


def test_crops_stand_in_where_there_is_no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)
    data = irepa.small_images()
    assert data.images.shape[1:] == (32, 32, 3)
    assert set(data.labels[data.train].tolist()) == set(range(6)) == set(data.labels[data.test].tolist())
    name, pictures = irepa.photographs()
    assert name == "crops of photographs"
    assert pictures.shape == (200, 256, 256, 3)
