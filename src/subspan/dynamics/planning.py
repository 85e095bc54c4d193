"""Plans in a learnt world: draws that are moved towards what costs least, or one look at the goal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.nn import MLP

Cost = Callable[[Tensor], Tensor]


@runtime_checkable
class LatentWorld(Protocol):
    """What is planned in: `JEPAWorldModel`, or any that says where actions lead and how far that is from a goal."""

    def rollout(self, z: Tensor, actions: Tensor) -> Tensor:
        """Latents (b, n, d) that actions (b, n, a) lead to from (b, t, d)."""
        ...

    def goal_cost(self, z: Tensor, goal: Tensor) -> Tensor:
        """How far latents are from those of goals."""
        ...


class CEMPlanner:
    """Cross-entropy method: actions drawn from normal distributions that follow the best of each round.

    Parameters
    ----------
    horizon
        Actions of a plan.
    n_samples, n_iter, n_elites
        Plans drawn a round; rounds; how many of the best give the next mean and spread.
    spread
        Standard deviation of the first round; actions are in units of their own spread.
    generator
        Of the draws.

    Raises
    ------
    ValueError
        For sizes below 1, more elites than samples, or fewer than two elites.

    References
    ----------
    Rubinstein (1999); settings of LeWorldModel, arXiv 2603.19312: the first plan of a round is its mean.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import CEMPlanner
    >>> planner = CEMPlanner(horizon=2, n_iter=12, generator=torch.Generator().manual_seed(0))
    >>> plans = planner.plan(lambda actions: (actions - 1.5).square().sum((-1, -2)), 1, 3)
    >>> plans.shape, bool((plans - 1.5).abs().max() < 0.1)
    (torch.Size([1, 2, 3]), True)
    """

    def __init__(
        self,
        *,
        horizon: int = 5,
        n_samples: int = 300,
        n_iter: int = 30,
        n_elites: int = 30,
        spread: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, size in (("horizon", horizon), ("n_samples", n_samples), ("n_iter", n_iter)):
            if size < 1:
                raise ValueError(f"{name}: at least 1, got {size}")
        if not 2 <= n_elites <= n_samples:
            raise ValueError(f"n_elites: from 2 to n_samples={n_samples}, got {n_elites}")
        if not spread > 0:
            raise ValueError(f"spread: must be positive, got {spread}")
        self.horizon, self.n_samples, self.n_iter, self.n_elites = horizon, n_samples, n_iter, n_elites
        self.spread, self.generator = spread, generator

    @torch.no_grad()
    def plan(self, cost: Cost, n_tasks: int, action_dim: int, *, like: Tensor | None = None) -> Float[Tensor, "b n a"]:
        """Plans (b, horizon, a) of b tasks; ``cost(actions)`` of plans (b, samples, horizon, a) gives (b, samples).

        Raises ValueError for a cost of another shape or one that is not finite.
        """
        like = torch.empty(0) if like is None else like
        mean = like.new_zeros(n_tasks, self.horizon, action_dim)
        spread = torch.full_like(mean, self.spread)
        for _ in range(self.n_iter):
            noise = torch.randn(
                n_tasks, self.n_samples, *mean.shape[1:], generator=self.generator,
                dtype=mean.dtype, device=None if self.generator is None else self.generator.device,
            )  # fmt: skip
            plans = mean[:, None] + spread[:, None] * noise.to(mean)
            plans[:, 0] = mean
            found = cost(plans)
            if found.shape != plans.shape[:2] or not bool(found.isfinite().all()):
                raise ValueError(
                    f"cost: expected finite numbers {tuple(plans.shape[:2])}, got {tuple(found.shape)} of which "
                    f"{int((~found.isfinite()).sum())} are not finite"
                )
            best = found.topk(self.n_elites, largest=False).indices
            elites = plans.gather(1, best[..., None, None].expand(-1, -1, *mean.shape[1:]))
            mean, spread = elites.mean(1), elites.std(1)
        return mean

    @torch.no_grad()
    def plan_to(
        self, model: LatentWorld, z: Float[Tensor, "b t d"], goal: Float[Tensor, "b d"], action_dim: int
    ) -> Float[Tensor, "b n a"]:
        """Plans whose last predicted latent is nearest to that of the goal, from latents of which the last is now."""

        def cost(plans: Tensor) -> Tensor:
            starts = z.repeat_interleave(self.n_samples, 0)
            ends = model.rollout(starts, plans.flatten(0, 1))[:, -1].unflatten(0, plans.shape[:2])
            return model.goal_cost(ends, goal[:, None].expand_as(ends))

        return self.plan(cost, len(z), action_dim, like=z)


class InverseDynamics(MLP):
    """The action that leads from a latent towards another: one pass in place of a search.

    Learnt from what was done: pairs of latents some steps apart, and the first action between them. It plans at a
    small part of the cost of `CEMPlanner`, and knows no more than the behaviour that it was taught with.

    Parameters
    ----------
    dim, action_dim
        Of latents and of actions.
    hidden
        Width of both hidden layers.

    References
    ----------
    Users of LeWorldModel report it at a hundredth of the search's cost.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import InverseDynamics
    >>> InverseDynamics(16, 2).act(torch.randn(4, 16), torch.randn(4, 16)).shape
    torch.Size([4, 2])
    """

    def __init__(self, dim: int, action_dim: int, *, hidden: int = 256) -> None:
        super().__init__((2 * dim, hidden, hidden, action_dim))

    def act(self, z: Float[Tensor, "b d"], goal: Float[Tensor, "b d"]) -> Float[Tensor, "b a"]:
        """The first action from z towards the goal."""
        return self(torch.cat([z, goal], -1))

    def loss(
        self, z: Float[Tensor, "b t d"], actions: Float[Tensor, "b t a"], generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """Mean squared error of the first action on the way to a later latent, which is drawn for every row."""
        b, t = z.shape[:2]
        if t < 2:
            raise ValueError(f"z: at least two latents in a row are needed, got {t}")
        ahead = torch.randint(1, t, (b,), generator=generator).to(z.device)
        later = z[torch.arange(b, device=z.device), ahead]
        return nn.functional.mse_loss(self.act(z[:, 0], later), actions[:, 0])
