"""A head of sentence pairs by planes of token pairs."""

import inspect

import pytest
import torch

from subspan.geometry.grassmann import pairwise_areas, parallelogram_area
from subspan.nn import GrassmannPairHead
from subspan.nn.grassmann_pair_head import GrassmannPairMixing, paired_means


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(**options):
    torch.manual_seed(0)
    sizes = {"rank": 12, "window": 4, "stride": 2, "layers": 2, "d_model": 10, "heads": 4, "ffn": 20}
    return GrassmannPairHead(6, 3, **{**sizes, **options}).double().eval()


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def windows_of(t, window, stride):
    return {first for first in range(0, t + 1, stride) if first <= t < first + window}


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 2), (5, 3), (3, 1)])
def test_pairs_are_the_windows_neighbours_and_the_other_sentence(window, stride):
    found = made(window=window, stride=stride).pairs(ones(1, 9), ones(1, 7))[0]
    place = [(0, t) for t in range(9)] + [(1, t) for t in range(7)]
    expected = torch.zeros(2, 16, 16)
    for s, (sentence, t) in enumerate(place):
        for u, (other, v) in enumerate(place):
            if s == u:
                continue
            sign = 1.0 if s < u else -1.0
            if sentence != other:
                expected[1, s, u] = sign
            elif windows_of(t, window, stride) & windows_of(v, window, stride):
                expected[0, s, u] = sign
    expected /= expected.abs().sum(-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(found, expected)
    assert not bool(found.diagonal(dim1=-2, dim2=-1).any())


def test_what_the_classifier_reads_is_dropped_in_training_alone():
    head = made(dropout=0.5)
    torch.nn.init.zeros_(head.classifier.bias)
    torch.nn.init.ones_(head.classifier.weight)
    for block in head.blocks:
        block.eval()
    x, y = tokens(1, 5, 6), tokens(1, 4, 6)
    still = head(x, y)
    assert torch.equal(head(x, y), still)
    head.dropout.train()
    seen = {round(float(head(x, y).detach()[0, 0]), 9) for _ in range(8)}
    assert len(seen) > 4


def test_one_wedge_a_token_and_head_is_the_mean_over_all_pairs():
    torch.manual_seed(0)
    layer, h = GrassmannPairMixing(6, 8, 2).double(), tokens(1, 9, 6)
    pairs = made(window=3, stride=2).pairs(ones(1, 5), ones(1, 4))
    z = layer.reduce(h)[0].unflatten(-1, (2, 4))
    mixed = layer(h, pairs)[0]
    for s in range(9):
        heads = []
        for head in range(2):
            total = torch.zeros(6, dtype=torch.float64)
            for u in torch.nonzero(pairs[0, head, s]).flatten().tolist():
                v, w = (z[s, head], z[u, head]) if s < u else (z[u, head], z[s, head])
                p = torch.stack([v[i] * w[j] - v[j] * w[i] for i in range(4) for j in range(i + 1, 4)])
                total = total + p / p.norm() * pairs[0, head, s, u].abs()
            heads.append(total)
        g = layer.project(torch.cat(heads))
        alpha = torch.sigmoid(layer.gate(torch.cat([h[0, s], g])))
        torch.testing.assert_close(mixed[s], alpha * h[0, s] + (1 - alpha) * g, rtol=1e-6, atol=1e-7)


def test_sentences_of_one_token_make_a_plane_too():
    # A head that wedges a pooled vector with itself has p = 0 and sees nothing of the pair.
    layer, h = GrassmannPairMixing(6, 8, 2).double(), tokens(1, 2, 6)
    pairs = made().pairs(ones(1, 1), ones(1, 1))
    seen = []
    layer.project.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    layer(h, pairs)
    inside, across = seen[0][0].split(6, -1)
    assert not bool(inside.any())
    torch.testing.assert_close(across.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(across[0], across[1])


def test_the_logits_depend_on_order_and_on_the_partner():
    head, a, b = made(window=4, stride=4), tokens(1, 8, 6), tokens(1, 8, 6, seed=2)
    before = head(a, b)

    def differs(premise, hypothesis, head=head, before=before):
        return float((head(premise, hypothesis) - before).abs().max().detach()) > 1e-5

    inside_a_window, across_windows = [1, 0, 2, 3, 4, 5, 6, 7], [4, 1, 2, 3, 0, 5, 6, 7]
    assert differs(a[:, inside_a_window], b)
    assert differs(a, b[:, inside_a_window])
    assert differs(a[:, across_windows], b)
    assert differs(b, a)
    # Without planes the tokens of a sentence are a set, and do not know those of the other.
    for block in head.blocks:
        torch.nn.init.zeros_(block.mixing.project.weight)
    torch.testing.assert_close(head(a[:, across_windows], b), head(a, b))


def test_states_of_a_sentence_depend_on_the_other_only_through_planes_with_it():
    head, a, b = made(layers=1), tokens(1, 5, 6), tokens(1, 4, 6, seed=2)
    pooled = []
    head.classifier.register_forward_pre_hook(lambda _, given: pooled.append(given[0][:, :10].detach()))
    for premise, hypothesis in [(a, b), (a, b + 1)]:
        head(premise, hypothesis)
    assert float((pooled[0] - pooled[1]).abs().max()) > 1e-5
    mixing = head.blocks[0].mixing
    torch.nn.init.zeros_(mixing.project.weight.data.unflatten(1, (4, -1))[:, 1::2])
    for premise, hypothesis in [(a, b), (a, b + 1)]:
        head(premise, hypothesis)
    torch.testing.assert_close(pooled[2], pooled[3])


def test_padding_anywhere_changes_nothing():
    head, a, b = made(), tokens(2, 7, 6), tokens(2, 5, 6, seed=2)
    expected = head(a, b)
    padded_a = torch.cat([tokens(2, 3, 6, seed=3), a], 1)
    padded_b = torch.cat([b, tokens(2, 4, 6, seed=4)], 1)
    masks = ones(2, 10), ones(2, 9)
    masks[0][:, :3] = False
    masks[1][:, 5:] = False
    torch.testing.assert_close(head(padded_a, padded_b, *masks), expected)
    assert float((head(padded_a, padded_b) - expected).abs().max().detach()) > 1e-5
    nothing = torch.zeros(2, 7, dtype=torch.bool)
    assert bool(head(a, b, nothing).isfinite().all())


def test_repeated_and_zero_tokens_have_finite_gradients():
    head = made().float()
    for premise in (torch.ones(1, 6, 6), torch.zeros(1, 6, 6)):
        x = premise.clone().requires_grad_()
        head(x, x.detach()).sum().backward()
        assert bool(x.grad.isfinite().all())


def test_areas_of_all_pairs():
    u, v = tokens(3, 4, 5), tokens(3, 6, 5, seed=2)
    v[:, 0] = 2 * u[:, 0]
    found = pairwise_areas(u, v, 1e-2)
    assert found.shape == (3, 4, 6)
    for i in range(4):
        for j in range(6):
            torch.testing.assert_close(found[:, i, j], parallelogram_area(u[:, i], v[:, j], 1e-2))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("heads", {"heads": 3}),
        ("heads", {"heads": 0}),
        ("rank", {"rank": 10}),
        ("rank", {"rank": 4}),
        ("window", {"window": 1, "stride": 1}),
        ("stride", {"stride": 5}),
        ("stride", {"stride": 0}),
        ("layers", {"layers": 0}),
        ("d_model", {"d_model": 0}),
        ("ffn", {"ffn": 0}),
        ("dropout", {"dropout": 1.0}),
    ],
)
def test_refuses_bad_sizes(name, options):
    with pytest.raises(ValueError, match=f"^{name}: "):
        made(**options)


def test_refuses_bad_input():
    with pytest.raises(ValueError, match=r"^num_classes: "):
        GrassmannPairHead(6, 0)
    with pytest.raises(ValueError, match=r"^in_features: "):
        GrassmannPairHead(0, 3)
    head, a, b = made(), tokens(2, 4, 6), tokens(2, 5, 6)
    # As without the checks of shapes that the tests run under.
    forward = inspect.unwrap(GrassmannPairHead.forward)
    for given, message in [
        ((tokens(2, 4, 3), b), r"^premise: .* 6, got 3"),
        ((a, tokens(2, 5, 3)), r"^hypothesis: .* 6, got 3"),
        ((a, b[:1]), r"^hypothesis: expected 2"),
        ((a, b, ones(2, 5)), r"^premise_mask: .*\(2, 4\), got \(2, 5\)"),
        ((a, b, None, ones(1, 5)), r"^hypothesis_mask: .*\(2, 5\), got \(1, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            forward(head, *given)


def test_sentences_are_compared_by_their_means():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 2, 5)
    a_mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    b_mask = torch.ones(3, 2, dtype=torch.bool)
    means = [torch.stack([a[0, :3].mean(0), a[1, 0], torch.zeros(5)]), b.mean(1)]
    expected = torch.cat([*means, (means[0] - means[1]).abs(), means[0] * means[1]], 1)
    torch.testing.assert_close(paired_means(a, b, a_mask, b_mask), expected)
