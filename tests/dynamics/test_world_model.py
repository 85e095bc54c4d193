"""A world model's parts: what sees what, its loss, roll-outs, and paths that are straight."""

import pytest
import torch
from torch.nn import functional as F

from subspan.dynamics import ActionPredictor, JEPAWorldModel, straightness


def small(**options):
    torch.manual_seed(0)
    return JEPAWorldModel.of_images((1, 8, 8), 2, dim=12, subspace_dim=4, heads=2, depth=2, width=4, **options)


def stirred(module):
    """Modulations away from 0, where actions matter."""
    for block in module.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.3)
    return module.eval()


def test_a_prediction_sees_what_was_before_it_and_its_action_alone():
    predictor = stirred(ActionPredictor(8, history=4, depth=2, heads=2)).double()
    z, actions = torch.randn(2, 1, 4, 8, dtype=torch.float64).requires_grad_()
    seen = torch.autograd.grad(predictor(z, actions)[0, 1].sum(), (z, actions))
    for gradient in seen:
        assert gradient[0, :2].abs().sum(-1).min() > 0
        assert not gradient[0, 2:].any()


def test_actions_change_nothing_at_first():
    predictor = ActionPredictor(8, history=3, depth=2, heads=2)
    z = torch.randn(2, 3, 8)
    torch.testing.assert_close(predictor(z, torch.randn(2, 3, 8)), predictor(z, torch.zeros(2, 3, 8)))
    torch.testing.assert_close(predictor(z, torch.zeros(2, 3, 8)), predictor.norm(z + predictor.positions))


def test_the_loss_is_of_the_next_latent_and_of_all_latents_by_time():
    model, seen = small(), []
    model.regularizer = Watch(seen)
    images, actions = torch.rand(5, 4, 1, 8, 8), torch.randn(5, 4, 2)
    actions[:, -1] = torch.nan
    model.eval()
    found = model.losses(images, actions)
    z = model.encode(images)
    torch.testing.assert_close(found["prediction"], F.mse_loss(model.predict(z[:, :3], actions[:, :3]), z[:, 1:]))
    assert found["regularizer"].item() == pytest.approx(0.09 * 7)
    assert seen[0].shape == (4, 5, 12)
    torch.testing.assert_close(seen[0], z.transpose(0, 1))
    # Targets are trained as well: no gradient is stopped.
    z = z.detach().requires_grad_()
    gradient = torch.autograd.grad(F.mse_loss(model.predict(z[:, :3], actions[:, :3]), z[:, 1:]), z)[0]
    assert gradient[:, -1].abs().sum() > 0
    model.penalty = 0
    assert set(model.losses(images, actions)) == {"prediction"}


class Watch(torch.nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, z):
        self.seen.append(z)
        return z.new_tensor(7.0)


def test_a_rollout_is_prediction_after_prediction():
    model = small(history=2)
    stirred(model.predictor)
    model.eval()
    z, actions = torch.randn(3, 1, 12), torch.randn(3, 4, 2)
    rows = [z[:, 0]]
    for step in range(4):
        before = torch.stack(rows[-2:], 1)
        rows.append(model.predict(before, actions[:, max(0, step - 1) : step + 1])[:, -1])
    torch.testing.assert_close(model.rollout(z, actions), torch.stack(rows[1:], 1))
    assert model.goal_cost(z[:, 0], z[:, 0]).tolist() == [0, 0, 0]


def test_it_is_taught_by_a_trainer():
    pytest.importorskip("lightning", reason="Lightning comes with the extra train")
    from subspan.nn.training import quiet_trainer

    model = small()
    data = [(torch.rand(16, 4, 1, 8, 8), torch.randn(16, 4, 2)) for _ in range(4)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    objective = model.objective(learning_rate=1e-3)
    with quiet_trainer(max_epochs=3) as trainer:
        trainer.fit(objective, loader)
    assert objective.losses[-1] < objective.losses[0]


def test_straightness():
    turn = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    line = torch.arange(3.0)[:, None] * torch.tensor([2.0, -1.0])
    torch.testing.assert_close(
        straightness(torch.stack([turn, line, torch.zeros(3, 2)])), torch.tensor([0.0, 1.0, 0.0])
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: ActionPredictor(10, heads=4), "width: a multiple of the 4 heads is needed, got 10"),
        (lambda: ActionPredictor(8, history=2, heads=2)(*torch.zeros(2, 1, 3, 8)), "at most 2 latents in a row, got 3"),
        (lambda: small(penalty=-1.0), "penalty: must be 0 or more, got -1"),
        (lambda: small().losses(torch.zeros(2, 1, 1, 8, 8), torch.zeros(2, 1, 2)), "t at least 2"),
        (lambda: straightness(torch.zeros(2, 3)), "at least three points are needed, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
