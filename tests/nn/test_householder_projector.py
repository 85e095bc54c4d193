"""Linear layers of orthogonal factors with equal gains."""

import pytest
import torch
from torch import nn

from subspan.geometry import principal_angles
from subspan.geometry.grassmann import polar, random_basis
from subspan.models import replace
from subspan.nn import HouseholderFrame, HouseholderProjector
from subspan.nn.householder_projector import jacobian_gram


def linear(width=8, out=6, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(width, out)


@pytest.mark.parametrize(("width", "out"), [(8, 6), (6, 8), (7, 7)])
def test_a_trained_layer_is_the_start(width, out):
    start = linear(width, out)
    layer = HouseholderProjector.from_linear(start, 3)
    u, s, vh = torch.linalg.svd(start.weight.detach(), full_matrices=False)
    torch.testing.assert_close(layer.weight, s[:3].mean() * u[:, :3] @ vh[:3], atol=1e-5, rtol=0)
    values = torch.linalg.svdvals(layer.weight.detach())
    torch.testing.assert_close(values[:3], s[:3].mean().expand(3), atol=1e-5, rtol=0)
    assert float(values[3:].max()) < 1e-6
    assert float(principal_angles(layer.input_subspace().basis, vh[:3].mT.double()).max()) < 1e-5
    assert float(principal_angles(layer.output_subspace().basis, u[:, :3].double()).max()) < 1e-5
    assert torch.equal(layer.bias, start.bias)
    x = torch.randn(4, width)
    torch.testing.assert_close(layer(x), x @ layer.weight.mT + layer.bias, atol=1e-5, rtol=1e-5)
    whole = HouseholderProjector.from_linear(start, min(width, out), gain="one")
    nearest = polar(start.weight.detach()) if out >= width else polar(start.weight.detach().mT).mT
    torch.testing.assert_close(whole.weight, nearest, atol=1e-5, rtol=0)


def test_factors_stay_orthonormal_and_find_the_principal_plane():
    c = torch.diag(torch.tensor([4.0, 3, 2, *[0.1] * 9]))
    frame = HouseholderFrame(12, 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(frame.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-torch.trace(frame().mT @ c @ frame())).backward()
        optimizer.step()
    assert float((frame().mT @ frame() - torch.eye(3)).detach().abs().max()) < 1e-6
    assert float(principal_angles(frame.subspace().basis, torch.eye(12, 3).double()).max()) < 0.02


def test_axes_do_not_depend_on_the_gauge():
    layer = HouseholderProjector.from_linear(linear(), 3)
    torch.manual_seed(1)
    last = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    latents = torch.randn(50, 8, dtype=torch.float64)
    turn = random_basis(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    turned = HouseholderProjector.from_linear(linear(), 3)
    with torch.no_grad():
        for part in (turned.u, turned.v):
            part.frame = part.frame @ turn
    x = torch.randn(4, 8)
    torch.testing.assert_close(turned(x), layer(x), atol=1e-5, rtol=0)
    assert not torch.allclose(turned.directions, layer.directions, atol=1e-2)
    found = []
    for each in (layer, turned):
        before = each(x)
        weight = each.weight.detach().double()
        found.append(each.canonicalize(lambda w, weight=weight: last(w @ weight.mT), latents))
        torch.testing.assert_close(each(x), before, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)
    assert bool((found[0].diff() < 0).all())
    torch.testing.assert_close(turned.directions, layer.directions, atol=1e-3, rtol=0)


def test_the_gram_matrix_of_a_linear_map_s_jacobian():
    a = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    latents, v = torch.randn(20, 8, dtype=torch.float64), torch.eye(8, 2, dtype=torch.float64)
    torch.testing.assert_close(jacobian_gram(lambda w: w @ a.mT, latents, v), (a @ v).mT @ (a @ v))


def test_gains_fillings_and_surgery():
    learned = HouseholderProjector.from_linear(linear(), 3, gain="learned")
    learned(torch.randn(2, 8)).sum().backward()
    assert learned.gain.grad is not None
    model = nn.Sequential(linear(), nn.ReLU(), linear(6, 4))
    x = torch.randn(9, 8)
    before = model(x)
    surgery = replace(model, {"0": lambda m: HouseholderProjector.from_linear(m, 6)}, x)
    assert 0 < surgery.sites[0].error < 1
    assert surgery.sites[0].new_multiply_adds == 9 * 6 * 14
    torch.testing.assert_close(surgery.undo()(x), before)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_missing_directions_are_filled_whatever_the_unit_of_the_weight(scale):
    poor = linear()
    with torch.no_grad():
        poor.weight.copy_(scale * poor.weight[:, :1] @ poor.weight[:1])
    with pytest.warns(UserWarning, match="1 directions, 2 are filled"):
        filled = HouseholderProjector.from_linear(poor, 3)
    assert bool(filled.weight.isfinite().all())


def test_a_zero_reflection_reflects_nothing():
    frame = HouseholderFrame(5, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        frame.parametrizations.frame.original[:, 1] = 0
    with pytest.warns(UserWarning, match="zero and reflects nothing"):
        found = frame()
    torch.testing.assert_close(found.mT @ found, torch.eye(2), atol=1e-6, rtol=0)


def test_many_steps_leave_the_factors_orthonormal():
    layer = HouseholderProjector(12, 9, 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
    y = torch.randn(32, 9, generator=torch.Generator().manual_seed(2))
    for _ in range(600):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    for part in (layer.u, layer.v):
        assert float((part().mT @ part() - torch.eye(3)).detach().abs().max()) < 1e-6
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight.detach())[:3], torch.ones(3), atol=1e-5, rtol=0)


def test_refuses_bad_input():
    with pytest.raises(ValueError, match=r"\[1, 6\], got 7"):
        HouseholderProjector(8, 6, 7)
    with pytest.raises(ValueError, match="gain"):
        HouseholderProjector(8, 6, 3, gain="x")
    with pytest.raises(ValueError, match="expected 8 columns"):
        HouseholderProjector(8, 6, 3)(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="k: must"):
        HouseholderFrame(3, 4)
    with pytest.raises(TypeError, match="Linear, got Conv2d"):
        HouseholderProjector.from_linear(nn.Conv2d(3, 3, 1), 2)
    broken = linear()
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        HouseholderProjector.from_linear(broken, 3)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_frames_of_a_layer_in_half_precision_are_kept_in_float32(dtype, kept):
    layer = HouseholderProjector.from_linear(nn.Linear(12, 9).to(dtype), 4)
    assert {parameter.dtype for parameter in layer.parameters()} == {kept}
    for frame in (layer.u(), layer.v()):
        torch.testing.assert_close(frame.mT @ frame, torch.eye(4, dtype=kept), rtol=0, atol=1e-6)
