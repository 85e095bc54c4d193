"""Blocks: what goes in and comes out, and that each part does what its name says."""

import pytest
import torch
from torch import nn

from subspan.nn.blocks import MLP, ConvBlock, ResidualConvBlock


def seeded(seed=0):
    torch.manual_seed(seed)


def test_a_perceptron_has_the_layers_asked_for_in_order():
    seeded()
    model = MLP((6, 5, 4, 3), norm="layer", activation="relu", dropout=0.1, last_norm="batch")
    kinds = [type(part) for part in model]
    hidden = [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Dropout]
    assert kinds == [*hidden, *hidden, nn.Linear, nn.BatchNorm1d]
    plain = MLP((6, 5, 3))
    assert [type(part) for part in plain] == [nn.Linear, nn.GELU, nn.Linear]
    x = torch.randn(7, 6)
    torch.testing.assert_close(plain(x), plain[2](torch.nn.functional.gelu(plain[0](x))))
    assert [type(part) for part in MLP((6, 3))] == [nn.Linear]


def test_batch_normalisation_is_over_all_rows_whatever_their_axes():
    seeded()
    model = MLP((6, 5, 3), norm="batch", last_norm="batch")
    x = torch.randn(4, 2, 6)
    out = model(x)
    assert out.shape == (4, 2, 3)
    torch.testing.assert_close(out.flatten(0, 1), model(x.flatten(0, 1)))
    torch.testing.assert_close(out.flatten(0, 1).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert model(x[0, 0].unsqueeze(0).expand(2, 6)).shape == (2, 3)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 5), (3, 3)])
def test_places_are_rounded_up_downwards_and_multiplied_upwards(dims, stride, kernel):
    seeded()
    x = torch.randn(2, 3, *(7, 6, 5)[:dims])
    down = tuple(-(-size // stride) for size in x.shape[2:])
    options = {"kernel": kernel, "stride": stride, "dims": dims}
    assert ConvBlock(3, 4, **options)(x).shape == (2, 4, *down)
    assert ResidualConvBlock(3, 4, **options)(x).shape == (2, 4, *down)
    assert ResidualConvBlock(3, 3, **options)(x).shape == (2, 3, *down)
    assert ResidualConvBlock(3, 4, preactivation=True, **options)(x).shape == (2, 4, *down)
    if stride > 1:
        up = tuple(stride * size for size in x.shape[2:])
        assert ConvBlock(3, 4, upwards=True, **options)(x).shape == (2, 4, *up)


def test_a_residual_block_without_a_residual_is_its_shortcut():
    seeded()
    x = torch.randn(3, 4, 8)
    block = ResidualConvBlock(4, 4, dims=1, preactivation=True)
    for weight in (block.residual[-1].weight, block.residual[-1].bias):
        nn.init.zeros_(weight)
    assert torch.equal(block(x), x)
    behind = ResidualConvBlock(4, 4, dims=1)
    nn.init.zeros_(behind.residual[-1].weight)
    torch.testing.assert_close(behind(x), x.relu())
    wider = ResidualConvBlock(4, 6, dims=1, stride=2, preactivation=True)
    for weight in (wider.residual[-1].weight, wider.residual[-1].bias):
        nn.init.zeros_(weight)
    torch.testing.assert_close(wider(x), wider.shortcut(x))


def test_no_convolution_has_a_bias_that_the_normalisation_takes_out():
    for block in (ConvBlock(2, 3), ResidualConvBlock(2, 3)):
        assert all(
            part.bias is None for part in block.modules() if isinstance(part, nn.Conv2d) and part.kernel_size[0] > 1
        )
    for block in (ConvBlock(2, 3, norm=False), ResidualConvBlock(2, 3, norm=False)):
        assert not any(isinstance(part, nn.BatchNorm2d) for part in block.modules())
        assert all(part.bias is not None for part in block.modules() if isinstance(part, nn.Conv2d))


def test_bad_settings_are_named():
    for make, named in (
        (lambda: MLP((3,)), "sizes"),
        (lambda: MLP((3, 2), norm="group"), "norm"),
        (lambda: MLP((3, 2, 2), activation="swish"), "activation"),
        (lambda: ConvBlock(1, 1, kernel=4), "kernel"),
        (lambda: ConvBlock(1, 1, dims=4), "dims"),
        (lambda: ConvBlock(1, 1, upwards=True), "stride"),
        (lambda: ResidualConvBlock(1, 1, activation="no"), "activation"),
    ):
        with pytest.raises((ValueError, TypeError), match=named):
            make()
