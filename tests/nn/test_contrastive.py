from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from subspan.nn import ContrastiveLoss, info_nce, multi_positive_info_nce


def _logits(n: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _by_hand(logits, positives, excluded, rivals, average):
    losses, weights = [], []
    for i in range(logits.shape[0]):
        chosen = [j for j in range(logits.shape[1]) if positives[i, j]]
        terms = []
        for j in chosen:
            competing = [
                k
                for k in range(logits.shape[1])
                if k == j or (not excluded[i, k] and (rivals == "all" or not positives[i, k]))
            ]
            terms.append(-math.log(math.exp(logits[i, j]) / sum(math.exp(logits[i, k]) for k in competing)))
        if terms:
            losses.append(sum(terms) / len(terms))
            weights.append(len(terms) if average == "pairs" else 1)
    return sum(w * x for w, x in zip(weights, losses)) / sum(weights)


def test_classes_as_positives_are_the_loss_of_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    z, labels, itself = _logits(40, 7), torch.arange(40) % 5, torch.eye(40, dtype=torch.bool)
    found = info_nce(z, z, (labels[:, None] == labels) & ~itself, itself, temperature=0.3)
    torch.testing.assert_close(found, losses.SupConLoss(0.3)(z, labels), atol=1e-9, rtol=0)


def test_the_diagonal_is_the_cross_entropy_of_the_row_index():
    logits = _logits(7, 7)
    expected = F.cross_entropy(logits, torch.arange(7))
    assert multi_positive_info_nce(logits) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("rivals", ["all", "negatives"])
@pytest.mark.parametrize("average", ["anchors", "pairs"])
@given(seed=st.integers(0, 10_000))
def test_any_masks_agree_with_the_sum_written_out(seed, rivals, average):
    generator = torch.Generator().manual_seed(seed)
    positives = torch.rand(5, 6, generator=generator) < 0.35
    positives[0, 0] = True
    excluded = (torch.rand(5, 6, generator=generator) < 0.25) & ~positives
    logits = _logits(5, 6, seed)
    ours = multi_positive_info_nce(logits, positives, excluded, rivals=rivals, average=average)
    assert ours == pytest.approx(_by_hand(logits, positives, excluded, rivals, average), abs=1e-10)


@pytest.mark.parametrize("average", ["anchors", "pairs"])
def test_the_sum_inside_the_logarithm_is_written_out_and_asks_less(average):
    generator = torch.Generator().manual_seed(3)
    positives = torch.rand(5, 6, generator=generator) < 0.4
    positives[4] = False
    excluded = (torch.rand(5, 6, generator=generator) < 0.25) & ~positives
    logits = _logits(5, 6, 3).requires_grad_()
    masks = {"average": average}
    ours = multi_positive_info_nce(logits, positives, excluded, combine="log-sum", **masks)
    likelihoods = logits.masked_fill(excluded, -math.inf).softmax(-1).detach()
    anchors = positives.any(-1)
    terms = -(likelihoods * positives).sum(-1)[anchors].log()
    weights = positives.sum(-1)[anchors].double() if average == "pairs" else torch.ones_like(terms)
    assert ours.item() == pytest.approx(float((terms * weights).sum() / weights.sum()), abs=1e-10)
    assert ours.item() < multi_positive_info_nce(logits, positives, excluded, **masks).item()
    others = multi_positive_info_nce(logits, positives, excluded, rivals="negatives", combine="log-sum", **masks)
    assert others.item() == ours.item()
    ours.backward()
    assert bool(logits.grad.isfinite().all())
    assert not bool(logits.grad[4].any())
    x = torch.randn(4, 3, dtype=torch.float64)
    each = {"positives": torch.ones(4, 4, dtype=torch.bool), "combine": "log-sum", "symmetric": True}
    assert info_nce(x, x + 1, **each).item() == pytest.approx(0, abs=1e-12)
    assert info_nce(x, x + 1, **{**each, "combine": "mean-log"}).item() > 0.1


def test_an_excluded_pair_has_no_influence_and_no_gradient():
    logits = _logits(4, 4).requires_grad_()
    excluded = torch.zeros(4, 4, dtype=torch.bool)
    excluded[1, 2] = True
    multi_positive_info_nce(logits, excluded=excluded).backward()
    assert logits.grad is not None
    assert logits.grad[1, 2] == 0
    assert bool(torch.isfinite(logits.grad).all())
    assert bool((logits.grad[0] != 0).all())


def test_an_anchor_without_positives_does_not_count():
    logits = _logits(3, 3)
    positives = torch.eye(3, dtype=torch.bool)
    positives[2, 2] = False
    expected = multi_positive_info_nce(logits[:2], positives[:2])
    assert multi_positive_info_nce(logits, positives) == pytest.approx(float(expected), abs=1e-12)


def test_all_positive_rivals_left_out_gives_zero_loss_and_finite_gradient():
    logits = _logits(2, 3).requires_grad_()
    loss = multi_positive_info_nce(logits, torch.ones(2, 3, dtype=torch.bool), rivals="negatives")
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_a_wholly_excluded_anchor_leaves_no_trace():
    logits = _logits(3, 3).requires_grad_()
    excluded = torch.zeros(3, 3, dtype=torch.bool)
    excluded[2] = True
    positives = torch.eye(3, dtype=torch.bool) & ~excluded
    loss = multi_positive_info_nce(logits, positives, excluded)
    loss.backward()
    assert loss.item() == pytest.approx(multi_positive_info_nce(logits[:2], positives[:2]).item())
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_symmetric_is_the_mean_of_both_directions_and_blind_to_row_length():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(6, 4, generator=generator) for _ in range(2))
    positives = torch.eye(6, dtype=torch.bool)
    positives[0, 3] = True
    both = info_nce(3 * x, y, positives, temperature=0.2, symmetric=True)
    there = info_nce(x, y, positives, temperature=0.2)
    back = info_nce(y, x, positives.mT, temperature=0.2)
    assert both == pytest.approx(float(there + back) / 2, abs=1e-6)
    assert abs(float(there - back)) > 1e-3


def test_the_module_takes_both_directions():
    x, y = torch.randn(4, 3), torch.randn(6, 3)
    positives = torch.rand(4, 6) < 0.5
    positives[:, 0] = positives[0] = True
    both = [info_nce(a, b, mask, temperature=0.2) for a, b, mask in ((x, y, positives), (y, x, positives.mT))]
    torch.testing.assert_close(ContrastiveLoss(0.2)(x, y, positives), sum(both) / 2)


def test_the_temperature_is_learnt_and_capped():
    loss = ContrastiveLoss(0.02)
    x = torch.eye(4)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e4)
    loss(x, x.roll(1, 0)).backward()
    optimizer.step()
    assert float(loss.scale) < 50
    with torch.no_grad():
        loss.log_scale.fill_(20.0)
    assert float(loss.scale) == 100
    assert not list(filter(lambda p: p.requires_grad, ContrastiveLoss(learnt=False).parameters()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multi_positive_info_nce(_logits(2, 3)), "positives: needed"),
        (lambda: multi_positive_info_nce(_logits(2, 2), torch.zeros(2, 2, dtype=torch.bool)), "no anchor"),
        (
            lambda: multi_positive_info_nce(_logits(2, 2), excluded=torch.eye(2, dtype=torch.bool)),
            "both positive and excluded",
        ),
        (lambda: info_nce(torch.eye(2), torch.eye(2), temperature=0.0), "temperature"),
        (lambda: ContrastiveLoss(0.0), "temperature"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
