"""Effects of actions on an outcome through a state that is seen: a linear first stage, and a control function."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import chi2
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import check_matrix, like
from subspan.base.arrays import refuse_masked
from subspan.base.estimators import Estimator, in_numpy
from subspan.base.parameters import Count, NonNegative, Positive, Seed
from subspan.geometry import AffineMap, Subspace, Whitener
from subspan.solvers import nearest
from subspan.statistics import JointMoments, Moments

from .additive_effects import AdditiveEffects, Effect, Outcome, kernel_effects, linear_effects, trained_effects

# A direction of the state counts as moved at this level, and as moved enough from this correlation on.
_LEVEL, _WEAK = 0.01, 0.1
# Of the distances of training rows to their nearest neighbours: beyond it a point lies outside.
_QUANTILE = 0.99
_CLOUD, _POINTS, _MEANS = 4000, 500, 1 << 18


class FirstStage(NamedTuple):
    """How actions A move a state Z: the least-squares fit, and whether all directions of Z are moved.

    Attributes
    ----------
    map : AffineMap
        From actions to the mean of the state.
    correlations
        (d_z,) canonical correlations of state and actions, descending: singular values of the map in units in which
        both have unit covariance.
    p_value
        Bartlett's test that some direction of the state is not moved at all.
    f_statistic
        Cragg and Donald's statistic of that direction; below 10 instruments are called weak.
    subspace : Subspace
        Directions of the state that the actions move (each at the level of 1 %), of one dimension at least.
    actions : Subspace
        Directions in which the actions were varied, through their mean.
    """

    map: AffineMap
    correlations: np.ndarray
    p_value: float
    f_statistic: float
    subspace: Subspace
    actions: Subspace

    @property
    def weak(self) -> bool:
        """Whether a direction of the state is moved too little to tell its effect from the noise's."""
        return bool(self.p_value > _LEVEL or self.correlations[-1] < _WEAK)

    def residual(self, z: Float[Tensor, "n d"], a: Float[Tensor, "n p"]) -> Float[Tensor, "n d"]:
        """What the fit leaves of the state: the noise V behind it."""
        return z - self.map.map(a)


def first_stage(z: Float[Tensor, "n d"], a: Float[Tensor, "n p"]) -> FirstStage:
    """The first stage from paired rows of a state and of actions, each with some spread.

    Parameters
    ----------
    z, a
        Rows (n, d_z) and (n, d_a).

    Returns
    -------
    FirstStage.

    Raises
    ------
    ValueError
        For constant states or actions.

    References
    ----------
    Bartlett (1938) for the number of canonical correlations; Cragg & Donald (1993).

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import first_stage
    >>> draws = torch.Generator().manual_seed(0)
    >>> a, v = torch.rand(400, 2, generator=draws), torch.randn(400, 2, generator=draws)
    >>> moved = first_stage(torch.stack([3 * a[:, 0] + v[:, 0], v[:, 1]], 1), a)
    >>> moved.subspace.dim, moved.weak, first_stage(3 * a + v, a).weak
    (1, True, False)
    """
    n, d = z.shape
    moments = JointMoments(a.shape[1], d).update(a, z)
    found = moments.cca(shrinkage=0.0)
    rank = Subspace.span(moments.cov_xx).dim
    correlations = torch.zeros(d, dtype=torch.float64)
    correlations[: len(found.correlations)] = found.correlations[:d]
    squares = correlations.square().clamp_max(1 - 1e-12)
    # Of each k: that all correlations after the first k are 0.
    tails = -(n - 1 - (d + rank + 1) / 2) * torch.log1p(-squares).flip(0).cumsum(0).flip(0)
    freedom = [(d - k) * max(rank - k, 1) for k in range(d)]
    p_values = [float(chi2.sf(float(tail), free)) for tail, free in zip(tails, freedom)]
    moved = next((k for k, p in enumerate(p_values) if p > _LEVEL), d)
    loadings = moments.cov_xy.mT @ found.x_directions[:, : max(1, moved)]
    least = float(squares[-1])
    return FirstStage(
        moments.ridge(0.0),
        correlations.numpy(),
        p_values[-1] if rank >= d else 1.0,
        max(0.0, n - rank - 1) / rank * least / (1 - least),
        Subspace.span(loadings, center=moments.mean_y) if float(loadings.abs().max()) > 0 else _first(d, moments),
        Subspace.span(moments.cov_xx, center=moments.mean_x),
    )


def _first(d: int, moments: JointMoments) -> Subspace:
    return Subspace.span(torch.eye(d, 1, dtype=torch.float64), center=moments.mean_y)


def check_actions(a: Any, *, rows: int, state: int | None = None) -> Float[Tensor, "n p"]:
    """Actions (n,) or (n, p) as a finite matrix with `rows` rows, which can move `state` directions (None: one).

    Raises ValueError for other lengths, NaN, constant actions, and fewer independent columns than directions.
    """
    refuse_masked(a, "A")
    table = a if getattr(a, "ndim", 2) != 1 else a.reshape(-1, 1) if hasattr(a, "reshape") else a.to_frame()
    found = check_matrix(table, "A").double().cpu()
    if len(found) != rows:
        raise ValueError(f"A: expected {rows} rows, one for each of X, got {len(found)}")
    centred = found - found.mean(0)
    spread = centred.abs().amax(0) > 1e-12 * found.abs().amax(0)
    if not bool(spread.any()):
        raise ValueError("A: is constant; actions must vary")
    wanted = state or 1
    rank = Subspace.span(centred / centred.std(0).clamp_min(1e-300)).dim if wanted > 1 else 1
    if rank < wanted:
        levels = len(found.unique(dim=0))
        seen = f"{levels} different actions span {rank}" if levels <= wanted else f"has {rank} independent columns"
        raise ValueError(
            f"A: {seen}, and the state {wanted} dimensions: the map of actions to the state cannot have full row rank"
        )
    return found


def _whitener(rows: Float[Tensor, "n d"]) -> Whitener:
    moments = Moments(rows.shape[1]).update(rows)
    return Whitener.of(moments.covariance(), moments.mean)


class Interval(NamedTuple):
    """Ends of intervals, (m,) each.

    Attributes
    ----------
    low, high
        In the kind of the actions.
    """

    low: Any
    high: Any


@dataclass(eq=False, repr=False)
class ControlFunctionRegressor(Estimator):
    """E[Y | do(A = a)] beyond the actions tried, of a state Z = M A + V that is seen, with V and Y confounded.

    The residuals V̂ of Z on A stand for what confounds Z and Y: y is fitted as outcome(z) + control(v̂), and the effect
    of an action is the mean of outcome(M a + v̂) over rows. `Rep4Ex` finds such a state in observations first.

    Parameters
    ----------
    outcome
        Both functions are "mlp" (two perceptrons, trained together; needs the extra `train`), "kernel" (a line and
        random features, penalised by generalised cross-validation; in closed form) or "linear" (two-stage least
        squares).
    hidden, max_steps, batch_size, learning_rate, weight_decay
        Of the perceptrons: units of hidden layers, and their training by AdamW.
    n_features
        Of "kernel", for each function.
    random_state
        Seed of the start, of batches and of random features.

    Attributes
    ----------
    first_stage_
        `FirstStage`: the map, and whether actions move all directions of the state.
    subspace_
        Directions of the state that they move.
    n_outcomes_
        Rows whose outcome was known.

    References
    ----------
    Newey, Powell & Vella (1999) for the control function; Saengkyongam et al. (2024), arXiv 2310.04295.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.dynamics import ControlFunctionRegressor
    >>> rng = np.random.default_rng(0)
    >>> a, v = rng.uniform(-1, 1, size=(2000, 1)), rng.normal(size=(2000, 1))
    >>> z = 2 * a + v
    >>> y = 3 * z[:, 0] - 4 * v[:, 0] + 0.1 * rng.normal(size=2000)  # v moves both: y falls where z is high by itself
    >>> model = ControlFunctionRegressor("linear").fit(z, a, y)
    >>> model.predict_do([[1.5]]).round(1), (3.0 * z.T @ y / (z.T @ z)[0, 0]).round(1)
    (array([9.]), array([3.9]))
    """

    outcome: Outcome = "mlp"
    hidden: Sequence[int] = (64, 64)
    max_steps: Count = 1000
    batch_size: Count = 2048
    learning_rate: Positive = 5e-3
    weight_decay: NonNegative = 1e-3
    n_features: Count = 200
    random_state: Seed = None

    def fit(self, Z: Any, A: Any, y: Any) -> ControlFunctionRegressor:
        """Fit states Z (n, d_z), actions A (n, d_a) or (n,), and outcomes y (n,), NaN where one is not known.

        Warns of weak actions. Raises ValueError for other shapes, NaN in Z or A, actions that cannot move every
        direction of Z, and fewer than 10 (d_z + d_a) rows with an outcome.
        """
        self._check_parameters()
        z = self._rows(Z, reset=True).double().cpu()
        a = check_actions(A, rows=len(z), state=z.shape[1])
        known, values = check_outcomes(y, len(z), least=10 * (z.shape[1] + a.shape[1]))
        self.first_stage_ = first_stage(z, a)
        self.subspace_ = self.first_stage_.subspace
        if self.first_stage_.weak:
            warn_weak(self.first_stage_, stacklevel=2)
        self._set_cloud(z)
        return self._fit(z, a, known, values)

    def _set_cloud(self, z: Tensor) -> None:
        """White states that were seen, and how far apart neighbours among them may be."""
        self._white = _whitener(z)
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
        self._cloud, self._some = self._white.whiten(z[order[:_CLOUD]]), order[-_POINTS:]
        apart = nearest(self._cloud, self._cloud, 1, exclude=torch.arange(len(self._cloud)))[0]
        self._edge = apart.quantile(_QUANTILE)

    def _fit(self, z: Tensor, a: Tensor, known: Tensor, values: Tensor) -> ControlFunctionRegressor:
        self._state, self._noise = z, self.first_stage_.residual(z, a)
        self._actions, self._known, self._values = a, known, values
        self.n_outcomes_ = len(values)
        self._effects = self._fitted(z, self._noise, known, values, self.random_state)
        return self

    def _fitted(self, z: Tensor, v: Tensor, known: Tensor, values: Tensor, seed: Seed) -> AdditiveEffects:
        white = [_whitener(side) for side in (z, v)]
        centre, scale = values.mean(), values.std().clamp_min(1e-12)
        state, noise = white[0].whiten(z[known]), white[1].whiten(v[known])
        target = (values - centre) / scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(check_random_state(seed).randint(2**31)))
            if self.outcome == "linear":
                found = linear_effects(state, noise, target)
            elif self.outcome == "kernel":
                found = kernel_effects(state, noise, target, n_features=int(self.n_features))
            else:
                found = trained_effects(
                    state, noise, target, hidden=tuple(self.hidden), max_steps=int(self.max_steps),
                    batch_size=int(self.batch_size), learning_rate=float(self.learning_rate),
                    weight_decay=float(self.weight_decay),
                )  # fmt: skip
        outcome = Effect(found.outcome, white[0], float(scale), float(centre))
        return AdditiveEffects(outcome, Effect(found.control, white[1], float(scale), 0.0))

    # ------------------------------------------------------------------ use

    def _given(self, A: Any) -> Float[Tensor, "m p"]:
        """Actions to predict for, as a matrix."""
        check_is_fitted(self, "first_stage_")
        columns = self._actions.shape[1]
        found = A if isinstance(A, Tensor) else np.asarray(A)
        if found.ndim == 1 and columns == 1:
            found = found.reshape(-1, 1)
        return check_matrix(found, "A", columns=columns).double().cpu()

    def predict_do(self, A: Any) -> Any:
        """E[Y | do(A = a)] (m,) for actions A (m, d_a), also beyond those of the fit.

        Warns where most of the states that an action would lead to lie outside those that were seen (`support`).
        """
        a = self._given(A)
        outside = self._outside(a)
        if bool((outside > 0.5).any()):
            warnings.warn(
                f"A: {int((outside > 0.5).sum())} of {len(a)} actions lead mostly to states that were never seen "
                f"(up to {float(outside.max()):.0%} of them; see support); there the outcome is a guess",
                stacklevel=2,
            )
        return like(self._effect(a, self._effects, self._noise), A)

    def _effect(self, a: Tensor, effects: AdditiveEffects, noise: Tensor) -> Float[Tensor, " m"]:
        means = self.first_stage_.map.map(a)
        size = max(1, _MEANS // len(noise))
        found = [
            effects.outcome((block[:, None] + noise).flatten(0, 1)).view(len(block), -1).mean(1)
            for block in means.split(size)
        ]
        return torch.cat(found) + effects.control(noise).mean()

    def predict(self, Z: Any, A: Any) -> Any:
        """E[Y | Z = z, do(A = a)] (n,) of states Z (n, d_z), each under its action in A (n, d_a)."""
        check_is_fitted(self, "first_stage_")
        z = self._rows(Z)
        a = self._given(A)
        if len(a) != len(z):
            raise ValueError(f"A: expected {len(z)} rows, one for each of Z, got {len(a)}")
        wide = z.double().cpu()
        noise = self.first_stage_.residual(wide, a)
        return like((self._effects.outcome(wide) + self._effects.control(noise)).to(z.dtype), Z)

    def support(self, A: Any) -> Any:
        """Share (m,) of the states that each action would lead to which lie outside those of the fit.

        Outside is farther from the nearest state of the fit, in units of unit covariance, than 99 % of those states are
        from their neighbours. It is 1 for actions outside the directions in which actions were varied.
        """
        return like(self._outside(self._given(A)), A)

    def _outside(self, a: Tensor) -> Float[Tensor, " m"]:
        noise, found = self._noise[self._some], []
        for mean in self.first_stage_.map.map(a):
            apart = nearest(self._white.whiten(mean + noise), self._cloud, 1)[0]
            found.append((apart > self._edge).double().mean())
        varied = self.first_stage_.actions
        reach = (self._actions - self._actions.mean(0)).norm(dim=1).max()
        off = varied.residual(a).norm(dim=1) > 1e-6 * reach
        return torch.where(off, 1.0, torch.stack(found))

    def predict_interval(
        self, A: Any, *, level: float = 0.95, n_resamples: int = 50, random_state: Seed = None
    ) -> Interval:
        """Bootstrap percentile interval of `predict_do`: rows are drawn again, and both stages on them fitted again.

        It knows nothing of an error of the states themselves. Each draw costs a fit: choose "kernel" or "linear" for
        many. Raises ValueError for a level outside (0, 1) and fewer than 2 draws.
        """
        a = self._given(A)
        if not 0 < level < 1:
            raise ValueError(f"level: must lie in (0, 1), got {level}")
        if n_resamples < 2:
            raise ValueError(f"n_resamples: at least 2, got {n_resamples}")
        random = check_random_state(random_state)
        outcomes = torch.full((len(self._state),), torch.nan, dtype=torch.float64)
        outcomes[self._known] = self._values
        draws = []
        for _ in range(n_resamples):
            rows = torch.from_numpy(random.randint(len(outcomes), size=len(outcomes)))
            again = ControlFunctionRegressor(**self.get_params(deep=False))
            again.first_stage_ = first_stage(self._state[rows], self._actions[rows])
            known = outcomes[rows].isfinite()
            again._fit(self._state[rows], self._actions[rows], known, outcomes[rows][known])
            draws.append(again._effect(a, again._effects, again._noise))
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = torch.stack(draws).quantile(tails, dim=0)
        return Interval(like(low, A), like(high, A))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def check_outcomes(y: Any, rows: int, *, least: int) -> tuple[Tensor, Float[Tensor, " k"]]:
    """Which rows have an outcome, (n,) of bools, and the outcomes of those.

    Raises ValueError for None, other shapes, infinity, fewer than `least` outcomes, and equal ones.
    """
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None: it holds the outcomes")
    refuse_masked(y, "y")
    values = torch.from_numpy(np.array(column_or_1d(in_numpy(y), dtype=np.float64, warn=True)))
    if len(values) != rows:
        raise ValueError(f"y: expected {rows} outcomes, one for each row of X, got {len(values)}")
    if bool(values.isinf().any()):
        raise ValueError("y: contains infinity; NaN stands for an outcome that is not known")
    known = ~values.isnan()
    if int(known.sum()) < least:
        raise ValueError(f"y: {int(known.sum())} known outcomes are too few; {least} are needed (NaN: not known)")
    if float(values[known].std()) == 0:
        raise ValueError("y: all outcomes are the same")
    return known, values[known]


def warn_weak(found: FirstStage, *, stacklevel: int) -> None:
    """Say that actions move a direction of the state too little."""
    warnings.warn(
        f"A: weak actions: a direction of the state has correlation {found.correlations[-1]:.2g} with them (p = "
        f"{found.p_value:.2g} that it is not moved, F = {found.f_statistic:.3g}); predictions there rest on noise",
        stacklevel=stacklevel + 1,
    )
