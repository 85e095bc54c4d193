"""Plans: a minimum that is known, goals of a world that is known, and an inverse that is learnt."""

import pytest
import torch

from subspan.dynamics import CEMPlanner, InverseDynamics


class Adding(torch.nn.Module):
    """A world where an action is a step: z + a."""

    def rollout(self, z, actions):
        return z[:, -1:] + actions.cumsum(1)

    def goal_cost(self, z, goal):
        return (z - goal).square().sum(-1)


def planner(**options):
    sizes = {"horizon": 3, "n_samples": 100, "n_iter": 15, "n_elites": 10}
    return CEMPlanner(**{**sizes, "generator": torch.Generator().manual_seed(0), **options})


def test_every_task_gets_its_own_plan():
    goals = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    plans = planner().plan_to(Adding(), torch.zeros(2, 1, 2), goals, 2)
    torch.testing.assert_close(plans.sum(1), goals, atol=0.05, rtol=0)
    again = planner().plan_to(Adding(), torch.zeros(2, 1, 2), goals, 2)
    assert again.equal(plans)


def test_the_mean_is_among_the_plans_and_the_best_give_the_next():
    seen = []

    def cost(plans):
        seen.append(plans)
        return plans.square().sum((-1, -2))

    found = planner(n_iter=2).plan(cost, 1, 2)
    assert not seen[0][0, 0].any()
    best = seen[0][0][cost(seen[0])[0].topk(10, largest=False).indices]
    torch.testing.assert_close(seen[1][0, 0], best.mean(0))
    assert (seen[1][0] - best.mean(0))[1:].std() < 0.7 * seen[0].std()
    assert found.abs().max() < 0.5


def test_an_inverse_learns_the_step_to_a_goal():
    model = InverseDynamics(2, 2, hidden=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        actions = torch.nn.functional.normalize(torch.randn(128, 1, 2), dim=-1).expand(-1, 4, 2)
        z = torch.randn(128, 1, 2) + torch.cat([torch.zeros(128, 1, 2), actions.cumsum(1)[:, :3]], 1)
        optimizer.zero_grad()
        loss = model.loss(z, actions)
        loss.backward()
        optimizer.step()
    here, way = torch.randn(50, 2), torch.nn.functional.normalize(torch.randn(50, 2), dim=-1)
    assert (model.act(here, here + 2 * way) - way).square().mean() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon: at least 1, got 0"),
        ({"n_elites": 1}, "n_elites: from 2 to n_samples=100, got 1"),
        ({"n_elites": 101}, "n_elites: from 2 to n_samples=100, got 101"),
        ({"spread": 0.0}, "spread: must be positive, got 0"),
    ],
)
def test_settings_that_cannot_plan_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        planner(**options)


@pytest.mark.parametrize("cost", [lambda plans: plans.sum(), lambda plans: plans.sum((-1, -2)) / 0])
def test_costs_must_be_finite_numbers_one_a_plan(cost):
    with pytest.raises(ValueError, match="cost: expected finite numbers"):
        planner().plan(cost, 1, 2)


def test_one_latent_says_nothing_of_an_action():
    with pytest.raises(ValueError, match="at least two latents in a row are needed, got 1"):
        InverseDynamics(2, 2).loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
