from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning", reason="the dual encoder trains with Lightning (extra: train)")

from lightning import Trainer

from subspan.nn.dual_encoder import DualEncoder


def pairs(n: int = 512, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two linear views of ten shared classes."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(10, (n,), generator=generator)
    views = torch.Generator().manual_seed(99)
    table = torch.randn(10, 8, generator=views)
    image = table[label] @ torch.randn(8, 20, generator=views) + 0.3 * torch.randn(n, 20, generator=generator) + 2
    text = table[label] @ torch.randn(8, 12, generator=views) + 0.3 * torch.randn(n, 12, generator=generator)
    return {"image": image, "text": text, "group": label}


@pytest.fixture(scope="module")
def trained() -> DualEncoder:
    torch.manual_seed(0)
    data = pairs()
    model = DualEncoder(20, 12, d=16, hidden=32)
    model.set_scales(data["image"], data["text"])
    loader = torch.utils.data.DataLoader(
        range(512), 64, shuffle=True, collate_fn=lambda index: {name: values[index] for name, values in data.items()}
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=10, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(model.objective(learning_rate=5e-3), loader)
    return model.eval()


@torch.no_grad()
def test_training_brings_a_picture_to_its_class_of_texts(trained):
    data = pairs(seed=1)
    names = torch.stack([data["text"][data["group"] == label][:3] for label in range(10)])
    prototypes = trained.prototypes(names)
    scores = trained.encode_image_features(data["image"]) @ prototypes.mT
    assert float((scores.argmax(1) == data["group"]).float().mean()) > 0.9
    untrained = DualEncoder(20, 12, d=16, hidden=32).eval()
    scores = untrained.encode_image_features(data["image"]) @ untrained.prototypes(names).mT
    assert float((scores.argmax(1) == data["group"]).float().mean()) < 0.5


@torch.no_grad()
def test_vectors_and_prototypes_are_of_unit_length(trained):
    data = pairs(50)
    for vectors in (
        trained.encode_image_features(data["image"]),
        trained.encode_text_features(data["text"]),
        trained.prototypes(data["text"].reshape(10, 5, 12)),
    ):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))


def test_rows_of_one_group_are_positives_of_one_another():
    model = DualEncoder(20, 12, d=16).eval()
    data = pairs(64)
    apart = {**data, "group": torch.arange(64)}
    shared, separate = (float(model.training_loss(batch).detach()) for batch in (data, apart))
    together = {**data, "group": torch.zeros(64, dtype=torch.int64)}
    assert shared != pytest.approx(separate, abs=1e-3)
    similarity = (
        model.loss.scale * model.encode_image_features(data["image"]) @ model.encode_text_features(data["text"]).mT
    )
    expected = -(similarity.log_softmax(1).mean() + similarity.log_softmax(0).mean()) / 2
    assert float(model.training_loss(together).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_scales_are_kept_with_the_weights(trained):
    other = DualEncoder(20, 12, d=16, hidden=32)
    other.load_state_dict(trained.state_dict())
    data = pairs(5)
    torch.testing.assert_close(
        other.eval().encode_image_features(data["image"]), trained.encode_image_features(data["image"])
    )
    assert float(other.image_scale) > 1


def test_scales_make_the_rows_vary_by_one_on_average():
    data, model = pairs(), DualEncoder(20, 12, d=4, hidden=8)
    model.set_scales(10 * data["image"], data["text"] / 7)
    for rows, scale in ((10 * data["image"], model.image_scale), (data["text"] / 7, model.text_scale)):
        assert float((rows / scale).var(0).mean()) == pytest.approx(1, rel=1e-4)
