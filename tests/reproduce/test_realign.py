from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the dual encoder trains with Lightning (extra: train)")
pytest.importorskip("transformers", reason="the sentence encoder is a transformers model (extra: text)")

from subspan.base import normalize_rows
from subspan.reproduce import realign
from subspan.reproduce.materials import shared_space as recipe
from subspan.reproduce.materials.shared_space import TEMPLATES, Pairs, Recipe, SharedSpace

D, CLASSES = 24, 8


class PlantedSpace(SharedSpace):
    """A shared space of two cones with classes, without networks: features are the vectors themselves."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        # The dataclass is frozen; nothing of it but its methods is needed.
        self.__dict__.update(
            cones=normalize_rows(torch.randn(2, D, generator=generator)) * 2,
            classes=torch.randn(CLASSES, D, generator=generator) * 0.3,
            spread=torch.arange(1, D + 1) ** -0.7 * 0.25,
            generator=generator,
            names=[f"thing {index}" for index in range(CLASSES)],
        )
        splits = {name: self.pairs(n) for name, n in (("train", 50), ("fit", 900), ("test", 600))}
        self.__dict__["splits"] = {"planted": splits}

    def rows(self, label: torch.Tensor, side: int) -> torch.Tensor:
        noise = torch.randn(len(label), D, generator=self.generator) * self.spread
        return normalize_rows(self.cones[side] + self.classes[label] + noise)

    def pairs(self, n: int) -> Pairs:
        label = torch.arange(n) % CLASSES
        names = tuple(self.names[index] for index in label.tolist())
        return Pairs(self.rows(label, 0), self.rows(label, 1), label, names, names)

    def encode_image_features(self, features):
        return features

    def encode_text_features(self, features):
        return features

    def encode_texts(self, texts):
        label = [next(i for i, name in enumerate(self.names) if name in text) for text in texts]
        return self.rows(torch.tensor(label), 1)


@pytest.fixture(scope="module")
def outcome():
    curve = realign.planted_curve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(realign, "dual_encoder", lambda **_: PlantedSpace())
        patch.setattr(realign, "planted_curve", lambda *_, **__: curve([30, 100, 300, 900], 0, held_out=5000, d=32))
        return realign.protocol(quick=True, seed=0, progress=lambda message, fraction: None)


def test_the_protocol_measures_every_row_of_the_card(outcome):
    gaps, scores = outcome.tables[0], outcome.tables[1]
    rows = [row[0] for row in gaps.rows]
    assert [name.split(" (")[0] for name in rows] == [
        "no alignment",
        "mean shift",
        "anchor and trace",
        "ReAlign",
        "ReAlign, 3 centroid rounds",
        "C3",
        "blockwise covariance",
    ]
    assert [row[0] for row in scores.rows] == [*rows, "trained on images"]
    assert 0 <= min(row[1] for row in scores.rows) <= max(row[1] for row in scores.rows) <= 1


def test_the_planted_effect_is_seen(outcome):
    gap = {row[0]: row[1] for row in outcome.tables[0].rows}
    assert outcome.ours == pytest.approx(gap["ReAlign"], abs=1e-5)
    assert gap["no alignment"] > 1 > 100 * outcome.ours
    accuracy = {row[0]: row[1] for row in outcome.tables[1].rows}
    assert accuracy["ReAlign"] > accuracy["no alignment"] + 0.1
    assert outcome.holds
    held = {check.name: check.holds for check in outcome.checks}
    assert held["there is a gap"]
    assert held["all three steps are needed"]
    assert held["neighbourhoods kept"]


def test_the_halves_to_fit_share_no_picture_and_the_held_out_rows_are_others():
    space = PlantedSpace()
    fit = space.splits["planted"]["fit"]
    doubled = Pairs(*(torch.cat([x, x]) for x in (fit.image, fit.text, fit.group)), fit.captions * 2, fit.names * 2)
    space.splits["planted"]["fit"] = doubled
    data = realign.domain(space, "planted")
    pictures_of_texts = {
        tuple(doubled.image[row].tolist())
        for row in range(len(doubled))
        if any(torch.equal(doubled.text[row], text) for text in data.fit_text[:20])
    }
    pictures = {tuple(row.tolist()) for row in data.fit_image}
    assert pictures_of_texts
    assert not pictures_of_texts & pictures
    assert len(pictures) == len(data.fit_image)
    assert torch.equal(data.test_image, space.splits["planted"]["test"].image)


def test_the_sampling_floor_is_the_distance_between_samples_of_one_population():
    generator = torch.Generator().manual_seed(0)
    distances, floors = [], []
    for _ in range(40):
        a, b = torch.randn(300, 30, generator=generator).double(), torch.randn(200, 30, generator=generator).double()
        distances.append(float((a.mean(0) - b.mean(0)).norm()))
        floors.append(realign.sampling_floor(a, b))
    assert np.mean(distances) == pytest.approx(np.mean(floors), rel=0.05)


# ---------------------------------------------------------------------- the recipe of the shared space


@pytest.fixture
def without_networks(monkeypatch, tmp_path):
    """Pixels and letter counts in the place of the two frozen encoders; a count of trainings."""
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))
    trainings = []
    train = recipe._fit_heads

    def letters(captions, encoder=None, repeated=False):
        counts = [[caption.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for caption in captions]
        return torch.tensor(counts, dtype=torch.float32)

    def counted(heads, columns, options):
        trainings.append(options)
        train(heads, columns, options)

    monkeypatch.setattr(
        recipe, "pooled_features", lambda images, encoder, size: torch.tensor(images).flatten(1).float()
    )
    monkeypatch.setattr(recipe, "text_features", letters)
    for name in ("image_encoder", "SentenceEncoder", "load_sentence_encoder"):
        monkeypatch.setattr(recipe, name, lambda *_: ())
    monkeypatch.setattr(recipe, "_fit_heads", counted)
    return trainings


SMALL = Recipe(
    sources=("digits",),
    epochs=15,
    batch_size=64,
    learning_rate=3e-3,
    d=16,
    hidden=64,
    dropout=0.0,
    temperature=0.07,
    learn_temperature=True,
)


def test_the_heads_learn_the_digits_and_come_from_the_cache_the_second_time(without_networks):
    first = recipe.train(SMALL)
    second = recipe.train(SMALL)
    assert len(without_networks) == 1
    other = recipe.train(Recipe(**{**SMALL.__dict__, "seed": 1}))
    assert len(without_networks) == 2
    test = first.splits["digits"]["test"]
    vectors = first.encode_image_features(test.image)
    assert torch.equal(vectors, second.encode_image_features(test.image))
    assert not torch.equal(vectors, other.encode_image_features(test.image))
    names = sorted(set(test.names))
    texts = recipe.text_features([TEMPLATES[0].format(name) for name in names])
    guess = (vectors @ first.encode_text_features(texts).mT).argmax(1)
    assert float((guess == torch.tensor([names.index(name) for name in test.names])).float().mean()) > 0.8
    assert not any(parameter.requires_grad for parameter in first.heads.parameters())


def test_splits_share_no_picture(without_networks):
    splits = recipe._splits("digits", SMALL)
    assert sum(len(pairs) for pairs in splits.values()) == 1797
    pictures = {name: {tuple(row.tolist()) for row in pairs.image} for name, pairs in splits.items()}
    assert not pictures["train"] & pictures["test"]
    assert not pictures["fit"] & pictures["test"]
    assert all(caption.count("digit") == 1 for caption in splits["fit"].captions)
    some = splits["fit"].select(torch.arange(len(splits["fit"])) < 3)
    assert len(some) == len(some.captions) == 3


def test_without_the_shared_data_the_digits_take_their_place(without_networks, monkeypatch):
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)
    seen = []
    monkeypatch.setattr(recipe, "train", lambda options, progress: seen.append(options) or PlantedSpace())
    recipe.dual_encoder(quick=True)
    recipe.dual_encoder()
    assert [options.sources for options in seen] == [("digits",)] * 2
