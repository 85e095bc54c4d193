"""One contract for every training: the loss falls, its terms are logged, NaN is refused, a stopped run resumes."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="an Objective trains with Lightning (extra: train)")

from lightning import Callback

from subspan.align import (
    BackwardCompatibleModule,
    BT2Head,
    BT2Loss,
    RepresentationAlignment,
    ReVision,
    StationaryModule,
)
from subspan.cluster import ManifoldLinearizingModule
from subspan.cluster.deep_training import DSCNetModule, SelfExpressionModule, StructureModule, reconstruction_loss
from subspan.models.splice import IGNORED, PLACEHOLDER
from subspan.nn import (
    FlowTransformer,
    GrassmannHead,
    GrassmannParameter,
    LinearAutoencoder,
    MatryoshkaAdapter,
    Objective,
    PatchProjector,
    SimplexClassifier,
    WithRiemannian,
)
from subspan.nn.denoising import DenoisingLoss, DenoisingMLP, PreconditionedDenoiser
from subspan.nn.dual_encoder import DualEncoder
from subspan.nn.flow_matching import FlowMatching
from subspan.nn.pointnet import PointContrast
from subspan.nn.subspace_cluster_heads import SubspaceClusterHeads
from subspan.nn.training import quiet_trainer
from subspan.represent import NestedTraining

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to .self.log")


class Case(NamedTuple):
    """How an objective is made, its batches of one epoch, and what it logs beside the loss."""

    make: Callable[[], Objective]
    batches: Callable[[], list[Any]]
    terms: tuple[str, ...] = ()
    epochs: int = 4
    # Parameters that the first step does not reach.
    later: str = "-"


def rows(n: int = 64, d: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return x, (x[:, :2].sum(1) > 0).long()


def labelled() -> list[Any]:
    x, y = rows()
    return list(zip(x.split(16), y.split(16)))


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def terms(model: nn.Module, batch: Any, step: int) -> dict[str, torch.Tensor]:
    return {"fit": cross_entropy(model, batch), "size": 1e-3 * (1 + step) * model(batch[0]).square().mean()}


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return F.cross_entropy(self.scale * model(batch[0]), batch[1]), {"scale": self.scale}


def line(**options: Any) -> Objective:
    return Objective(nn.Linear(6, 2), cross_entropy, **{"learning_rate": 0.05, **options})


def with_planes(schedule: str = "cosine") -> Objective:
    model = nn.Sequential(nn.Linear(6, 6), GrassmannHead(6, 2, rank=2))
    return Objective(model, cross_entropy, optimizer="sgd", learning_rate=0.05, momentum=0.9, schedule=schedule)


def batches(*columns: torch.Tensor, size: int = 16) -> list[Any]:
    return list(zip(*(column.split(size) for column in columns)))


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])), dim=-1)


def backward_compatible() -> Objective:
    head = BT2Head(16, 8, 6, 2, num_classes=2)
    backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
    return BackwardCompatibleModule(backbone, head, BT2Loss(unit(64, 6)[:2])).objective(learning_rate=1e-2)


def stationary() -> Objective:
    module = StationaryModule(nn.Linear(6, 7), SimplexClassifier(2, preallocated=8))
    module.start_task(2)
    # The second task has a teacher.
    module.start_task(2)
    return module.objective(learning_rate=0.1)


def language_model(stage: int) -> Objective:
    transformers = pytest.importorskip("transformers", reason="ReVision needs a language model (extra: llm)")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes))
    return ReVision(llm, None, d=6, n_tokens=2, stage=stage).objective(learning_rate=1e-2)


def spoken() -> list[Any]:
    ids = torch.arange(2, 18).repeat(16).reshape(64, 4)
    ids = torch.cat([torch.full((64, 1), PLACEHOLDER), ids], 1)
    labels = ids.masked_fill(ids == PLACEHOLDER, IGNORED)
    columns = {"embedding": rows()[0], "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [dict(zip(columns, each)) for each in batches(*columns.values())]


def linearizing(warmup: int, **options: Any) -> Objective:
    heads = SubspaceClusterHeads(6, 16, 4)
    return ManifoldLinearizingModule(heads, warmup=warmup, augment=lambda x: x + 0.01 * torch.randn_like(x)).objective(
        **options
    )


def full_batch(make: Callable[[LinearAutoencoder], nn.Module]) -> Objective:
    module: Any = make(LinearAutoencoder([6, 5, 4]))
    watch = getattr(type(module), "watch", None)
    return Objective(module, type(module).training_loss, optimizer="adam", learning_rate=1e-2, after_step=watch)


def flowing() -> Objective:
    denoiser = FlowTransformer(8, patch=2, width=16, depth=2, heads=2, classes=2)
    alignment = RepresentationAlignment(denoiser, "blocks.0", None, PatchProjector(16, 6), None)
    return FlowMatching(denoiser, alignment=alignment).objective(learning_rate=1e-2)


def pictures() -> list[Any]:
    x, y = rows(32, 192)
    images = (0.2 * x.reshape(-1, 3, 8, 8)).clamp(-1, 1)
    return [
        {"image": image, "label": label, "teacher": image[:, :, ::2, ::2].repeat(1, 2, 1, 1)}
        for image, label in batches(images, y, size=8)
    ]


def pairs() -> list[Any]:
    x = rows()[0]
    return [{"image": each, "text": each[:, :5], "group": torch.arange(16)} for each in x.split(16)]


def nested(objective: str) -> Objective:
    adapter = MatryoshkaAdapter(6, (2, 6), kind="linear")
    classes = 2 if objective == "labels" else 0
    return NestedTraining(adapter, objective, dims=(2, 6), num_classes=classes).objective(learning_rate=2e-2)


CASES = {
    "adamw, constant": Case(line, labelled),
    "sgd, warm-up, cosine": Case(
        lambda: line(optimizer="sgd", momentum=0.9, schedule="cosine", warmup=0.1, final_rate=0.1), labelled
    ),
    "terms, one cycle": Case(
        lambda: Objective(nn.Linear(6, 2), terms, learning_rate=0.05, schedule="one-cycle", warmup=0.3),
        labelled,
        ("fit", "size"),
    ),
    "loss with a parameter": Case(
        lambda: Objective(nn.Linear(6, 2), Scaled(), optimizer="adam", learning_rate=0.05), labelled, ("scale",)
    ),
    "planes": Case(with_planes, labelled),
    "BackwardCompatibleModule": Case(
        backward_compatible,
        lambda: batches(*rows(), unit(64, 6), unit(64, 8)),
        ("classification", "new_matching", "influence", "old_matching"),
    ),
    "StationaryModule": Case(stationary, labelled),
    "ReVision, stage 1": Case(lambda: language_model(1), spoken),
    "ReVision, stage 2": Case(lambda: language_model(2), spoken),
    "ManifoldLinearizingModule, stage one": Case(
        lambda: linearizing(99), labelled, ("coding_rate",), 4, "model.heads.cluster"
    ),
    "ManifoldLinearizingModule, memberships": Case(
        lambda: linearizing(0, optimizer="sgd"), labelled, ("expansion", "compression"), 4, "model.heads.cluster"
    ),
    "reconstruction_loss": Case(
        lambda: Objective(LinearAutoencoder([6, 5, 4]), reconstruction_loss, optimizer="adam"), lambda: [rows()[0]]
    ),
    "SelfExpressionModule": Case(
        lambda: full_batch(lambda network: SelfExpressionModule(64, autoencoder=network, layers=(0, 1))),
        lambda: [rows()[0]],
    ),
    "StructureModule": Case(
        lambda: full_batch(lambda _: StructureModule(rows(8, 8)[0].abs(), lambda c, before: torch.arange(8) // 4)),
        lambda: [rows()[0]],
    ),
    "DSCNetModule": Case(
        lambda: full_batch(lambda network: DSCNetModule(64, network, coefficient_weight=1.0, expression_weight=0.2)),
        lambda: [rows()[0]],
    ),
    "DenoisingLoss": Case(
        lambda: Objective(PreconditionedDenoiser(DenoisingMLP(6, 16), 1.0), DenoisingLoss(1.0), learning_rate=1e-2),
        lambda: batches(rows()[0].repeat(8, 1)),
    ),
    "DualEncoder": Case(lambda: DualEncoder(6, 5, d=4, hidden=16).objective(learning_rate=1e-2), pairs),
    "FlowMatching": Case(flowing, pictures, ("denoising_loss", "alignment_loss")),
    "PointContrast": Case(
        lambda: PointContrast(16, keep=16).objective(), lambda: list(unit(64, 20, 3).split(16)), (), 8
    ),
    "NestedTraining, labels": Case(lambda: nested("labels"), labelled),
    "NestedTraining, pairs": Case(
        lambda: nested("pairs"), lambda: batches(rows()[0], rows()[0] + 0.1 * unit(64, 6)), (), 8
    ),
    "NestedTraining, similarity": Case(lambda: nested("similarity"), labelled),
}

each = pytest.mark.parametrize("name", CASES)


class Reseed(Callback):
    """The same draws in a step, whether the run began with it or before it."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)


def made(name: str) -> Objective:
    torch.manual_seed(0)
    return CASES[name].make()


def fit(objective: Objective, batches: list[Any], epochs: int, path: Any = None, **options: Any) -> Any:
    loader = DataLoader(batches, batch_size=None)
    with quiet_trainer(max_epochs=epochs, **{"callbacks": [Reseed()], **options}) as trainer:
        trainer.fit(objective, loader, ckpt_path=path, weights_only=None if path is None else True)
    return trainer


@each
def test_the_loss_falls_and_its_terms_are_logged(name):
    objective, case = made(name), CASES[name]
    trainer = fit(objective, case.batches(), case.epochs)
    assert len(objective.losses) == case.epochs
    assert objective.losses[-1] < objective.losses[0]
    assert set(trainer.callback_metrics) == {"loss", *case.terms}


@each
def test_every_parameter_that_is_trained_has_a_gradient_and_a_group(name):
    objective, case = made(name), CASES[name]
    torch.manual_seed(1)
    objective.training_step(case.batches()[0]).backward()
    learnt = {key: p for key, p in objective.named_parameters() if p.requires_grad}
    for key, parameter in learnt.items():
        if not key.startswith(case.later):
            assert parameter.grad is not None, key
            assert bool(parameter.grad.isfinite().all()), key
    grouped = [id(p) for group in objective.parameter_groups() for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, learnt.values()))


@each
def test_a_loss_that_is_not_finite_is_refused_with_its_step(name):
    objective, case = made(name), CASES[name]
    with torch.no_grad():
        for parameter in objective.model.parameters():
            if not isinstance(parameter, GrassmannParameter):
                parameter.fill_(torch.nan)
    # "the loss is nan at step 0", or a layer saw it before.
    with pytest.raises(ValueError, match=r"nan|NaN"):
        fit(objective, case.batches(), 1)


@each
def test_a_stopped_run_resumes_where_it_was(name, tmp_path):
    case = CASES[name]
    whole, first, resumed = made(name), made(name), made(name)
    fit(whole, case.batches(), 2)

    class Stop(Reseed):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    # The schedule needs the number of steps of the whole run.
    stopped = fit(first, case.batches(), 2, callbacks=[Stop()])
    assert stopped.current_epoch == 1
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, case.batches(), 2, tmp_path / "half.ckpt")
    assert resumed.losses == pytest.approx(whole.losses)
    state = whole.state_dict()
    assert any(not torch.equal(state[key], value) for key, value in first.state_dict().items())
    for key, value in resumed.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- rates, groups, hooks


@pytest.mark.parametrize(
    ("name", "optimizer", "schedule", "final", "decays"),
    [
        ("BackwardCompatibleModule", "adam", "cosine", 0.0, {1: 2**-15, 2: 2**-15}),
        ("StationaryModule", "sgd", "cosine", 1e-4, {1: 0.0, 2: 5e-4}),
        ("ManifoldLinearizingModule, memberships", "sgd", "constant", 0.0, {1: 1e-4, 2: 1e-4}),
        ("NestedTraining, labels", "adamw", "cosine", 0.0, {1: 1e-4, 2: 1e-4}),
        ("DualEncoder", "adamw", "one-cycle", 0.0, {1: 0.0, 2: 1e-2}),
    ],
)
def test_recipes_are_as_published(name, optimizer, schedule, final, decays):
    objective = made(name)
    assert (objective.optimizer, objective.schedule, objective.final_rate) == (optimizer, schedule, final)
    groups = objective.parameter_groups()
    found = {min(p.ndim, 2) or 1: group["weight_decay"] for group in groups[::-1] for p in group["params"]}
    assert found == decays


def rates(objective: Objective, steps: int = 40) -> list[float]:
    found: list[float] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            found.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(objective, labelled()[:1] * steps, 1, callbacks=[Look()])
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0: 1, 39: 1}),
        ({"warmup": 3}, {0: 1 / 4, 1: 2 / 4, 3: 1, 39: 1}),
        ({"schedule": "cosine"}, {0: 1, 20: 0.5, 39: (1 + math.cos(math.pi * 39 / 40)) / 2}),
        ({"schedule": "cosine", "warmup": 0.1}, {0: 1 / 5, 4: 1, 22: 0.5}),
        ({"schedule": "cosine", "final_rate": 0.2}, {0: 1, 20: 0.6}),
        ({"schedule": "one-cycle", "warmup": 0.25}, {0: 1 / 25, 9: 1, 39: 1 / 25e4}),
        ({"schedule": lambda o, n: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, n)}, {0: 1, 20: 0.5}),
    ],
)
def test_rates_follow_their_schedule(options, expected):
    found = rates(line(**options))
    assert {step: found[step] / 0.05 for step in expected} == pytest.approx(expected, abs=1e-6)


def test_groups_have_options_of_their_own_and_vectors_may_be_left_undecayed():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2), "headless": nn.Linear(2, 2)})
    model["body"].requires_grad_(False)
    objective = Objective(
        model,
        cross_entropy,
        weight_decay=0.1,
        decay_vectors=False,
        groups={"head.weight": {"lr": 0.5, "weight_decay": 0.3}},
    )
    found = {
        tuple(p.shape): (group.get("lr"), group["weight_decay"])
        for group in objective.parameter_groups()
        for p in group["params"]
    }
    assert found == {(2, 3): (0.5, 0.3), (2,): (None, 0.0), (2, 2): (None, 0.1)}
    with pytest.raises(ValueError, match=r"groups.*\['tail'\]"):
        line(groups={"tail": {"lr": 1.0}}).parameter_groups()
    with pytest.raises(ValueError, match="nothing to train"):
        Objective(nn.Linear(2, 2).requires_grad_(False), cross_entropy).parameter_groups()


def test_planes_take_geodesic_steps_beside_any_optimizer():
    objective = with_planes("constant")
    optimizer = objective.configure_optimizers()
    assert isinstance(optimizer, WithRiemannian)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
    objective.manifold_learning_rate = 0.2
    assert objective.configure_optimizers().param_groups[1]["lr"] == 0.2
    alone = Objective(objective.model[1], cross_entropy, learning_rate=0.3)
    planes = [p for p in alone.parameters() if isinstance(p, GrassmannParameter)]
    for parameter in alone.parameters():
        parameter.requires_grad_(isinstance(parameter, GrassmannParameter))
    (group,) = alone.configure_optimizers().param_groups
    assert (group["lr"], group["params"]) == (0.3, planes)


def test_what_follows_a_step_sees_its_number_and_may_end_the_run():
    seen = []
    objective = line(after_step=lambda model, step: seen.append((model, step)) or step == 5)
    trainer = fit(objective, labelled(), 3, accumulate_grad_batches=2)
    assert seen == [(objective.model, step) for step in range(1, 6)]
    assert trainer.global_step == 5


def test_validation_is_the_loss_or_a_measure_of_its_own():
    def measure(model: nn.Module, batch: Any, batch_index: int) -> dict[str, float]:
        return {"right": float((model(batch[0]).argmax(1) == batch[1]).float().mean()), "index": float(batch_index)}

    x, y = rows()
    held = DataLoader([(x[:10], y[:10]), (x[10:40], y[10:40])], batch_size=None)
    plain, measured = line(), line(validation=measure)
    with quiet_trainer(max_epochs=1) as trainer:
        (found,) = trainer.validate(plain, held, verbose=False)
        torch.testing.assert_close(found["val_loss"], float(cross_entropy(plain, (x[:40], y[:40])).detach()))
        (found,) = trainer.validate(measured, held, verbose=False)
    assert found["val_right"] == pytest.approx(float((measured(x[:40]).argmax(1) == y[:40]).float().mean()))
    assert found["val_index"] == pytest.approx(0.75)


def test_checkpoints_may_leave_out_what_is_frozen(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 2))
    objective = Objective(model, cross_entropy, save_frozen=False)
    before = copy.deepcopy(model.state_dict())
    fit(objective, labelled(), 1).save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {"model.1.weight", "model.1.bias"}
    again = Objective(copy.deepcopy(model), cross_entropy, save_frozen=False)
    fit(again, labelled(), 2, tmp_path / "last.ckpt")
    assert torch.equal(again.model[0].weight, before["0.weight"])
    assert len(again.losses) == 2


def test_two_processes_take_the_steps_of_one():
    x, y = rows()
    one, two = line(optimizer="sgd", learning_rate=0.5), line(optimizer="sgd", learning_rate=0.5)
    two.load_state_dict(one.state_dict())
    data = torch.utils.data.TensorDataset(x, y)
    with quiet_trainer(max_epochs=2) as trainer:
        trainer.fit(one, DataLoader(data, 64))
    with quiet_trainer(max_epochs=2, strategy="ddp_fork", devices=2) as trainer:
        trainer.fit(two, DataLoader(data, 32))
    torch.testing.assert_close(two.model.weight, one.model.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer"),
        ({"schedule": "step"}, "schedule"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"manifold_learning_rate": math.nan}, "manifold_learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"final_rate": math.inf}, "final_rate"),
        ({"warmup": 1.5}, "warmup"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        line(**options)


@pytest.mark.parametrize("found", [torch.ones(2), "loss", {}, (torch.ones(()), torch.ones(()))])
def test_what_is_no_loss_is_named(found):
    with pytest.raises(ValueError, match=r"^loss: must return a scalar"):
        Objective(nn.Linear(6, 2), lambda model, batch: found).training_step(labelled()[0])


def test_a_schedule_needs_the_length_of_the_run():
    with pytest.raises(ValueError, match="max_steps or max_epochs"):
        fit(line(schedule="cosine"), labelled(), -1)
