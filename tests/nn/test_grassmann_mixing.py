"""Mixing by planes of token pairs."""

import inspect
import math

import pytest
import torch

from subspan.geometry import principal_angles
from subspan.geometry.grassmann import orthonormalize, parallelogram_area, plucker
from subspan.nn import GrassmannBlock, GrassmannLanguageModel, GrassmannMixing, MixingState


def made(d=6, rank=4, offsets=(1, 3), **options):
    torch.manual_seed(0)
    return GrassmannMixing(d, rank, offsets, **options).double()


def states(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"output_projection": True}])
def test_one_wedge_a_token_is_the_mean_over_all_pairs(options):
    layer, h = made(**options), states(2, 7, 6)
    z = layer.reduce(h)
    for n in range(2):
        for t in range(7):
            parts = []
            for offset in (1, 3):
                if t - offset >= 0:
                    u, v = z[n, t], z[n, t - offset]
                    p = torch.stack([u[i] * v[j] - u[j] * v[i] for i in range(4) for j in range(i + 1, 4)])
                    length = max(float(p.norm()), 1e-3 * float(u.norm() * v.norm()))
                    parts.append(layer.project(p if options.get("normalize") is False else p / length))
            g = layer.output(torch.stack(parts).mean(0)) if parts else torch.zeros(6, dtype=torch.float64)
            alpha = torch.sigmoid(layer.gate(torch.cat([h[n, t], g])))
            torch.testing.assert_close(layer(h)[n, t], alpha * h[n, t] + (1 - alpha) * g)


def test_nothing_of_the_future_reaches_the_past():
    torch.manual_seed(0)
    model = GrassmannLanguageModel(50, [GrassmannMixing(8, 4, (1, 2)) for _ in range(2)], d_model=8, context=12).eval()
    ids = torch.randint(50, (2, 12))
    before = model(ids)
    for t in (0, 4, 10):
        changed = ids.clone()
        changed[:, t + 1 :] = (ids[:, t + 1 :] + 7) % 50
        after = model(changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])
    h = states(1, 6, 6).requires_grad_()
    made()(h)[0, 3].sum().backward()
    assert not bool(h.grad[0, 4:].any())
    assert bool(h.grad[0, 0].any())


def test_token_by_token_is_the_whole_sequence():
    layer, h = made(), states(2, 9, 6)
    past, out = None, []
    for t in range(9):
        mixed, past = layer.step(h[:, t], past)
        out.append(mixed)
    torch.testing.assert_close(torch.stack(out, 1), layer(h))
    assert past.reduced.shape == (2, 3, 4)
    assert bool(past.known.all())


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_the_rest_of_a_sequence_after_a_remembered_start(kept):
    # Fewer remembered than the largest offset is a sequence that began there; more than it are not looked at.
    layer, h = made(), states(2, 9, 6)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3] = False
    past = MixingState(layer.reduce(h)[:, 5 - kept : 5], mask[:, 5 - kept : 5])
    found = layer(h[:, 5:], mask[:, 5:], past)
    start = 5 - min(kept, 3)
    torch.testing.assert_close(found, layer(h[:, start:], mask[:, start:])[:, 5 - start :])
    if kept >= 3:
        torch.testing.assert_close(found, layer(h, mask)[:, 5:])


def test_padding_pairs_with_nothing():
    layer, h = made(), states(1, 7, 6)
    mask = torch.ones(1, 7, dtype=torch.bool)
    mask[:, :2] = False
    torch.testing.assert_close(layer(h, mask)[:, 2:], layer(h[:, 2:]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(side):
    torch.manual_seed(0)
    model = GrassmannLanguageModel(50, [GrassmannMixing(8, 4, (1, 2)) for _ in range(2)], d_model=8, context=12).eval()
    ids = torch.randint(50, (2, 7))
    rest = torch.randint(50, (2, 4))
    whole = torch.cat([rest, ids] if side == "left" else [ids, rest], 1)
    mask = torch.ones(2, 11, dtype=torch.bool)
    own = slice(4, 11) if side == "left" else slice(0, 7)
    mask[:, :4] = side == "right"
    mask[:, 7:] = side == "left"
    torch.testing.assert_close(model(whole, mask)[:, own], model(ids))


def test_short_sequences_and_parallel_tokens():
    layer = made()
    alone = layer(states(1, 1, 6))
    alpha = torch.sigmoid(layer.gate(torch.cat([states(1, 1, 6), torch.zeros(1, 1, 6)], -1)))
    torch.testing.assert_close(alone, alpha * states(1, 1, 6))
    repeated = states(1, 1, 6).expand(1, 5, 6).clone().requires_grad_()
    layer(repeated).sum().backward()
    assert bool(repeated.grad.isfinite().all())
    zero = torch.zeros(1, 5, 6, dtype=torch.float64, requires_grad=True)
    bare = made()
    torch.nn.init.zeros_(bare.reduce.bias)
    bare(zero).sum().backward()
    assert bool(zero.grad.isfinite().all())


def test_plucker_coordinates():
    u, v = states(5, 4), states(5, 4, seed=2)
    p = plucker(u, v)
    torch.testing.assert_close(plucker(v, u), -p)
    torch.testing.assert_close(p.norm(dim=-1), parallelogram_area(u, v))
    p12, p13, p14, p23, p24, p34 = p.unbind(-1)
    assert float((p12 * p34 - p13 * p24 + p14 * p23).abs().max()) < 1e-12
    unit = p / p.norm(dim=-1, keepdim=True)
    mixed = plucker(2 * u + v, u + 3 * v)
    torch.testing.assert_close(mixed / mixed.norm(dim=-1, keepdim=True), unit)
    bases = orthonormalize(torch.stack([u, v], -1))
    angles = principal_angles(bases[0], bases[1])
    torch.testing.assert_close((unit[0] @ unit[1]).abs(), angles.cos().prod())
    layer, h = made(), states(2, 7, 6)
    z = layer.reduce(h).detach()
    planes = layer.planes(h, 3)
    assert planes.basis.shape == (2, 4, 4, 2)
    inside = planes.basis[1, 2] @ planes.basis[1, 2].mT @ z[1, 5]
    torch.testing.assert_close(inside, z[1, 5])


@pytest.mark.parametrize(
    ("extra", "layers", "millions"), [(False, 6, 12.61), (True, 6, 13.00), (False, 12, 17.37), (True, 12, 18.16)]
)
def test_the_published_parameter_counts(extra, layers, millions):
    with torch.device("meta"):
        mixing = [GrassmannMixing(256, output_projection=extra) for _ in range(layers)]
        model = GrassmannLanguageModel(30522, mixing, context=128)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.011)


def test_a_block_adds_its_feed_forward_part_to_the_normalised_mixture():
    torch.manual_seed(0)
    block, h = GrassmannBlock(6, made(), dropout=0.5).double(), states(2, 7, 6)
    for norm in (block.mixing_norm, block.norm):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    enter, _, leave, _ = block.feed_forward
    u = block.mixing_norm(block.mixing(h))
    grown = torch.nn.functional.gelu(u @ enter.weight.mT + enter.bias) @ leave.weight.mT + leave.bias
    assert enter.out_features == 24
    torch.testing.assert_close(block.eval()(h), block.norm(u + grown))
    # In training both the mixture and what is added are dropped, entry by entry.
    block.train()
    torch.nn.init.zeros_(leave.weight)
    torch.nn.init.zeros_(leave.bias)
    block.norm = torch.nn.Identity()
    dropped = block(h)
    assert 0.3 < float((dropped == 0).double().mean()) < 0.7
    torch.testing.assert_close(dropped[dropped != 0], 2 * u[dropped != 0])
    torch.nn.init.ones_(leave.bias)
    torch.nn.init.zeros_(block.mixing_norm.weight)
    torch.nn.init.zeros_(block.mixing_norm.bias)
    assert set(block(h).flatten().tolist()) == {0.0, 2.0}


def test_the_language_model_starts_small():
    torch.manual_seed(0)
    model = GrassmannLanguageModel(300, [made(64, 4)], d_model=64, context=90)
    for table in (model.token, model.position):
        assert float(table.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_refuses_bad_input():
    for offsets in ((), (0,), (-1, 2), (1.5,), (2, 2)):
        with pytest.raises((ValueError, TypeError), match="offsets"):
            made(offsets=offsets)
    with pytest.raises(ValueError, match="rank"):
        made(rank=1)
    with pytest.raises(ValueError, match="epsilon"):
        made(epsilon=0.0)
    with pytest.raises(ValueError, match="width 6, got 5"):
        made()(states(1, 4, 5))
    with pytest.raises(ValueError, match="at most 4 tokens"):
        GrassmannLanguageModel(9, [GrassmannMixing(4, 3)], d_model=4, context=4)(torch.zeros(1, 5, dtype=torch.long))
    model = GrassmannLanguageModel(9, [GrassmannMixing(4, 3)], d_model=4, context=4)
    with pytest.raises(ValueError, match="mask: expected at least 3 columns, got 2"):
        model.embed(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: expected shape \(1, 4\), got \(1, 3\)"):
        inspect.unwrap(GrassmannMixing.forward)(made(), states(1, 4, 6), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="one module a layer"):
        GrassmannLanguageModel(9, [])
    with pytest.raises(ValueError, match="parallel"):
        made().planes(states(1, 1, 6).expand(1, 5, 6), 1)
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        made().planes(states(1, 5, 6), 5)
    assert math.isfinite(float(GrassmannBlock(6, made()).double()(states(1, 3, 6)).sum()))


def test_long_sequences_are_mixed_in_blocks_to_the_same_states(monkeypatch):
    torch.manual_seed(0)
    layer, states = GrassmannMixing(8, rank=4, offsets=(1, 3, 5)), torch.randn(2, 50, 8)
    mask = torch.rand(2, 50) < 0.8
    whole = layer(states), layer(states, mask)
    monkeypatch.setattr("subspan.nn.grassmann_mixing._BLOCK", 7)
    torch.testing.assert_close(layer(states), whole[0])
    torch.testing.assert_close(layer(states, mask), whole[1])
