from __future__ import annotations

import pytest
import torch
from torch import nn

from subspan.models import permute_units


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


@pytest.mark.parametrize(("made", "read", "units"), [(["0", "1"], "3", 6), ("3", "5", 4), ("5", "7", 5)])
def test_units_change_places_and_the_network_computes_the_same(made, read, units):
    model = network()
    model(torch.randn(50, 2, 4, 4))  # statistics of the normalisation that differ from unit to unit
    model.eval()
    order = torch.randperm(units, generator=torch.Generator().manual_seed(1))
    changed = permute_units(model, made, read, order)
    x = torch.randn(7, 2, 4, 4)
    first = int(made if isinstance(made, str) else made[-1]) + 1
    with torch.no_grad():
        torch.testing.assert_close(changed(x), model(x))
        torch.testing.assert_close(changed[:first](x), model[:first](x)[:, order])
    maker = int(made[0])
    assert not torch.equal(changed[maker].weight, model[maker].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0", "3", [0, 0, 1, 2, 3, 4]), "permutation"),
        (("0", "3", [1, 0]), "has 6 units"),
        (("2", "3", [0, 1, 2, 3, 4, 5]), "no parameters"),
        (("0", "2", [0, 1, 2, 3, 4, 5]), "no weight"),
        (("0", "7", [0, 1, 2, 3, 4, 5]), "reads 5 inputs"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        permute_units(network(), *arguments)
