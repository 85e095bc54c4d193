"""Training of protocols: batches in their order, schedules, the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="protocols train with Lightning (extra: train)")

from subspan.reproduce import cosine, one_cycle, shuffled, train

pytestmark = pytest.mark.filterwarnings("ignore")


def squared_error(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def trained(**options: Any) -> torch.nn.Linear:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    batches = shuffled(x, x @ torch.tensor([[1.0], [-2.0], [0.5]]), batch_size=16, seed=0)
    torch.manual_seed(0)
    return train(torch.nn.Linear(3, 1), squared_error, batches, **{"epochs": 40, "learning_rate": 0.1, **options})


@pytest.mark.parametrize("options", [{}, {"schedule": one_cycle(0.2), "optimizer": "adamw"}, {"schedule": cosine}])
def test_training_finds_a_planted_map(options: dict[str, Any]) -> None:
    found = trained(clip=1.0, **options)
    torch.testing.assert_close(found.weight[0], torch.tensor([1.0, -2.0, 0.5]), atol=0.05, rtol=0)
    assert not found.training


def test_schedules_end_near_zero_and_a_cycle_rises_first() -> None:
    for schedule, rises in ((one_cycle(0.5), True), (cosine, False)):
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        made, rates = schedule(optimizer, 11), []
        for _ in range(10):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            made.step()
        assert (rates[0] < rates[4]) is rises
        assert max(rates) == pytest.approx(1, abs=0.1)
        assert optimizer.param_groups[0]["lr"] < 0.03


def test_training_can_be_watched_and_ended() -> None:
    seen: list[int] = []

    def watch(model: torch.nn.Module, step: int) -> bool:
        seen.append(step)
        return step == 5

    watched = trained(after_step=watch)
    assert seen == [1, 2, 3, 4, 5]
    assert torch.equal(watched.weight, trained(steps=5, epochs=None).weight)


def test_a_list_holds_whole_batches_in_their_order() -> None:
    seen = []

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(float(batch))
        return model(batch.reshape(1, 1)).square().sum()

    train(torch.nn.Linear(1, 1), loss, [3, 1, 2], collate=lambda row: torch.tensor(float(row)), learning_rate=0.1)
    assert seen == [3, 1, 2]
