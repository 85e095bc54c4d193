"""One battery for all layers with structure: what torch's own layers can do, these can."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from subspan import nn
from subspan.nn import (
    ISTA,
    MLP,
    AttentionPool2d,
    Butterfly,
    ConcreteGate,
    ConvAutoencoder,
    ConvBlock,
    ConvDecoder,
    ConvEncoder,
    CRATEDecoderLayer,
    CRATELayer,
    GrassmannBlock,
    GrassmannHead,
    GrassmannMixing,
    GrassmannPairHead,
    GroupedSimVQ,
    HouseholderProjector,
    LatentMapper,
    LinearAutoencoder,
    MatryoshkaAdapter,
    MatryoshkaLinear,
    OrthogonalLinear,
    PatchProjector,
    ResidualConvBlock,
    ResidualSimVQ,
    SameConv2d,
    SameConvTranspose2d,
    ScalogramEncoder,
    SeriesEncoder,
    SimplexClassifier,
    SimVQ,
    SparseAutoencoder,
    SpatialNorm,
    SpectrumEncoder,
    StochasticGate,
    SubspaceAttention,
    SubspaceSelfAttention,
    TopKGate,
)

pytestmark = pytest.mark.filterwarnings("ignore")


class Case(NamedTuple):
    """How a layer is made and what goes in; `wrong`: input it must refuse.

    onnx: its operations exist there, and its sizes, traced to tensors, are not checked as numbers.
    """

    make: Callable[[], torch.nn.Module]
    shape: tuple[int, ...]
    wrong: tuple[int, ...] | None
    onnx: bool = True
    # Half precision comes in as it is, or, as with torch's own linear layers, to a layer of half precision.
    half: bool = True
    # Biases that a batch norm takes out again, whose gradient is zero but for rounding.
    void: tuple[str, ...] = ()
    # Infinity has a finite value, as in a sigmoid.
    bounded: bool = False


class Called(torch.nn.Module):
    """A layer that is called otherwise than with one tensor, or whose first axis is not that of the rows."""

    def __init__(self, layer: torch.nn.Module, how: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(self.layer, x)


def sentences(head: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The first half is the premise, the rest the hypothesis."""
    return head(x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :])


def through(autoencoder: Any, x: torch.Tensor) -> torch.Tensor:
    return autoencoder.decode(autoencoder.encode(x)[-1])


LAYERS = {
    "AttentionPool2d": Case(lambda: AttentionPool2d(16), (2, 16, 5, 4), (2, 15, 5, 4), half=False),
    "OrthogonalLinear, givens": Case(
        lambda: OrthogonalLinear(8, init="random", orthogonal_map="givens"), (3, 8), (3, 7), onnx=False
    ),
    "OrthogonalLinear": Case(lambda: OrthogonalLinear(8, init="random"), (3, 8), (3, 7), onnx=False),
    "GrassmannHead": Case(lambda: GrassmannHead(8, 5, rank=2), (3, 8), (3, 7)),
    "Butterfly": Case(lambda: Butterfly(8, 5), (3, 8), (3, 7)),
    "Butterfly, BPBP": Case(
        lambda: Butterfly(8, 8, complex=True, real_part=True, blocks=2, permutation="bit-reversal"),
        (3, 8),
        (3, 7),
        False,
    ),
    "Butterfly, orthogonal": Case(lambda: Butterfly(8, 8, constraint="orthogonal"), (3, 8), (3, 7)),
    "SimVQ": Case(lambda: SimVQ(8, 32), (3, 4, 8), (3, 4, 7)),
    "SimVQ, rotation": Case(lambda: SimVQ(8, 32, estimator="rotation"), (3, 4, 8), (3, 4, 7)),
    "ResidualSimVQ": Case(lambda: ResidualSimVQ(8, 32, 2, channel_dim=1), (3, 8, 4), (3, 7, 4)),
    "HouseholderProjector": Case(lambda: HouseholderProjector(8, 6, 3, gain="learned"), (3, 8), (3, 7), onnx=False),
    "GrassmannMixing": Case(lambda: GrassmannMixing(8, 4, (1, 2)), (3, 6, 8), (3, 6, 7), half=False),
    "GrassmannBlock": Case(
        lambda: GrassmannBlock(8, GrassmannMixing(8, 4, (1, 2)), dropout=0.0), (3, 6, 8), (3, 6, 7), half=False
    ),
    "GrassmannPairHead": Case(
        lambda: Called(
            GrassmannPairHead(8, 3, rank=8, window=4, stride=2, d_model=8, heads=2, ffn=16, dropout=0.0), sentences
        ),
        (3, 10, 8),
        (3, 10, 7),
        half=False,
    ),
    "CRATELayer": Case(lambda: CRATELayer(8, 2), (3, 6, 8), (3, 6, 7), half=False),
    "CRATELayer, strict": Case(lambda: CRATELayer(8, 2, strict="gradient"), (3, 6, 8), (3, 6, 7), False, False),
    "CRATEDecoderLayer": Case(lambda: CRATEDecoderLayer(8, 2), (3, 6, 8), (3, 6, 7), half=False),
    "SubspaceAttention": Case(
        lambda: SubspaceAttention(8, 2), (3, 8, 5, 4), (3, 7, 5, 4), void=("depthwise.bias", "pointwise.bias")
    ),
    "GroupedSimVQ": Case(lambda: GroupedSimVQ(8, 32, 2), (3, 4, 8), (3, 4, 7)),
    "ISTA": Case(lambda: ISTA(8), (3, 6, 8), (3, 6, 7), half=False),
    "SubspaceSelfAttention": Case(lambda: SubspaceSelfAttention(8, 2), (3, 6, 8), (3, 6, 7), half=False),
    "MLP": Case(lambda: MLP((8, 6, 5), norm="layer"), (3, 4, 8), (3, 4, 7), half=False),
    "ConvBlock": Case(lambda: ConvBlock(4, 6), (3, 4, 5, 5), (3, 3, 5, 5), half=False),
    "ResidualConvBlock": Case(lambda: ResidualConvBlock(4, 6, stride=2), (3, 4, 6, 6), (3, 3, 6, 6), half=False),
    "ConvEncoder": Case(lambda: ConvEncoder((2, 16, 16), 5, width=2), (3, 2, 16, 16), (3, 1, 16, 16), half=False),
    "ConvDecoder": Case(
        lambda: ConvDecoder(5, (2, 16, 16), width=2, block="plain"), (3, 5), (3, 4), half=False, bounded=True
    ),
    "SeriesEncoder": Case(
        lambda: SeriesEncoder(2, 5, width=2, dropout=0.0), (3, 2, 32), (3, 1, 32), onnx=False, half=False
    ),
    "SpectrumEncoder": Case(
        lambda: SpectrumEncoder((2, 2, 17), 5, width=2), (3, 2, 2, 17), (3, 2, 1, 17), onnx=False, half=False
    ),
    "ScalogramEncoder": Case(
        lambda: ScalogramEncoder((2, 8, 16), 5, width=2), (3, 2, 8, 16), (3, 1, 8, 16), onnx=False, half=False
    ),
    # One bias of all outputs, whose weights in the loss here add up to 0.
    "LatentMapper": Case(lambda: LatentMapper(8, 4), (3, 8), None, onnx=False, half=False, void=("outward.bias",)),
    "SparseAutoencoder": Case(lambda: SparseAutoencoder(6, 12, 3), (7, 6), (7, 5), onnx=False, half=False),
    "SameConv2d": Case(lambda: SameConv2d(4, 6, 3), (3, 4, 5, 5), (3, 3, 5, 5), onnx=False, half=False),
    "SameConvTranspose2d": Case(
        lambda: SameConvTranspose2d(4, 6, 3, (7, 7)), (3, 4, 4, 4), (3, 3, 4, 4), onnx=False, half=False
    ),
    "ConvAutoencoder": Case(
        lambda: Called(ConvAutoencoder((2, 8, 8), (3, 4), (3, 3)), through),
        (3, 2, 8, 8),
        (3, 1, 8, 8),
        onnx=False,
        half=False,
        bounded=True,
    ),
    "LinearAutoencoder": Case(lambda: Called(LinearAutoencoder([8, 6, 4]), through), (3, 8), (3, 7), half=False),
    "MatryoshkaAdapter": Case(lambda: MatryoshkaAdapter(8, (2, 6), kind="linear"), (3, 8), (3, 7), half=False),
    "MatryoshkaLinear": Case(
        lambda: Called(MatryoshkaLinear((2, 8), 5), lambda heads, x: heads(x).movedim(0, 1)), (3, 8), (3, 7), half=False
    ),
    "PatchProjector": Case(lambda: PatchProjector(8, 5), (3, 4, 8), (3, 4, 7), onnx=False, half=False),
    "SimplexClassifier": Case(lambda: SimplexClassifier(4, 8, preallocated=6), (3, 8), (3, 7), onnx=False, half=False),
    "SpatialNorm": Case(SpatialNorm, (3, 4, 8), (3, 1, 8)),
    "ConcreteGate": Case(ConcreteGate, (3, 8), None, bounded=True),
    "StochasticGate": Case(StochasticGate, (3, 8), None, bounded=True),
    "TopKGate": Case(lambda: TopKGate(3), (3, 8), (3, 2)),
}

# Whole models, made of these layers; losses and penalties, which have no output of rows; what has no input; views,
# which have no parameters.
OTHERS = {
    *("CRATE", "CRATEAutoencoder", "CRATELanguageModel", "FlowTransformer", "GrassmannLanguageModel", "Objective"),
    *("CompatibleCE", "ContrastiveLoss", "HOCLoss", "LambdaOrthogonality", "MatryoshkaLogitLoss", "MatryoshkaLoss"),
    *(
        "InverseHingeLoss",
        "ProjectionPenalty",
        "SelfExpression",
        "SubspaceStructured",
        "HouseholderFrame",
        "GrassmannModule",
        "CodeUsage",
        "PublishedSAE",
        "FrameView",
        "FourierView",
        "MorletView",
    ),
}

# A process group is for layers that have something to share.
TRAINED = [name for name, case in LAYERS.items() if list(case.make().parameters())]

each_layer = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    case = LAYERS[name]
    return case.make(), torch.randn(case.shape)


def loss_of(output: Any) -> torch.Tensor:
    """A loss that reaches everything: weighted sums, and what a layer returns beside its value to be trained by."""
    found = value(output)
    weight = torch.linspace(-1, 1, found[0].numel()).reshape(found[0].shape)
    return (found * weight).mean() + (output.loss if hasattr(output, "loss") else 0)


def value(output: Any) -> torch.Tensor:
    """The tensor of an output that may be a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def test_every_public_layer_is_in_the_battery():
    face = {name for name in nn.__all__ if isinstance(getattr(nn, name, None), type)}
    modules = {name for name in face if issubclass(getattr(nn, name), torch.nn.Module)}
    assert {name.split(",")[0] for name in LAYERS} == modules - OTHERS


@pytest.mark.parametrize(
    "make",
    [
        lambda generator: Butterfly(6, 5, generator=generator),
        lambda generator: GrassmannHead(6, 3, rank=2, generator=generator),
        lambda generator: HouseholderProjector(6, 5, rank=2, generator=generator),
        lambda generator: OrthogonalLinear(4, init="random", generator=generator),
        lambda generator: ResidualSimVQ(4, 8, depth=2, generator=generator),
    ],
    ids=["Butterfly", "GrassmannHead", "HouseholderProjector", "OrthogonalLinear", "ResidualSimVQ"],
)
def test_a_generator_draws_all_of_the_start(make):
    first, second = (make(torch.Generator().manual_seed(0)).state_dict() for _ in range(2))
    other = make(torch.Generator().manual_seed(1)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@each_layer
def test_state_survives_a_file_and_a_copy(name):
    layer, x = made(name)
    layer.eval()
    expected = value(layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = LAYERS[name].make().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(value(other(x)), expected)
    torch.testing.assert_close(value(copy.deepcopy(layer)(x)), expected)
    assert type(layer).__name__ in repr(layer)


@each_layer
@pytest.mark.parametrize("assign", [False, True])
def test_state_makes_a_layer_of_the_meta_device_whole(name, assign):
    layer, x = made(name)
    layer.eval()
    with torch.device("meta"):
        other = LAYERS[name].make().eval()
    # What is not in the state must not be what happened to lie in memory.
    other.to_empty(device="cpu")
    for part in [*other.parameters(), *other.buffers()]:
        part.data.fill_(torch.nan if part.is_floating_point() or part.is_complex() else 7)
    other.load_state_dict(layer.state_dict(), assign=assign)
    torch.testing.assert_close(value(other(x)), value(layer(x)))


@each_layer
def test_every_parameter_and_the_input_have_a_finite_gradient(name):
    layer, x = made(name)
    x.requires_grad_()
    loss_of(layer(x)).backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        assert bool(parameter.grad.any()) or key in LAYERS[name].void, key
    assert bool(x.grad.isfinite().all())
    assert bool(x.grad.any())


@each_layer
def test_zero_input_gives_finite_values_and_gradients(name):
    layer, x = made(name)
    x = torch.zeros_like(x).requires_grad_()
    loss_of(layer(x)).backward()
    assert bool(x.grad.isfinite().all())
    assert all(bool(part.grad.isfinite().all()) for part in layer.parameters() if part.grad is not None)


@each_layer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_or_shown(name, bad):
    if bad == torch.inf and LAYERS[name].bounded:
        pytest.skip("infinity has a finite value")
    layer, x = made(name)
    layer.eval()
    x[(0,) * x.ndim] = bad
    try:
        found = value(layer(x))
    except ValueError:
        return
    assert not bool(found[0].isfinite().all())
    assert bool(found[1:].isfinite().all())


@each_layer
def test_half_precision_by_autocast_and_by_input(name):
    layer, x = made(name)
    layer.eval()
    expected = value(layer(x)).detach()
    scale = float(expected.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = value(layer(x)).detach()
    assert float((mixed - expected).abs().max()) < 0.05 * scale
    if not LAYERS[name].half:
        layer = layer.bfloat16()
    half = value(layer(x.bfloat16())).detach()
    assert float((half - expected).abs().max()) < 0.05 * scale


COMPILE = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("battery", sys.argv[1])
battery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(battery)
for name in battery.LAYERS:
    layer, x = battery.made(name)
    layer.eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(battery.value(compiled(x)), battery.value(layer(x)), atol=1e-5, rtol=1e-4)
"""


@pytest.mark.slow
def test_compiled_in_one_graph_they_say_the_same():
    # In a process of its own: the checks of shapes that the other tests run under are no part of a graph.
    done = subprocess.run([sys.executable, "-c", COMPILE, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def train_in_parallel(rank: int, address: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    made_layers = {name: made(name) for name in TRAINED}
    gradients = {}
    for name, (layer, x) in made_layers.items():
        rows = x[rank::2] if len(x) > 1 else x
        # Held until the gradients are there: without the wrapper nobody averages them.
        parallel = DistributedDataParallel(layer)
        loss_of(parallel(rows)).backward()
        gradients |= {f"{name}.{key}": p.grad for key, p in layer.named_parameters()}
    if rank == 0:
        save_file({key: grad.contiguous() for key, grad in gradients.items()}, file)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_their_gradients(tmp_path):
    file = tmp_path / "gradients.safetensors"
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('battery', sys.argv[1])\n"
        "battery = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(battery)\n"
        "battery.train_in_parallel(int(sys.argv[2]), sys.argv[3], sys.argv[4])\n"
    )
    command = [sys.executable, "-c", program, __file__]
    tail = [(tmp_path / "rendezvous").as_uri(), str(file)]
    running = [subprocess.Popen([*command, str(rank), *tail], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    for each in running:
        _, errors = each.communicate(timeout=200)
        assert each.returncode == 0, errors[-2000:]
    found = load_file(file)
    for name in TRAINED:
        layer, x = made(name)
        parts = [x[rank::2] if len(x) > 1 else x for rank in (0, 1)]
        for rows in parts:
            (loss_of(layer(rows)) / 2).backward()
        for key, parameter in layer.named_parameters():
            if key in LAYERS[name].void:
                continue
            scale = float(parameter.grad.abs().max())
            assert scale > 0, f"{name}.{key}"
            assert float((found[f"{name}.{key}"] - parameter.grad).abs().max()) < 1e-4 * scale, f"{name}.{key}"


@each_layer
def test_onnx_says_the_same(name, tmp_path):
    case = LAYERS[name]
    if not case.onnx:
        pytest.skip("has an operation that ONNX lacks")
    runtime = pytest.importorskip("onnxruntime")
    layer, x = made(name)
    layer.eval()
    path = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (x,), path, dynamo=False, input_names=["x"], opset_version=18)
    session = runtime.InferenceSession(path)
    found = session.run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), value(layer(x)).detach(), atol=1e-4, rtol=1e-4)


@each_layer
def test_input_of_another_shape_is_refused(name):
    layer, _ = made(name)
    if LAYERS[name].wrong is None:
        pytest.skip("takes any shape")
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(LAYERS[name].wrong))
