"""Losses of forgetting against loops over tokens and hand values."""

import math

import pytest
import torch

from subspan.nn import InverseHingeLoss, npo_loss, simnpo_loss


def looped(logits, labels):
    found = []
    for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.flatten().tolist()):
        if label != -100:
            p = row.softmax(0)
            found.append(1 + p[label] - max(p[v] for v in range(len(p)) if v != label))
    return sum(found) / len(found)


def test_the_inverse_hinge_is_the_loop_over_tokens_and_bounded():
    logits = 5 * torch.randn(3, 4, 7, dtype=torch.float64)
    labels = torch.randint(7, (3, 4))
    labels[0, 2] = labels[2, 3] = -100
    loss = InverseHingeLoss()
    torch.testing.assert_close(loss(logits, labels).double(), looped(logits, labels), atol=1e-6, rtol=0)
    sure = torch.full((1, 7), -30.0)
    sure[0, 3] = 30
    assert loss(sure, torch.tensor([3])).item() == pytest.approx(2)
    assert loss(sure, torch.tensor([4])).item() == pytest.approx(0)
    with pytest.raises(ValueError, match="no token counts"):
        loss(logits, torch.full((3, 4), -100))


def test_its_gradient_raises_the_runner_up_alone():
    logits = torch.tensor([[2.0, 1.5, -1.0]], requires_grad=True)
    InverseHingeLoss()(logits, torch.tensor([0])).backward()
    p = logits.detach().softmax(-1)[0]
    expected = torch.tensor([p[0] * (1 - p[0] + p[1]), -p[1] * (1 + p[0] - p[1]), -p[2] * (p[0] - p[1])])
    torch.testing.assert_close(logits.grad[0], expected)


def test_preference_losses_by_hand_and_their_limit():
    log_p, reference = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0])
    by_hand = 2 / 0.5 * sum(math.log(1 + math.exp(0.5 * gap)) for gap in (1.0, -1.0)) / 2
    assert npo_loss(log_p, reference, beta=0.5).item() == pytest.approx(by_hand)
    by_hand = 2 / 2.5 * sum(math.log(1 + math.exp(2.5 * value + 0.3)) for value in (-1.0, -3.0)) / 2
    assert simnpo_loss(log_p, margin=0.3).item() == pytest.approx(by_hand, rel=1e-5)
    # With a small beta its slope is that of gradient ascent.
    wide = log_p.double().requires_grad_()
    npo_loss(wide, reference.double(), beta=1e-6).backward()
    torch.testing.assert_close(wide.grad, torch.tensor([0.5, 0.5], dtype=torch.float64), atol=1e-6, rtol=0)
