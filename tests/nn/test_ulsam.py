"""Spatial attention by groups of channels, and where it goes in a network."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from subspan.models import replace
from subspan.nn import SubspaceAttention, attention_entropy, shape_preserving_blocks


def made(channels=8, groups=2, **options):
    torch.manual_seed(0)
    layer = SubspaceAttention(channels, groups, **options).eval()
    for norm in (layer.depthwise_norm, layer.pointwise_norm):
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
        norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    return layer


def maps(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normalised(x, norm, part):
    mean, variance = norm.running_mean[part].view(1, -1, 1, 1), norm.running_var[part].view(1, -1, 1, 1)
    scaled = (x - mean) / (variance + norm.eps).sqrt()
    return scaled * norm.weight[part].view(1, -1, 1, 1) + norm.bias[part].view(1, -1, 1, 1)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_grouped_form_is_the_published_formula_group_by_group(groups):
    layer, x = made(groups=groups), maps(2, 8, 5, 6)
    out, width = [], 8 // groups
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        f = x[:, part]
        y = f * layer.depthwise.weight[part].view(1, -1, 1, 1) + layer.depthwise.bias[part].view(1, -1, 1, 1)
        y = F.max_pool2d(F.relu(normalised(y, layer.depthwise_norm, part)), 3, 1, 1)
        z = (y * layer.pointwise.weight[group].view(1, -1, 1, 1)).sum(1, keepdim=True) + layer.pointwise.bias[group]
        z = F.relu(normalised(z, layer.pointwise_norm, slice(group, group + 1)))
        a = z.flatten(1).softmax(1).view_as(z)
        out.append(a * f + f)
    torch.testing.assert_close(layer(x), torch.cat(out, 1))
    assert sum(p.numel() for p in layer.parameters()) == 5 * 8 + 3 * groups


def test_maps_are_distributions_and_constant_maps_are_scaled_alone():
    layer, x = made(), maps(2, 8, 5, 6)
    a = layer.attention(x)
    assert bool((a >= 0).all())
    torch.testing.assert_close(a.sum((2, 3)), torch.ones(2, 2))
    constant = maps(2, 8, 1, 1).expand(2, 8, 5, 6)
    torch.testing.assert_close(layer(constant), (1 + 1 / 30) * constant)
    torch.testing.assert_close(made(gate="identity")(x), (1 + 1 / 30) * x)
    torch.testing.assert_close(attention_entropy(made(gate="identity").attention(x)), torch.ones(2))
    assert bool((attention_entropy(a) < 1).all())


def test_positions_may_be_permuted_without_the_pool_and_groups_do_not_meet():
    layer, x = made(pool=1), maps(2, 8, 5, 6)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(layer(shuffled), layer(x).flatten(2)[..., order].view_as(x))
    x.requires_grad_()
    made()(x)[:, :4].sum().backward()
    assert not bool(x.grad[:, 4:].any())
    assert bool(x.grad[:, :4].any())


def test_training_uses_the_batch_and_memory_formats_do_not_matter():
    layer, x = made(), maps(4, 8, 5, 5)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x))
    before = layer.pointwise_norm.running_mean.clone()
    layer.train()(x)
    assert not torch.equal(layer.pointwise_norm.running_mean, before)
    assert layer.depthwise_norm.momentum == 0.1


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, width, 3, padding=1)
        )

    def forward(self, x):
        return x + self.layers(x)


def test_blocks_that_keep_their_shape_are_found_replaced_and_put_back():
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 1))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Block(4), down, Block(8), nn.BatchNorm2d(8)).train()
    x = maps(2, 3, 8, 8)
    assert shape_preserving_blocks(model, x) == {"1": (2, 4, 8, 8), "3": (2, 8, 4, 4)}
    assert model.training
    model.eval()
    before = model(x)
    surgery = replace(model, {"3": lambda block: SubspaceAttention(8, 2)}, x)
    assert isinstance(model[3], SubspaceAttention)
    assert not model[3].training
    (site,) = surgery.sites
    assert site.parameters == 8 * 16 + 16 + 16 * 8 * 9 + 8
    assert site.new_parameters == 5 * 8 + 3 * 2
    assert site.multiply_adds == 2 * 16 * (8 * 16 + 16 * 8 * 9)
    assert site.new_multiply_adds == 2 * 2 * 8 * 16
    assert "3: Block → SubspaceAttention" in surgery.report()
    assert not torch.equal(model(x), before)
    surgery.undo()
    assert torch.equal(model(x), before)
    control = replace(model, {"3": nn.Identity()}, x)
    assert control.sites[0].new_parameters == 0
    control.undo()


def test_options_reach_what_they_are_of():
    x = maps(2, 8, 3, 3)
    layer = made(residual=False, momentum=0.3).eval()
    a = layer.attention(x).repeat_interleave(4, 1)
    torch.testing.assert_close(layer(x), a * x)
    torch.testing.assert_close(made().eval()(x), (1 + made().eval().attention(x).repeat_interleave(4, 1)) * x)
    assert layer.depthwise_norm.momentum == layer.pointwise_norm.momentum == 0.3


def test_looking_for_blocks_leaves_every_mode_as_it_was():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    model[0][1].eval()
    before = {name: part.training for name, part in model.named_modules()}
    assert list(shape_preserving_blocks(model, maps(2, 3, 4, 4))) == ["0"]
    assert {name: part.training for name, part in model.named_modules()} == before
    assert model.training
    assert torch.equal(model[1].running_mean, torch.zeros(3))


def test_mobilenet_s_published_savings():
    """One 512 → 512 separable block at 14 × 14 has 0.267 M parameters, 52.3 M multiply-adds; ours 1 k, 0.2 M."""
    block = nn.Sequential(
        nn.Conv2d(512, 512, 3, padding=1, groups=512, bias=False),
        nn.BatchNorm2d(512),
        nn.ReLU(),
        nn.Conv2d(512, 512, 1, bias=False),
        nn.BatchNorm2d(512),
    )
    (site,) = replace(nn.Sequential(block), {"0": lambda m: SubspaceAttention(512, 4)}, maps(1, 512, 14, 14)).sites
    assert site.parameters / 1e6 == pytest.approx(0.269, abs=0.002)
    assert site.multiply_adds / 1e6 == pytest.approx(52.3, abs=0.05)
    assert site.new_multiply_adds == 2 * 512 * 14 * 14


def test_refuses_bad_input():
    with pytest.raises(ValueError, match="3 groups and 8 channels"):
        SubspaceAttention(8, 3)
    with pytest.raises(ValueError, match="pool"):
        SubspaceAttention(8, 2, pool=2)
    with pytest.raises(ValueError, match="gate"):
        SubspaceAttention(8, 2, gate="x")
    with pytest.raises(ValueError, match="expected 8 channels, got 7"):
        made()(maps(1, 7, 3, 3))
    with pytest.raises(ValueError, match="single position"):
        made()(maps(2, 8, 1, 1))
    x = maps(2, 8, 1, 1)
    torch.testing.assert_close(made(allow_1x1=True)(x), 2 * x)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="names no module; linear layers are 0, 1"):
        replace(model, {"head": nn.Identity()})
    with pytest.raises(ValueError, match=r"would give \(5, 4\) where it gave \(5, 2\)"):
        replace(model, {"0": nn.Linear(3, 4), "1": nn.Identity()}, maps(5, 3))
    assert isinstance(model[1], nn.Linear)
    with pytest.raises(ValueError, match="lies inside another"):
        replace(nn.Sequential(nn.Sequential(nn.Linear(2, 2))), {"0": nn.Identity(), "0.0": nn.Identity()})
