from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from processes import in_processes
from subspan.align import RepresentationAlignment, spatial_structure_of
from subspan.measures import spatial_structure
from subspan.models import FeatureGrid, ImagePreprocessing, capture
from subspan.nn import FlowTransformer, PatchProjector, SpatialNorm, cosine_matching_loss, resize_tokens

WIDTH, D = 8, 6


class Student(nn.Module):
    """Tokens of 4 × 4 patches, two layers; `extra` leading tokens that are no patches."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__()
        self.extra = extra
        self.embed = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).mT
        tokens = torch.cat([tokens.new_full((len(x), self.extra, WIDTH), 9.0), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(b: int = 2, h: int = 16, w: int = 16) -> torch.Tensor:
    return torch.randn(b, 3, h, w)


def features(b: int = 2, h: int = 4, w: int = 4) -> torch.Tensor:
    return torch.randn(b, D, h, w)


def test_the_loss_is_the_published_one() -> None:
    student, projector, x, teacher = Student(), PatchProjector(WIDTH, D), images(), features()
    alignment = RepresentationAlignment(student, "blocks.0", lambda clean: teacher + 0 * clean.mean(), projector)
    student(x + torch.randn_like(x))
    loss = alignment.loss(x)
    with RepresentationAlignment(student, "blocks.0", None, projector, weight=1.0) as again:
        student(x)
        states = student.blocks[0](student.embed(x).flatten(2).mT)
        value = again(teacher)
    expected = cosine_matching_loss(projector(states), SpatialNorm()(teacher.flatten(2).mT))
    torch.testing.assert_close(value, expected)
    assert -1 <= value.item() <= 1
    assert -0.5 <= loss.item() <= 0.5
    value.backward()
    assert student.embed.weight.grad is not None
    assert student.blocks[1][0].weight.grad is None
    assert projector.layers.weight.grad is not None


def test_no_norm_is_repa() -> None:
    student, projector, x, teacher = Student(), PatchProjector(WIDTH, D, "mlp", hidden=16), images(), features()
    alignment = RepresentationAlignment(student, "blocks.1", None, projector, None, weight=2.0)
    states = student(x)
    expected = 2 * cosine_matching_loss(projector(states), teacher.flatten(2).mT)
    torch.testing.assert_close(alignment.loss(teacher), expected)


def test_each_pass_counts_once_and_the_hook_goes() -> None:
    student = Student()
    hooks = [len(module._forward_hooks) for module in student.modules()]
    with RepresentationAlignment(student, 1, None, PatchProjector(WIDTH, D)) as alignment:
        assert alignment.layer == "blocks.1"
        with pytest.raises(ValueError, match="no new states"):
            alignment.loss(features())
        student(images())
        alignment.loss(features())
        with pytest.raises(ValueError, match="no new states"):
            alignment.loss(features())
    assert [len(module._forward_hooks) for module in student.modules()] == hooks
    student(images())
    with pytest.raises(ValueError, match="no new states"):
        alignment.loss(features())


def test_a_deep_copy_of_the_student_does_not_speak_for_it() -> None:
    student = Student()
    alignment = RepresentationAlignment(student, "blocks.0", None, PatchProjector(WIDTH, D))
    student(images())
    expected, _ = alignment.student_tokens()
    average = copy.deepcopy(student)
    student(images(3))
    average(images(5))
    assert len(alignment.student_tokens()[0]) == 3
    assert len(expected) == 2


def test_only_the_projector_is_its_own() -> None:
    student, teacher = Student(), nn.Conv2d(3, D, 4, stride=4)
    alignment = RepresentationAlignment(student, "blocks.0", teacher, PatchProjector(WIDTH, D))
    assert {name.split(".")[0] for name in alignment.state_dict()} == {"projectors"}
    student(images())
    alignment.loss(images()).backward()
    assert teacher.weight.grad is None
    assert teacher.training


def test_a_teacher_module_runs_in_evaluation_mode() -> None:
    seen = []

    class Teacher(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return nn.functional.avg_pool2d(x, 4)

    student = Student()
    alignment = RepresentationAlignment(student, "blocks.0", Teacher(), PatchProjector(WIDTH, 3))
    student(images())
    alignment.loss(images())
    assert seen == [(False, False)]


def test_several_teachers_are_averaged() -> None:
    student, x = Student(), images()
    teachers = [features(), torch.randn(2, 16, 5)]
    projectors = [PatchProjector(WIDTH, D), PatchProjector(WIDTH, 5, "linear")]
    alignment = RepresentationAlignment(student, "blocks.0", None, projectors)
    single = [RepresentationAlignment(student, "blocks.0", None, each) for each in projectors]
    student(x)
    apart = torch.stack([each(given) for each, given in zip(single, teachers)])
    torch.testing.assert_close(alignment(teachers), apart.mean())
    called = RepresentationAlignment(student, "blocks.0", [lambda _: teachers[0], lambda _: teachers[1]], projectors)
    student(x)
    torch.testing.assert_close(called(x), apart.mean())
    student(x)
    with pytest.raises(ValueError, match="cached features of 2 teachers"):
        alignment(teachers[:1])
    with pytest.raises(ValueError, match="one a teacher"):
        RepresentationAlignment(student, "blocks.0", [lambda x: x], projectors)


@pytest.mark.parametrize("mode", ["bicubic", "area"])
def test_grids_that_differ_and_are_not_square(mode) -> None:
    student, teacher, projector = Student(), features(2, 6, 10), PatchProjector(WIDTH, D)
    alignment = RepresentationAlignment(student, "blocks.0", None, projector, None, hw=(3, 5), resize=mode)
    states = student.blocks[0](student.embed(images(2, 12, 20)).flatten(2).mT)
    torch.manual_seed(0)
    x = images(2, 12, 20)
    states = student.blocks[0](student.embed(x).flatten(2).mT)
    alignment.remove()
    alignment = RepresentationAlignment(student, "blocks.0", None, projector, None, hw=(3, 5), resize=mode)
    student(x)
    target = resize_tokens(teacher.flatten(2).mT, (6, 10), (3, 5), mode=mode)
    torch.testing.assert_close(alignment(teacher), cosine_matching_loss(projector(states, (3, 5)), target))
    # The same as tokens, whose grid must be told.
    tokens = RepresentationAlignment(
        student, "blocks.0", None, projector, None, hw=(3, 5), teacher_hw=(6, 10), resize=mode
    )
    student(x)
    torch.testing.assert_close(tokens(teacher.flatten(2).mT), cosine_matching_loss(projector(states, (3, 5)), target))


def test_teachers_are_normalised_on_the_student_s_grid() -> None:
    teacher = features(2, 8, 8)
    with RepresentationAlignment(Student(), "blocks.0", None, PatchProjector(WIDTH, D)) as alignment:
        (target,) = alignment.targets(teacher, (4, 4))
    resized = F.interpolate(teacher, (4, 4), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(
        target, (resized - 0.8 * resized.mean(1, keepdim=True)) / (resized.std(1, keepdim=True) + 1e-6)
    )
    torch.testing.assert_close(target.std(1), torch.ones(2, D), atol=1e-4, rtol=0)


def test_leading_tokens_are_stripped() -> None:
    student, plain, projector, x = Student(extra=3), Student(), PatchProjector(WIDTH, D), images()
    plain.load_state_dict(student.state_dict())
    teacher = torch.randn(2, 17, D)
    alignment = RepresentationAlignment(student, "blocks.0", None, projector, drop_tokens=3, teacher_drop_tokens=1)
    reference = RepresentationAlignment(plain, "blocks.0", None, projector)
    student(x)
    plain(x)
    torch.testing.assert_close(alignment(teacher), reference(teacher[:, 1:]))


def test_maps_and_functions_of_the_output() -> None:
    student, x = Student(), images()
    mapped = RepresentationAlignment(student, "embed", None, PatchProjector(WIDTH, D))
    student(x)
    tokens, grid = mapped.student_tokens()
    assert grid == (4, 4)
    torch.testing.assert_close(tokens, student.embed(x).flatten(2).mT)
    cut = RepresentationAlignment(
        student, "embed", None, PatchProjector(WIDTH, D), tokens=lambda output: output[..., :2].flatten(2).mT, hw=(4, 2)
    )
    student(x)
    tokens, grid = cut.student_tokens()
    assert grid == (4, 2)
    torch.testing.assert_close(tokens, student.embed(x)[..., :2].flatten(2).mT)


def test_a_feature_grid_teaches() -> None:
    teacher_model = nn.Sequential(nn.Conv2d(3, D, 4, stride=4), nn.ReLU())
    teacher = FeatureGrid(teacher_model, "0")
    student, x = Student(), images()
    alignment = RepresentationAlignment(student, "blocks.0", teacher, PatchProjector(WIDTH, D))
    reference = RepresentationAlignment(student, "blocks.0", teacher_model[0], alignment.projectors[0])
    student(x)
    torch.testing.assert_close(alignment(x), reference(x))


@pytest.mark.parametrize("n", [2, 16])
def test_a_student_that_has_tokens_first(n: int) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, WIDTH, 4, stride=4)
            self.block = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.embed(x).flatten(2).permute(2, 0, 1)).transpose(0, 1)

    student, projector, x, teacher = Turned(), PatchProjector(WIDTH, D), images(n), features(n)
    with RepresentationAlignment(student, "block", None, projector, weight=1.0) as alignment:
        states = student(x)
        expected = cosine_matching_loss(projector(states), SpatialNorm()(teacher.flatten(2).mT))
        torch.testing.assert_close(alignment(teacher), expected)


def test_states_are_those_of_the_layer_though_the_student_goes_on_in_place() -> None:
    student = nn.Sequential(nn.Conv2d(3, WIDTH, 4, stride=4), nn.ReLU(inplace=True))
    projector, x, teacher = PatchProjector(WIDTH, D, "linear"), images(), features()
    with RepresentationAlignment(student, "0", None, projector) as alignment:
        student(x)
        tokens = student[0](x).flatten(2).mT
        expected = cosine_matching_loss(projector(tokens), SpatialNorm()(teacher.flatten(2).mT))
        torch.testing.assert_close(alignment(teacher), expected)


def test_the_weight_may_be_a_schedule() -> None:
    student, x, teacher = Student(), images(), features()
    calls = []

    def teach(clean: torch.Tensor) -> torch.Tensor:
        calls.append(len(clean))
        return teacher

    projector = PatchProjector(WIDTH, D)
    alignment = RepresentationAlignment(
        student, "blocks.0", teach, projector, weight=lambda step: 0.5 * max(0.0, 1 - step / 10)
    )
    student(x)
    full = alignment.loss(x, step=0)
    student(x)
    torch.testing.assert_close(alignment.loss(x, step=5), full / 2)
    student(x)
    off = alignment.loss(x, step=10)
    assert float(off) == 0
    assert len(calls) == 2
    off.backward()
    assert projector.layers.weight.grad is not None
    student(x)
    with pytest.raises(ValueError, match="step: needed"):
        alignment.loss(x)
    alignment.weight = lambda step: -1.0
    with pytest.raises(ValueError, match="weight: finite"):
        alignment.loss(x, step=1)


@pytest.mark.parametrize("first", ["hook", "compile"])
def test_a_compiled_student(first: str) -> None:
    student, projector, x, teacher = Student(), PatchProjector(WIDTH, D), images(), features()
    reference = RepresentationAlignment(student, "blocks.0", None, projector)
    student(x)
    expected = reference(teacher)
    reference.remove()
    if first == "hook":
        alignment = RepresentationAlignment(student, "blocks.0", None, projector)
        compiled = torch.compile(student, backend="eager")
    else:
        compiled = torch.compile(student, backend="eager")
        alignment = RepresentationAlignment(compiled, "blocks.0", None, projector)
    for _ in range(2):
        compiled(x)
        loss = alignment(teacher)
        torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.embed.weight.grad is not None
    torch._dynamo.reset()


def test_a_distributed_student() -> None:
    def train(rank: int) -> None:
        student = nn.parallel.DistributedDataParallel(Student())
        alignment = RepresentationAlignment(student, "blocks.0", None, PatchProjector(WIDTH, D))
        assert alignment.layer == "blocks.0"
        x = images()
        (student(x).square().mean() + alignment.loss(features())).backward()
        assert all(parameter.grad is not None for parameter in student.parameters())

    in_processes(train)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    student = Student().to(dtype)
    projector = PatchProjector(WIDTH, D)
    alignment = RepresentationAlignment(student, "blocks.0", None, projector)
    x, teacher = images().to(dtype), (200 + features()).to(dtype)
    with capture(student, "blocks.0") as states:
        student(x)
    loss = alignment(teacher)
    assert loss.dtype == torch.float32
    projected = projector(states["blocks.0"].float())
    target = SpatialNorm()(teacher.float().flatten(2).mT).to(dtype)
    torch.testing.assert_close(loss, cosine_matching_loss(projected, target))


def test_constant_teachers_give_a_finite_loss() -> None:
    student = Student()
    alignment = RepresentationAlignment(student, "blocks.0", None, PatchProjector(WIDTH, D))
    student(images())
    loss = alignment(torch.full((2, D, 4, 4), 3.0))
    assert float(loss) == 0
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "blocks.7"}, "layer"),
        ({"layer": "block.0"}, "blocks.0"),
        ({"layer": "blocks.*"}, "one layer is needed"),
        ({"weight": -1.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"norm": "batch"}, "norm"),
        ({"tokens": "cls"}, "tokens"),
        ({"drop_tokens": -1}, "drop_tokens"),
        ({"projector": []}, "projector"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    arguments = {"layer": "blocks.0", "teacher": None, "projector": PatchProjector(WIDTH, D), **options}
    with pytest.raises(ValueError, match=message):
        RepresentationAlignment(Student(), **arguments)


@pytest.mark.parametrize(
    ("options", "size", "teacher", "message"),
    [
        ({}, (12, 20), torch.ones(2, D, 3, 5), "hw: needed, because 15 tokens"),
        ({"hw": (3, 5)}, (16, 16), torch.ones(2, D, 4, 4), "hw: a grid of 16"),
        ({"resize": None}, (16, 16), torch.ones(2, D, 8, 8), "resize: None"),
        ({}, (16, 16), torch.ones(2, 12, D), "teacher 0: hw: needed"),
        ({}, (16, 16), torch.ones(2, D + 1, 4, 4), "projector: teacher 0 gives"),
        ({}, (16, 16), torch.ones(3, D, 4, 4), "projector: teacher 0 gives"),
        ({}, (16, 16), torch.ones(2, D), "teacher 0: tokens"),
        ({"drop_tokens": 16}, (16, 16), torch.ones(2, D, 4, 4), "leave none"),
        ({}, (4, 4), torch.ones(2, D, 1, 1), "at least 2 tokens"),
    ],
)
def test_what_does_not_fit_is_named(options: dict, size: tuple, teacher: torch.Tensor, message: str) -> None:
    student = Student()
    alignment = RepresentationAlignment(student, "blocks.0", None, PatchProjector(WIDTH, D), **options)
    student(images(2, *size))
    with pytest.raises(ValueError, match=message):
        alignment(teacher)


def test_a_layer_that_gives_no_tokens() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 4))
    alignment = RepresentationAlignment(network, "1", None, PatchProjector(4, D))
    network(images(2, 4, 4))
    with pytest.raises(ValueError, match="layer '1': tokens"):
        alignment(features())


def test_structure_of_a_convolutional_network() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 2, stride=2), nn.Tanh())
    pictures = (torch.rand(5, 3, 16, 16) * 255).to(torch.uint8)
    prepare = ImagePreprocessing(size=16, resize="squash")
    found = spatial_structure_of(network, pictures, "1", preprocessing=prepare, batch_size=2)
    with torch.no_grad():
        tokens = network(prepare.batch(pictures)).flatten(2).mT
    for name, value in spatial_structure(tokens).items():
        torch.testing.assert_close(found[name], value)
    normed = spatial_structure_of(network, pictures, "1", preprocessing=prepare, norm=SpatialNorm())
    torch.testing.assert_close(normed["lds"], spatial_structure(SpatialNorm()(tokens))["lds"])
    masks = torch.zeros(5, 8, 8)
    masks[:, :3] = 1
    srss = spatial_structure_of(network, pictures, "1", preprocessing=prepare, masks=masks, metrics=["srss"])
    torch.testing.assert_close(srss["srss"], spatial_structure(tokens, metrics=["srss"], masks=masks)["srss"])
    with pytest.raises(ValueError, match="masks"):
        spatial_structure_of(network, pictures, "1", preprocessing=prepare, masks=masks[:4], metrics=["srss"])
    with pytest.raises(ValueError, match="images"):
        spatial_structure_of(network, [], "1")


def test_structure_of_a_transformer_without_its_class_token() -> None:
    transformers = pytest.importorskip("transformers", reason="a transformers model is asked (extra: text)")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=4
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    pictures = (torch.rand(2, 3, 32, 32) * 255).to(torch.uint8)
    prepare = ImagePreprocessing(size=32, resize="squash")
    found = spatial_structure_of(model, pictures, "layernorm", preprocessing=prepare)
    with torch.no_grad():
        tokens = model(prepare.batch(pictures)).last_hidden_state[:, 1:]
    torch.testing.assert_close(found["lds"], spatial_structure(tokens)["lds"])


def test_a_flow_transformer_is_aligned_at_an_inner_block() -> None:
    student = FlowTransformer((8, 16), patch=2, width=16, depth=2, heads=2, classes=3)
    x = images(2, 8, 16)
    alignment = RepresentationAlignment(student, "blocks.0", None, PatchProjector(16, D), hw=student.hw)
    student(x, torch.rand(2), torch.tensor([0, 3]))
    alignment.loss(features(2, 4, 8)).backward()
    assert student.embed.weight.grad is not None
