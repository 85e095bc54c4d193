"""Optimisation on the Grassmann manifold."""

import copy
import math

import pytest
import torch

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
    parameter.data += 1e-3 * torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter.grad = 1e-6 * torch.randn(3, 12, dtype=torch.float64)
    RiemannianSGD([parameter]).step()
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


def test_a_copied_head_is_still_known_as_planes():
    head = copy.deepcopy(GrassmannHead(5, 2, rank=2))
    assert isinstance(head.planes, GrassmannParameter)
    assert isinstance(head.double().planes, GrassmannParameter)
    assert not isinstance(torch.nn.Linear(2, 2).weight, GrassmannParameter)


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
