"""Optimisation on the Grassmann manifold."""

import copy
import io
import math
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from processes import in_processes
from subspan.geometry import principal_angles
from subspan.geometry.grassmann import geodesic, parallel_transport, random_basis, tangent_projection
from subspan.nn import GrassmannHead, GrassmannParameter, RiemannianSGD, riemannian, with_riemannian


def plane(d=12, k=3, batch=(), seed=0, dtype=torch.float64):
    start = random_basis(d, k, batch=batch, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return GrassmannParameter(start.mT.contiguous())


def test_one_step_is_the_geodesic_against_the_gradient():
    parameter = plane()
    start, gradient = parameter.detach().clone().mT, torch.randn(3, 12, dtype=torch.float64)
    parameter.grad = gradient
    RiemannianSGD([parameter], lr=0.1, momentum=0, max_angle=None).step()
    tangent = tangent_projection(start, gradient.mT)
    torch.testing.assert_close(parameter.detach().mT, geodesic(start, -0.1 * tangent), atol=1e-12, rtol=0)
    turned = principal_angles(start, parameter.detach().mT)
    expected = 0.1 * torch.linalg.svdvals(tangent).flip(0)
    torch.testing.assert_close(turned, expected, atol=1e-9, rtol=0)


def test_one_dimensional_planes_follow_great_circles():
    parameter = plane(k=1)
    s = parameter.detach()[0].clone()
    # Of length 1: a longer step would be cut.
    g = torch.nn.functional.normalize(torch.arange(12, dtype=torch.float64) - 4, dim=0)
    parameter.grad = g.unsqueeze(0)
    RiemannianSGD([parameter], lr=0.2, momentum=0).step()
    v = -0.2 * (g - s * (s @ g))
    great_circle = s * v.norm().cos() + v / v.norm() * v.norm().sin()
    torch.testing.assert_close(parameter.detach()[0], great_circle, atol=1e-12, rtol=0)


def test_no_gradient_no_motion_and_long_steps_are_bounded():
    parameter = plane()
    start = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    RiemannianSGD([parameter], weight_decay=0.1).step()
    assert torch.equal(parameter, start)
    parameter.grad = 1e6 * torch.randn(3, 12, dtype=torch.float64)
    RiemannianSGD([parameter], lr=1.0).step()
    length = torch.linalg.vector_norm(principal_angles(start.mT, parameter.detach().mT))
    assert float(length) == pytest.approx(math.pi / 4, abs=1e-6)


@pytest.mark.parametrize("transport", ["project", "parallel"])
def test_principal_planes_are_found_and_rows_stay_orthonormal_in_float32(transport):
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([3.0, 2.5, 2.0, *[0.3] * 17])
    data = torch.randn(400, 20, generator=generator) * scale
    data = data @ random_basis(20, 20, generator=generator, dtype=torch.float32)
    exact = torch.linalg.eigh(data.mT @ data)[1][:, -3:]
    parameter = plane(20, 3, dtype=torch.float32, seed=2)
    optimizer = RiemannianSGD([parameter], lr=0.05, transport=transport)
    for _ in range(300):
        optimizer.zero_grad()
        (-0.5 * (data @ parameter.mT).square().sum() / 400).backward()
        optimizer.step()
    assert float(principal_angles(parameter.detach().mT, exact).max()) < math.radians(0.1)
    gram = parameter.detach() @ parameter.detach().mT
    assert float((gram - torch.eye(3)).abs().max()) < 1e-6


def test_parallel_momentum_keeps_its_length_and_is_tangent():
    parameter = plane(batch=(4,))
    optimizer = RiemannianSGD([parameter], lr=0.3, momentum=0.5, transport="parallel", max_angle=None)
    gradient = torch.randn(4, 3, 12, dtype=torch.float64)
    tangent = tangent_projection(parameter.detach().mT, gradient.mT)
    parameter.grad = gradient
    optimizer.step()
    buffer = optimizer.state[parameter]["momentum_buffer"]
    torch.testing.assert_close(torch.linalg.matrix_norm(buffer), torch.linalg.matrix_norm(tangent))
    assert float((parameter.detach() @ buffer.mT).abs().max()) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("transport", ["project", "parallel"])
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_of_planes_take_the_steps_of_the_singular_values(
    dtype, tolerance, momentum, transport, turned, monkeypatch
):
    lr, bound = 0.1, 0.5
    # Two blocks of four planes and one of two, in a tensor of two leading dimensions.
    monkeypatch.setattr(riemannian, "_BLOCK_BYTES", 4 * 3 * 40 * dtype.itemsize // torch.get_num_threads())
    parameter = plane(40, 3, batch=(5, 2), dtype=dtype)
    if turned:  # of a layout that no view flattens
        parameter = GrassmannParameter(parameter.detach().transpose(0, 1).contiguous().transpose(0, 1))
    optimizer = RiemannianSGD([parameter], lr=lr, momentum=momentum, transport=transport, max_angle=bound)
    points, carried = parameter.detach().double().clone().mT, torch.zeros(5, 2, 40, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        gradient = torch.randn(5, 2, 3, 40, generator=generator, dtype=dtype)
        gradient[0] *= 1e-3  # as long as it is, where the bound cuts the others
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)
        velocity = tangent_projection(points, gradient.double().mT + momentum * carried)
        t = -lr * (bound / (lr * torch.linalg.matrix_norm(velocity))).clamp_max(1)
        step = t[..., None, None] * velocity
        carried = parallel_transport(points, step, velocity) if transport == "parallel" else velocity
        points = geodesic(points, step)
        torch.testing.assert_close(parameter.detach().double().mT, points, atol=tolerance, rtol=0)
        if momentum:
            buffer = optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(buffer.double().mT, carried, atol=30 * tolerance, rtol=0)


def test_a_plane_without_gradient_stays_to_the_bit_beside_others_that_move():
    parameter = plane(batch=(4,), dtype=torch.float32)
    start = parameter.detach().clone()
    parameter.grad = torch.randn(4, 3, 12)
    parameter.grad[1:3] = 0
    RiemannianSGD([parameter]).step()
    assert torch.equal(parameter[1:3], start[1:3])
    assert not torch.isclose(parameter[[0, 3]], start[[0, 3]]).all((1, 2)).any()


@pytest.mark.parametrize("transport", ["project", "parallel"])
@pytest.mark.parametrize("steps", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_rows_stay_orthonormal_in_float32_under_random_gradients(transport, steps):
    parameter = plane(10, 2, batch=(3,), dtype=torch.float32)
    optimizer = RiemannianSGD([parameter], lr=0.05, transport=transport)
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        parameter.grad = torch.randn(3, 2, 10, generator=generator)
        optimizer.step()
    assert float((parameter.detach() @ parameter.detach().mT - torch.eye(2)).abs().max()) < 1e-6


def test_rows_a_little_off_are_mended_by_the_step():
    parameter = plane()
    optimizer = RiemannianSGD([parameter])
    parameter.data += 1e-3 * torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter.grad = 1e-6 * torch.randn(3, 12, dtype=torch.float64)
    optimizer.step()
    assert float((parameter.detach() @ parameter.detach().mT - torch.eye(3)).abs().max()) < 1e-4


def test_half_precision_planes_keep_their_momentum_in_float32_also_when_loaded():
    parameter = plane(64, 3, batch=(2,), dtype=torch.float32)
    half = GrassmannParameter(parameter.detach().bfloat16())
    optimizer = RiemannianSGD([half])
    for _ in range(2):
        half.grad = torch.randn(2, 3, 64).bfloat16()
        optimizer.step()
        assert half.dtype == torch.bfloat16
        assert optimizer.state[half]["momentum_buffer"].dtype == torch.float32
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rows = half.detach().float()
    assert float((rows @ rows.mT - torch.eye(3)).abs().max()) < 2e-2


def test_other_parameters_take_torch_s_steps():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    pairs = [
        (ours, RiemannianSGD(ours.parameters(), **options)),
        (theirs, torch.optim.SGD(theirs.parameters(), **options)),
    ]
    x = torch.randn(8, 4)
    for layer, optimizer in pairs:
        for _ in range(5):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def run(model, optimizer, scheduler, steps, x, y):
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()


def made(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), GrassmannHead(8, 3, rank=2))
    optimizer = with_riemannian(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), 0.2)
    return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)


@pytest.mark.filterwarnings("ignore:features")
def test_beside_adamw_one_schedule_rules_both_and_a_resumed_run_is_the_same_run():
    torch.manual_seed(5)
    x, y = torch.randn(30, 6), torch.randint(3, (30,))
    model, optimizer, scheduler = made()
    run(model, optimizer, scheduler, 5, x, y)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    run(model, optimizer, scheduler, 5, x, y)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [pytest.approx(0.0055), pytest.approx(0.11)]
    again, other, schedule = made(seed=9)
    for part, state in zip((again, other, schedule), saved):
        part.load_state_dict(state)
    run(again, other, schedule, 5, x, y)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)
    assert [group["lr"] for group in other.param_groups] == rates
    with pytest.raises(ValueError, match="state_dict"):
        other.load_state_dict(other.planes.state_dict())


def head(seed=0):
    return GrassmannHead(8, 3, rank=2, generator=torch.Generator().manual_seed(seed))


def saved_whole():
    file = io.BytesIO()
    torch.save(head(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def saved_parameters():
    file = io.BytesIO()
    torch.save(head().state_dict(keep_vars=True), file)
    made = head(1)
    made.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True), assign=True)
    return made


def assigned():
    made = head(1)
    made.load_state_dict(head().state_dict(), assign=True)
    return made


def from_meta():
    with torch.device("meta"):
        made = GrassmannHead(8, 3, rank=2)
    made = made.to_empty(device="cpu")
    made.load_state_dict(head().state_dict())
    return made


class Config(transformers.PretrainedConfig):
    model_type = "planes"


class Pretrained(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.head = head()
        self.post_init()

    def _init_weights(self, module):
        pass


def replaced():
    made = head()
    made.planes = nn.Parameter(made.planes.detach().clone())
    return made


def put_in_place_past_the_module():
    made = head()
    made._parameters["planes"] = nn.Parameter(made.planes.detach().clone())
    return made


def as_pickled_before_modules_knew_their_planes():
    made = head()
    state = dict(made.__dict__)
    state["_parameters"] = {"planes": nn.Parameter(made.planes.detach().clone())}
    state["_forward_pre_hooks"] = type(made._forward_pre_hooks)()
    old = GrassmannHead.__new__(GrassmannHead)
    old.__setstate__(state)
    return old


WAYS = {
    "deepcopy": lambda: copy.deepcopy(head()),
    "dtype and back": lambda: head().double().float(),
    "pickle": lambda: pickle.loads(pickle.dumps(head())),
    "torch.save": saved_whole,
    "parameters saved": saved_parameters,
    "assigned": assigned,
    "meta": from_meta,
    "replaced": replaced,
    "past the module": put_in_place_past_the_module,
    "old pickle": as_pickled_before_modules_knew_their_planes,
}


def trained(model, optimizer, steps=3, width=8):
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(30, width, generator=generator), torch.randint(3, (30,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def off_orthonormal(head):
    rows = head.planes.detach()
    return float((rows @ rows.mT - torch.eye(rows.shape[-2])).abs().max())


@pytest.mark.parametrize("way", WAYS)
def test_planes_stay_planes_however_a_head_is_copied_or_loaded(way):
    built, other = head(), WAYS[way]()
    for each in (built, other):
        trained(each, RiemannianSGD(each.parameters(), lr=0.5))
    assert isinstance(other.planes, GrassmannParameter)
    assert off_orthonormal(other) < 1e-5
    torch.testing.assert_close(other.planes, built.planes, atol=1e-6, rtol=0)


def test_planes_stay_planes_from_pretrained(tmp_path):
    Pretrained(Config()).save_pretrained(tmp_path)
    loaded = Pretrained.from_pretrained(tmp_path).head
    assert isinstance(loaded.planes, GrassmannParameter)
    assert not isinstance(nn.Linear(2, 2).weight, GrassmannParameter)
    trained(loaded, RiemannianSGD(loaded.parameters(), lr=0.5))
    assert off_orthonormal(loaded) < 1e-5


def test_planes_that_are_sharded_take_the_same_steps():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def train(rank):
        whole, sharded = head(), head()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(whole))
        optimizer = RiemannianSGD(sharded.parameters(), lr=0.5)
        for model, own in (
            (sharded, optimizer),
            *((m, RiemannianSGD(m.parameters(), lr=0.5)) for m in (whole, wrapped)),
        ):
            trained(model, own)
        assert isinstance(sharded.planes, GrassmannParameter)
        torch.testing.assert_close(sharded.planes.full_tensor(), whole.planes.data)
        torch.testing.assert_close(wrapped.module.planes, whole.planes)
        # As its parameter is: what saves states shard by shard looks for that.
        assert type(optimizer.state[sharded.planes]["momentum_buffer"]) is type(sharded.planes)

    in_processes(train)


@pytest.mark.filterwarnings("error")
def test_averaged_planes_are_planes():
    model = head()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = RiemannianSGD(model.parameters(), lr=2.0, momentum=0)
    for _ in range(4):
        trained(model, optimizer, 1)
        averaged.update_parameters(model)
    averaged.eval()
    rows = averaged.module.planes.detach()
    assert 0.01 < off_orthonormal(averaged.module) < 0.5
    x = torch.randn(5, 8)
    basis = averaged.module.subspaces().basis
    cosine = torch.linalg.vector_norm(torch.einsum("nd,cdk->nck", nn.functional.normalize(x, dim=-1), basis), dim=-1)
    torch.testing.assert_close(averaged(x), 25 * cosine)
    torch.testing.assert_close(averaged(x), averaged(x))
    again = head(3)
    again.load_state_dict(averaged.module.state_dict())
    assert torch.equal(again.planes, rows)
    # Taken up by steps along geodesics they are the same planes with whole rows.
    RiemannianSGD(again.parameters())
    assert off_orthonormal(again) < 1e-6
    torch.testing.assert_close(again.eval()(x), averaged(x))


def test_planes_that_another_optimizer_moves_are_their_spans_and_said():
    model = head()
    x = torch.randn(6, 8)
    with torch.no_grad():
        model.planes.mul_(3).add_(0.2 * torch.randn(3, 2, 8))
    with pytest.warns(UserWarning, match="something other than RiemannianSGD"):
        logits = model(x)
    turned = torch.einsum("nd,cdk->nck", nn.functional.normalize(x, dim=-1), model.subspaces().basis)
    torch.testing.assert_close(logits, 25 * torch.linalg.vector_norm(turned, dim=-1))
    nn.functional.cross_entropy(logits, torch.arange(6) % 3).backward()
    # Of a function of the spans: along the rows themselves there is no slope.
    assert float((model.planes.grad @ model.planes.detach().mT).abs().max()) < 1e-5
    assert float(model.planes.grad.abs().max()) > 1e-2
    moved = head()
    with pytest.warns(UserWarning, match="something other than RiemannianSGD"):
        trained(moved, torch.optim.Adam(moved.parameters(), lr=0.05), 40)
    assert float(moved(x).detach().max()) <= 25 * (1 + 1e-5)


def test_planes_are_looked_at_in_every_pass():
    model = head().eval()
    x = torch.randn(4, 8)
    before = model(x)
    model.planes.data.mul_(2)
    torch.testing.assert_close(model(x), before)
    model.planes.data[0, 1] = model.planes.data[0, 0]
    with pytest.raises(ValueError, match="rows of 1 planes are dependent"):
        model(x)
    with pytest.raises(ValueError, match="orthonormal only to"):
        head().load_state_dict(model.state_dict())
    model.planes.data[1] = torch.nan
    with pytest.raises(ValueError, match="planes: the planes contain NaN"):
        model(x)
    with pytest.raises(ValueError, match="orthonormal only to"):
        head().load_state_dict(model.state_dict())


def test_half_precision_states_load_as_planes():
    state = {"planes": head().planes.detach().bfloat16()}
    made = head(1)
    made.load_state_dict(state)
    with torch.random.fork_rng():
        assert made.bfloat16().eval()(torch.randn(2, 8).bfloat16()).isfinite().all()


def three_parts(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 8), nn.Linear(8, 8), GrassmannHead(8, 3, rank=2)


def test_parameters_added_later_are_stepped_as_by_the_inner_optimizer():
    body, middle, top = three_parts()
    optimizer = with_riemannian(torch.optim.AdamW([*middle.parameters(), *top.parameters()], 1e-2), 0.2)
    added = GrassmannHead(8, 3, rank=2, generator=torch.Generator().manual_seed(1))
    optimizer.add_param_group({"params": [*body.parameters(), added.planes], "lr": 3e-2})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.2, 3e-2, 0.2]
    assert optimizer.param_groups[2]["betas"] == (0.9, 0.999)
    before = body.weight.detach().clone(), added.planes.detach().clone()
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    states = body(x).tanh()
    nn.functional.cross_entropy(top(middle(states).tanh()) + added(states), y).backward()
    optimizer.step()
    # The first step of AdamW: one rate in the direction of the sign, and the decay.
    expected = before[0] * (1 - 3e-4) - 3e-2 * body.weight.grad.sign()
    torch.testing.assert_close(body.weight.detach(), expected, atol=1e-4, rtol=0)
    assert off_orthonormal(added) < 1e-6
    assert not torch.equal(added.planes, before[1])
    optimizer.param_groups[2]["lr"] = optimizer.param_groups[3]["lr"] = 0.0
    still = [part.detach().clone() for part in (body.weight, added.planes)]
    optimizer.step()
    for part, kept in zip((body.weight, added.planes), still):
        torch.testing.assert_close(part.detach(), kept, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [top.planes]})


def test_a_group_of_planes_alone_and_one_with_options_of_planes():
    body, _, top = three_parts()
    optimizer = with_riemannian(torch.optim.AdamW([*body.parameters(), *top.parameters()], 1e-2))
    optimizer.add_param_group({"params": [plane(dtype=torch.float32)]})
    optimizer.add_param_group({"params": [plane(dtype=torch.float32)], "transport": "parallel", "lr": 0.7})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.1, 0.1, 0.7]
    assert [group["transport"] for group in optimizer.planes.param_groups] == ["project", "project", "parallel"]
    assert len(optimizer.inner.param_groups) == 1


def test_an_optimizer_with_added_groups_is_resumed_copied_and_pickled():
    def made(seed):
        body, middle, top = three_parts(seed)
        optimizer = with_riemannian(torch.optim.AdamW([*middle.parameters(), *top.parameters()], 1e-2), 0.2)
        optimizer.add_param_group({"params": list(body.parameters()), "lr": 3e-2})
        return nn.Sequential(body, nn.Tanh(), middle, nn.Tanh(), top), optimizer

    model, optimizer = made(0)
    trained(model, optimizer, 2, width=6)
    rates = [group["lr"] for group in optimizer.param_groups]
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    resumed = made(5)
    for part, own in zip(resumed, state):
        part.load_state_dict(own)
    trained(model, optimizer, 3, width=6)
    for other, own in (copied, pickled, resumed):
        assert [group["lr"] for group in own.param_groups] == rates
        trained(other, own, 3, width=6)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, msg=name)


def test_groups_that_a_trainer_replaced_are_stepped():
    body, middle, top = three_parts()
    optimizer = with_riemannian(torch.optim.SGD([*middle.parameters(), *top.parameters()], 1e-2), 0.2)
    optimizer.param_groups = [{**group} for group in optimizer.param_groups]
    optimizer.param_groups[0] = {"params": [*body.parameters(), *middle.parameters()], "lr": 0.5}
    model = nn.Sequential(body, nn.Tanh(), middle, nn.Tanh(), top)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, optimizer, 1, width=6)
    for name, parameter in model.named_parameters():
        if name != "4.planes":
            torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * parameter.grad)
    assert not torch.equal(top.planes, before["4.planes"])
    assert off_orthonormal(top) < 1e-6


def test_planes_that_show_themselves_late_leave_the_inner_optimizer():
    body, _, top = three_parts()
    late = put_in_place_past_the_module()
    optimizer = with_riemannian(torch.optim.SGD([*body.parameters(), *late.parameters(), *top.parameters()], 1e-2), 0.5)
    assert len(optimizer.param_groups) == 2
    model = nn.Sequential(body, late)
    trained(model, optimizer, 5, width=6)
    assert len(optimizer.param_groups) == 3
    assert off_orthonormal(late) < 1e-6


def test_parameters_with_names_keep_them():
    body, _, top = three_parts()
    named = [*body.named_parameters(), *top.named_parameters(prefix="top")]
    optimizer = with_riemannian(torch.optim.AdamW(named, 1e-2))
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight", "bias"], ["top.planes"]]


def test_refuses_what_makes_no_sense():
    parameter = plane()
    for options in ({"transport": "none"}, {"momentum": 1.0}, {"lr": -1}, {"max_angle": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RiemannianSGD([parameter], **options)
    with pytest.raises(ValueError, match="nesterov"):
        RiemannianSGD([parameter], momentum=0, nesterov=True)
    with pytest.raises(ValueError, match="GrassmannParameter"):
        with_riemannian(torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()))
    with pytest.raises(ValueError, match="RiemannianSGD alone"):
        with_riemannian(torch.optim.AdamW([parameter]))
