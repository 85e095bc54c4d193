"""New features under the old model's class means."""

import pytest
import torch
from torch.nn import functional as F

from subspan.nn import influence_loss


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(40, 6, generator=generator),
        torch.randn(5, 6, generator=generator),
        torch.randint(5, (40,), generator=generator),
    )


def test_it_is_cross_entropy_with_the_class_means_as_weight():
    features, means, labels = draw()
    layer = torch.nn.Linear(6, 5, bias=False)
    layer.weight.data.copy_(means)
    torch.testing.assert_close(influence_loss(features, means, labels), F.cross_entropy(layer(features), labels))
    warm = influence_loss(features, means, labels, temperature=0.5)
    torch.testing.assert_close(warm, F.cross_entropy(2 * layer(features), labels))


def test_a_class_that_the_old_model_has_not_embedded_is_no_rival_and_does_not_count():
    features, means, labels = draw()
    means[2] = 0
    kept = labels != 2
    others = torch.tensor([0, 1, 3, 4])
    expected = F.cross_entropy(features[kept] @ means[others].mT, torch.searchsorted(others, labels[kept]))
    torch.testing.assert_close(influence_loss(features, means, labels), expected)
    alone = influence_loss(features.requires_grad_(), means, torch.full((40,), 2))
    alone.backward()
    assert float(alone.detach()) == 0
    assert bool((features.grad == 0).all())


def test_half_precision_features():
    features, means, labels = draw()
    loss = influence_loss(features.bfloat16(), means, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(influence_loss(features, means, labels)), rel=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((40,), 5)}, "labels: must be row numbers"),
        ({"labels": torch.full((40,), -1)}, "labels: must be row numbers"),
        ({"class_means": torch.ones(5, 7)}, "class_means: expected 6 columns"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_input_is_named(change, message):
    features, means, labels = draw()
    with pytest.raises(ValueError, match=message):
        influence_loss(**({"features": features, "class_means": means, "labels": labels} | change))
