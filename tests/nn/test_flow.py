from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="flow matching trains with Lightning (extra: train)")

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from subspan.align import RepresentationAlignment
from subspan.nn import FlowTransformer, PatchProjector
from subspan.nn.flow_matching import FlowMatching
from subspan.nn.flow_transformer import sinusoidal_grid

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*num_workers")

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(**options) -> FlowTransformer:
    return FlowTransformer(8, **{"patch": 2, "width": 16, "depth": 2, "heads": 2, "classes": 2, **options})


def batches(n: int = 12, size: int = 8) -> list[dict[str, torch.Tensor]]:
    """Class 0 is dark, class 1 bright."""
    found = []
    for _ in range(n):
        label = torch.randint(2, (size,))
        image = (label * 1.6 - 0.8).view(-1, 1, 1, 1) + 0.05 * torch.randn(size, 3, 8, 8)
        found.append({"image": image, "label": label, "teacher": image[:, :, ::2, ::2].repeat(1, 2, 1, 1)})
    return found


def loader(rows: list) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(rows, batch_size=None)


def randomised(model: FlowTransformer) -> FlowTransformer:
    """As after some training: nothing is zero any more."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_the_field_starts_at_zero_and_keeps_the_shape() -> None:
    model = FlowTransformer((8, 12), patch=2, width=16, depth=2, heads=2, classes=2)
    x = torch.randn(3, 3, 8, 12)
    out = model(x, torch.rand(3), torch.tensor([0, 1, 2]))
    assert out.shape == x.shape
    assert not bool(out.any())
    assert model.hw == (4, 6)
    assert model.null == 2


def test_state_makes_a_transformer_of_the_meta_device_whole() -> None:
    model, x = randomised(small()), torch.randn(2, 3, 8, 8)
    with torch.device("meta"):
        other = small()
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    time, label = torch.rand(2), torch.tensor([0, 1])
    torch.testing.assert_close(other(x, time, label), model(x, time, label))


def test_every_patch_is_put_back_where_it_was() -> None:
    model = small(depth=1)
    # A head that gives back the patch's own pixels, through an identity embedding.
    with torch.no_grad():
        model.embed.weight.zero_()
        model.embed.weight.view(16, -1)[:12] = torch.eye(12)
        model.positions.zero_()
        model.head.weight.zero_()
        model.head.weight[:, :12] = torch.eye(12)
    model.norm = torch.nn.Identity()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x, torch.rand(2), torch.tensor([0, 1])), x)


def test_time_and_class_condition_the_field() -> None:
    model = randomised(small())
    x = torch.randn(1, 3, 8, 8)
    zero = torch.tensor([0])
    reference = model(x, torch.tensor([0.3]), zero)
    assert not torch.allclose(model(x, torch.tensor([0.4]), zero), reference, atol=1e-3)
    assert not torch.allclose(model(x, torch.tensor([0.3]), zero + 1), reference, atol=1e-3)


def test_places_are_told_apart() -> None:
    places = sinusoidal_grid(4, 6, 16)
    assert places.shape == (24, 16)
    assert float(torch.cdist(places, places).fill_diagonal_(9).min()) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patch": 3}, "size"), ({"heads": 3}, "width"), ({"width": 18}, "width"), ({"depth": 0}, "depth")],
)
def test_bad_transformers_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
    with pytest.raises(ValueError, match="x: images of shape"):
        small()(torch.randn(1, 3, 16, 16), torch.rand(1), torch.tensor([0]))


def test_the_path_and_its_velocity() -> None:
    model = FlowMatching(small())
    image, noise, time = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0.25, 1.0])
    x = model.noised(image, time, noise)
    torch.testing.assert_close(x[0], 0.75 * image[0] + 0.25 * noise[0])
    torch.testing.assert_close(x[1], noise[1])
    # The field is zero at first, so the loss is the mean square of the true velocity.
    expected = (noise - image).square().mean()
    torch.testing.assert_close(model.denoising_loss(image, torch.tensor([0, 1]), time, noise), expected)


def test_image_prediction_is_judged_by_velocity() -> None:
    model = FlowMatching(small(), prediction="image")
    image, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    time = torch.tensor([0.5, 0.01])
    x = model.noised(image, time, noise)
    denominators = torch.tensor([0.5, 0.05]).view(-1, 1, 1, 1)
    expected = (((x - 0) - (x - image)) / denominators).square().mean()
    torch.testing.assert_close(model.denoising_loss(image, torch.tensor([0, 1]), time, noise), expected)
    model.denoiser.forward = lambda x, time, label: image
    torch.testing.assert_close(model.velocity(x, torch.full((2,), 0.5), torch.tensor([0, 1])), (x - image) / 0.5)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sampling_follows_a_known_field(method: str) -> None:
    # All mass in one point m: the velocity at x_t is (x - m) / t, and every path ends in m.
    model = FlowMatching(small())
    model.ema.module.forward = lambda x, time, label: (x - 0.3) / time.clamp_min(1e-3).view(-1, 1, 1, 1)
    out = model.sample(torch.tensor([0, 1]), steps=8, method="euler")
    torch.testing.assert_close(out, torch.full_like(out, 0.3))
    # dx/dt = x has the solution x₁ / e at t = 0; Heun's error is of second order.
    model.ema.module.forward = lambda x, time, label: x
    noise = torch.ones(1, 3, 8, 8)
    errors = [
        abs(float(model.sample(torch.tensor([0]), steps=steps, method=method, noise=noise).mean()) - 0.36788)
        for steps in (8, 16)
    ]
    assert errors[0] / errors[1] == pytest.approx(2 if method == "euler" else 4, rel=0.1)


def test_guidance_extrapolates_from_no_class() -> None:
    model = FlowMatching(small())
    model.ema.module.forward = lambda x, time, label: label.to(x).view(-1, 1, 1, 1).expand_as(x)
    # Velocity 1 with class 1, 2 with none: guidance 3 gives 2 + 3 (1 - 2) = -1, so x grows by one.
    noise = torch.zeros(1, 3, 8, 8)
    out = model.sample(torch.tensor([1]), steps=4, guidance=3.0, noise=noise)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_training_learns_classes_and_keeps_an_average(tmp_path: Path) -> None:
    denoiser = small()
    projector = PatchProjector(16, 6)
    alignment = RepresentationAlignment(denoiser, "blocks.0", None, projector, None)
    model = FlowMatching(denoiser, alignment=alignment, ema_decay=0.9)
    rows = batches(60, 16)
    before = model.ema.module.head.weight.clone()
    validation = rows[:2]
    with torch.no_grad():
        first, again = (
            float(sum(model.validation_loss(batch, index) for index, batch in enumerate(validation))) for _ in range(2)
        )
    assert first == again
    seen: list[float] = []
    counted = alignment.loss
    alignment.loss = lambda features, step=None: seen.append(step) or counted(features, step)
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, gradient_clip_val=1.0, **QUIET)
    trainer.fit(model.objective(learning_rate=5e-3, warmup=3), loader(rows), loader(validation))
    del alignment.loss
    assert seen == list(range(120))
    assert float(trainer.callback_metrics["val_loss"]) < 0.5 * first / 2
    assert int(model.ema.n_averaged) == 120
    assert not torch.equal(model.ema.module.head.weight, before)
    assert not torch.equal(model.ema.module.head.weight, denoiser.head.weight)
    torch.testing.assert_close(model.ema.module.head.weight, denoiser.head.weight, atol=0.05, rtol=0.5)
    means = model.sample(torch.tensor([0, 1]), steps=8, generator=torch.Generator().manual_seed(0)).mean((1, 2, 3))
    assert float(means[1] - means[0]) > 0.8
    assert float(trainer.callback_metrics["alignment_loss"]) < -0.2


class EqualWeights(Callback):
    """Every process ends with the weights of the others."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in pl_module.parameters():
            first, second = pl_module.all_gather(parameter.detach())
            assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_train_one_model() -> None:
    denoiser = small()
    # The weight is zero at first: the projector must take part all the same.
    alignment = RepresentationAlignment(
        denoiser, "blocks.0", None, PatchProjector(16, 6), weight=lambda step: 0.5 * (step > 0)
    )
    model = FlowMatching(denoiser, alignment=alignment)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"devices": 2, "strategy": "ddp_fork", "enable_checkpointing": False, "callbacks": [EqualWeights()]}
    Trainer(max_epochs=1, **options, **QUIET).fit(model.objective(learning_rate=1e-2), loader(batches(6)))
    assert int(model.ema.n_averaged) == 3
    for name in ("denoiser.head.weight", "alignment.projectors.0.layers.weight", "ema.module.head.weight"):
        assert not torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize(("prediction", "mean", "deviation"), [("velocity", None, None), ("image", 0.8, 0.8)])
def test_times_are_drawn_as_published(prediction: str, mean: float | None, deviation: float | None) -> None:
    model = FlowMatching(small(), prediction=prediction)
    seen = []
    forward = model.denoiser.forward
    model.denoiser.forward = lambda x, time, label: seen.append(time) or forward(x, time, label)
    model.training_loss({"image": torch.randn(1500, 3, 8, 8), "label": torch.zeros(1500, dtype=torch.int64)})
    time = seen[0]
    if mean is None:
        assert float(time.mean()) == pytest.approx(0.5, abs=0.04)
        assert float(time.var()) == pytest.approx(1 / 12, abs=0.01)
    else:
        assert float(time.logit().mean()) == pytest.approx(mean, abs=0.1)
        assert float(time.logit().std()) == pytest.approx(deviation, abs=0.1)


def test_class_dropout_uses_no_class() -> None:
    model = FlowMatching(small(), class_dropout=0.5)
    seen = []
    forward = model.denoiser.forward
    model.denoiser.forward = lambda x, time, label: seen.append(label) or forward(x, time, label)
    model.training_loss({"image": torch.randn(400, 3, 8, 8), "label": torch.zeros(400, dtype=torch.int64)})
    assert 0.4 < float((seen[0] == 2).float().mean()) < 0.6


@pytest.mark.parametrize("options", [{"prediction": "noise"}, {"class_dropout": 1.0}, {"ema_decay": 1.0}])
def test_bad_options_are_named(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        FlowMatching(small(), **options)


def test_bad_sampling_is_named() -> None:
    with pytest.raises(ValueError, match="steps"):
        FlowMatching(small()).sample(torch.tensor([0]), steps=0)
    with pytest.raises(ValueError, match="method"):
        FlowMatching(small()).sample(torch.tensor([0]), method="rk4")
