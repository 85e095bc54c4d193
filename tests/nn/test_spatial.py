from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from subspan.nn import PatchProjector, SpatialNorm, cosine_matching_loss, resize_tokens


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_gamma_one_leaves_mean_zero_and_deviation_one() -> None:
    x = 5 + tokens(2, 16, 6) * torch.arange(1, 7)
    y = SpatialNorm(1.0)(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 6, dtype=torch.float64))
    torch.testing.assert_close(y.std(1), torch.ones(2, 6, dtype=torch.float64), rtol=1e-5, atol=0)


def test_gamma_zero_only_scales() -> None:
    x = tokens(2, 16, 6)
    factor = SpatialNorm(0.0)(x) / x
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))


@pytest.mark.parametrize("gamma", [0.6, 0.8, 1.0])
def test_the_published_formula(gamma: float) -> None:
    x = 2 + tokens(3, 9, 5)
    expected = torch.empty_like(x)
    for b in range(3):
        for c in range(5):
            column = x[b, :, c]
            mean = sum(column) / 9
            deviation = (sum((value - mean) ** 2 for value in column) / 8).sqrt()
            expected[b, :, c] = (column - gamma * mean) / (deviation + 1e-6)
    torch.testing.assert_close(SpatialNorm(gamma)(x), expected)


def test_constant_channels_become_zero_where_the_formula_explodes() -> None:
    x = tokens(1, 16, 4, dtype=torch.float32)
    x[..., 1], x[..., 2] = 7.3, 0.0
    published = (x - 0.8 * x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
    assert float(published[..., 1].abs().max()) > 1e5
    y = SpatialNorm(0.8)(x)
    assert not bool(y[..., 1:3].any())
    torch.testing.assert_close(y[..., [0, 3]], published[..., [0, 3]])
    assert bool((SpatialNorm(1.0)(torch.full((2, 9, 3), 0.1)) == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_statistics_are_single(dtype: torch.dtype) -> None:
    # Squares of these overflow float16, and their mean is lost in bfloat16.
    x = (3000 + 500 * tokens(2, 64, 4, dtype=torch.float32)).to(dtype)
    y = SpatialNorm()(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, SpatialNorm()(x.float()).to(dtype))
    assert bool(y.isfinite().all())


def test_leading_directions_are_removed_in_place_of_the_mean() -> None:
    x = 3 + tokens(2, 20, 6)
    y = SpatialNorm(1.0, remove_rank=2)(x)
    for b in range(2):
        leading = torch.linalg.svd(x[b]).Vh[:2]
        rest = x[b] - x[b] @ leading.mT @ leading
        torch.testing.assert_close(y[b], rest / (rest.std(0) + 1e-6))
    # Identical tokens are all global: one direction holds them.
    assert not bool(SpatialNorm(1.0, remove_rank=1)(torch.ones(1, 5, 3, dtype=torch.float64)).any())


@pytest.mark.parametrize("remove_rank", [None, 2])
@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 4, 9)])
def test_the_derivative_is_that_of_the_formula_and_finite_where_nothing_varies(
    remove_rank: int | None, shape: tuple[int, int, int]
) -> None:
    norm = SpatialNorm(0.8, remove_rank=remove_rank)
    x = (1 + tokens(*shape)).requires_grad_()
    assert torch.autograd.gradcheck(norm, x)
    for still in (
        torch.zeros(shape),
        torch.ones(shape),
        torch.cat([torch.zeros(1, *shape[1:]), torch.randn(shape)[:1]]),
    ):
        still.requires_grad_()
        norm(still).square().sum().backward()
        assert still.grad is not None
        assert bool(still.grad.isfinite().all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_channel_that_is_not_finite_stays_so(bad: float) -> None:
    x = tokens(2, 9, 4)
    x[1, 3, 2] = bad
    y = SpatialNorm()(x)
    assert bool(y[1, :, 2].isnan().all())
    assert int(y.isnan().sum()) == 9


@pytest.mark.parametrize(
    "options", [{"gamma": 1.5}, {"gamma": -0.1}, {"eps": -1.0}, {"remove_rank": 0}, {"floor": -1.0}]
)
def test_bad_options_are_named(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SpatialNorm(**options)


def test_one_token_has_no_deviation() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        SpatialNorm()(torch.ones(2, 1, 4))
    with pytest.raises(ValueError, match="remove_rank: below"):
        SpatialNorm(remove_rank=4)(torch.ones(2, 9, 4))


def test_the_convolution_sees_zeros_beyond_the_grid() -> None:
    projector, x = PatchProjector(2, 3).double(), tokens(1, 12, 2)
    grid = F.pad(x.mT.unflatten(-1, (3, 4)), (1, 1, 1, 1))
    expected = F.conv2d(grid, projector.layers.weight, projector.layers.bias).flatten(2).mT
    torch.testing.assert_close(projector(x, (3, 4)), expected)


def test_a_kernel_of_one_is_a_linear_map() -> None:
    conv, linear = PatchProjector(5, 7, kernel_size=1).double(), PatchProjector(5, 7, "linear").double()
    linear.layers.weight.data = conv.layers.weight.data.flatten(1)
    linear.layers.bias.data = conv.layers.bias.data
    x = tokens(2, 9, 5)
    torch.testing.assert_close(conv(x), linear(x))


def test_the_convolution_sees_the_grid() -> None:
    projector = PatchProjector(4, 6).double()
    grid = torch.zeros(1, 5, 8, 4, dtype=torch.float64)
    grid[0, 2, 3] = tokens(4)
    response = projector(grid.flatten(1, 2), (5, 8)).unflatten(1, (5, 8)) - projector.layers.bias
    shifted = projector(grid.roll(2, 2).flatten(1, 2), (5, 8)).unflatten(1, (5, 8)) - projector.layers.bias
    torch.testing.assert_close(shifted, response.roll(2, 2))
    touched = response[0].abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[i, j] for i in (1, 2, 3) for j in (2, 3, 4)]


def test_the_mlp_is_the_published_one() -> None:
    projector = PatchProjector(4, 6, "mlp", hidden=10).double()
    first, second, last = (projector.layers[index] for index in (0, 2, 4))
    x = tokens(2, 7, 4)
    torch.testing.assert_close(projector(x), last(F.silu(second(F.silu(first(x))))))


def test_equal_parameters() -> None:
    conv = PatchProjector(64, 112)
    size = sum(parameter.numel() for parameter in conv.parameters())
    hidden = PatchProjector.hidden_for(size, 64, 112)
    mlp = PatchProjector(64, 112, "mlp", hidden=hidden)
    assert abs(sum(parameter.numel() for parameter in mlp.parameters()) / size - 1) < 0.01
    with pytest.raises(ValueError, match="parameters"):
        PatchProjector.hidden_for(10, 64, 112)


@pytest.mark.parametrize("options", [{"kind": "cnn"}, {"kernel_size": 2}, {"hidden": 0}])
def test_bad_projectors_are_named(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PatchProjector(4, 6, **options)


def test_bad_tokens_are_named() -> None:
    projector = PatchProjector(4, 6)
    with pytest.raises(ValueError, match="width 4"):
        projector(torch.ones(1, 9, 5))
    with pytest.raises(ValueError, match="hw: needed"):
        projector(torch.ones(1, 8, 4))
    with pytest.raises(ValueError, match="hw: a grid"):
        projector(torch.ones(1, 8, 4), (3, 3))


def test_resizing_keeps_a_constant_and_averages_areas() -> None:
    constant = torch.full((1, 12, 2), 3.0)
    for mode in ("bicubic", "bilinear", "area"):
        torch.testing.assert_close(resize_tokens(constant, (3, 4), (6, 2), mode=mode), torch.full((1, 12, 2), 3.0))
    x = tokens(1, 16, 3)
    area = resize_tokens(x, (4, 4), (2, 2), mode="area")
    torch.testing.assert_close(area[0, 0], x[0, [0, 1, 4, 5]].mean(0))
    assert resize_tokens(x, (4, 4), (4, 4)) is x
    assert resize_tokens(x.half(), (4, 4), (2, 2)).dtype == torch.float16


def test_cosine_matching() -> None:
    x, y = tokens(2, 5, 4), tokens(2, 5, 4, seed=1)
    expected = -sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1))) / 10
    assert float(cosine_matching_loss(x, y)) == pytest.approx(expected)
    assert float(cosine_matching_loss(x, 3 * x)) == pytest.approx(-1)
    assert float(cosine_matching_loss(x, -x)) == pytest.approx(1)
    assert float(cosine_matching_loss(x, torch.zeros_like(x))) == 0
    assert cosine_matching_loss(x.half(), y.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="y: the shape of x"):
        cosine_matching_loss(x, y[:1])
