"""The parts of the protocols on compatible embeddings, and the protocols in small."""

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="compatible models train with Lightning (extra: train)")

from subspan.reproduce import Trials, bt2, lambda_orthogonality
from subspan.reproduce.materials import image_features

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture
def planted(monkeypatch):
    """Two models' features of eight classes; the newer the model, the less noise."""
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(480) % 8
    centers = torch.randn(8, 12, generator=generator)
    features = {}
    for model, noise in zip(bt2.MODELS, (1.2, 0.9, 0.6)):
        turn = torch.randn(12, 20, generator=generator)
        features[model] = (centers[labels] + noise * torch.randn(480, 12, generator=generator)) @ turn

    class Planted(image_features.LabelledImages):
        def features(self, model, size=128):
            return features[model]

    data = Planted("planted", np.zeros((480, 1)), labels, np.arange(320), np.arange(320, 480), tuple("abcdefgh"))
    for module in (bt2, lambda_orthogonality):
        monkeypatch.setattr(module, "labelled_images", lambda source: data)
    monkeypatch.setattr(lambda_orthogonality, "is_available", lambda name: False)
    return data


def test_prefix_head_and_influence_loss_are_bct():
    torch.manual_seed(0)
    head = bt2.PrefixHead(10, 6, 4, 3)
    out = head(torch.randn(5, 10))
    torch.testing.assert_close(out.full.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(out.compatible, out.full[:, :4])
    labels, means = torch.tensor([0, 1, 2, 0, 1]), torch.randn(3, 4)
    total, terms = bt2.InfluenceLoss(means, 10.0)(out, labels, means, means)
    unit = out.compatible / out.compatible.norm(dim=1, keepdim=True)
    expected = torch.nn.functional.cross_entropy(unit @ means.mT, labels) * 10
    torch.testing.assert_close(terms["influence"], expected)
    torch.testing.assert_close(total, expected + torch.nn.functional.cross_entropy(out.logits, labels))
    assert set(bt2.InfluenceLoss(means, 0.0)(out, labels, means, means)[1]) == {"classification"}


def test_bt2_on_planted_models(planted, tmp_path):
    setting = bt2.Setting(inputs=12, d=8, k=4, epochs=8, seeds=1)
    data = bt2.load(setting, 0, bt2.MODELS)
    assert int(data.seen.sum()) == int((data.train_labels < 4).sum())
    study = bt2.Study(data, setting, 0, tmp_path)
    methods = bt2.arms(setting)
    trials = Trials(methods, [0], lambda arm, seed: study.scores(methods[arm](study)))
    steps = study.chain()
    assert steps.shape == (3, 3)
    outcome = bt2.outcome(data, setting, trials, steps)
    cross = "new/old top-1"
    assert trials.gap("BT², k = 4", "independent", cross) > 0.2
    assert outcome.ours == trials.mean("BT², k = 4", cross)
    assert outcome.holds is (trials.gap("BT², k = 4", "old", cross) > 0)
    assert trials.mean("old", cross) == trials.mean("old", "new/new top-1")
    assert {len(table.rows) for table in outcome.tables} == {5 + 3, 3}


def test_lambda_orthogonality_on_planted_models(planted):
    setting = lambda_orthogonality.Setting(
        d=12, narrow=6, train=120, test=160, queries=80, elsewhere=80, epochs=2, seeds=1
    )
    data = lambda_orthogonality.load(setting, 0)
    # Without a second set of pictures half of the classes stands for it.
    assert set(data.labels) == {0, 1, 2, 3}
    assert set(data.elsewhere_labels) == {4, 5, 6, 7}
    torch.testing.assert_close(data.new.norm(dim=1), torch.ones(len(data.new)))
    methods = lambda_orthogonality.arms(setting.epochs)
    same = lambda_orthogonality.five_ways(data, methods["no map"](data, 0), setting.queries)
    assert same["ZS"] == 0
    assert same["defect"] == 0
    strict = lambda_orthogonality.five_ways(data, methods["strict"](data, 0), setting.queries)
    assert strict["ZS"] == pytest.approx(0, abs=0.02)
    assert strict["B(new)/old"] > same["B(new)/old"]
    soft = methods["soft, weight 1"](data, 0)
    free = methods["affine"](data, 0)
    assert soft.defect < free.defect
