"""Linear operators of dynamics from moments of pairs: DMD, with delays, inputs and lifts (EDMD), and what they tell."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import schur
from scipy.stats import norm
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import as_tensor, check_finite, like
from subspan.base.estimators import Estimator
from subspan.base.parameters import Count, NonNegative, Positive
from subspan.geometry import Subspace, rank_rule, ridge
from subspan.geometry.closed_forms import reduced_rank_factors
from subspan.geometry.rank import Rank
from subspan.statistics import CrossMoments, Moments

from .trajectories import comes_in_batches, delayed, in_double, listed_trajectories, overlapping, rollout_errors

_UNSTABLE = 1.05


class Forecast(NamedTuple):
    """What is expected of the rows that follow, and how far off it may be.

    Attributes
    ----------
    mean, deviation
        (steps, c) each, in the data's units; the deviation is that of the forecast's error.
    lower, upper
        Ends of the interval that holds a value with the probability asked for, of each on its own.
    """

    mean: Any
    deviation: Any
    lower: Any
    upper: Any


class _Pairs:
    """Moments of lifted rows with inputs (x), of the rows that follow (y), of both, and of x with the data."""

    def __init__(self, lifted: int, inputs: int, state: int, device: torch.device) -> None:
        self.x, self.y = Moments(lifted + inputs, device=device), Moments(lifted, device=device)
        self.cross = CrossMoments(lifted + inputs, lifted, device=device)
        self.state, self.decode = Moments(state, device=device), CrossMoments(lifted, state, device=device)

    def update(self, lifted: Tensor, inputs: Tensor | None, state: Tensor) -> None:
        before = lifted[:-1] if inputs is None else torch.cat([lifted[:-1], inputs], 1)
        self.x.update(before)
        self.y.update(lifted[1:])
        self.cross.update(before, lifted[1:])
        self.state.update(state[:-1])
        self.decode.update(lifted[:-1], state[:-1])


class _Solution(NamedTuple):
    """z = basis' (lifted - mean) / scale; z' = operator z + control (u - mean_u) / scale_u + shift, but `first` from
    lifted rows to z'; data = mean_state + decode z. noise: covariance of a step's error, rest: of decoding's."""

    mean: Tensor
    scale: Tensor
    basis: Tensor
    first: Tensor
    operator: Tensor
    control: Tensor
    shift: Tensor
    mean_state: Tensor
    decode: Tensor
    noise: Tensor
    rest: Tensor
    spread: Tensor


@dataclass(eq=False, repr=False)
class KoopmanOperator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """Fit x' = K x (+ B u) to trajectories, in one pass: forecasts, modes, and the subspace of those that last.

    Dynamic mode decomposition; with `delays` that of Hankel matrices, with `lift` the extended one (EDMD). Only
    moments of pairs are kept, so that memory does not grow with the number of rows and fits can be continued.

    Parameters
    ----------
    rank
        Directions kept: an int, a float in (0, 1] of the variance, a rule by name, None for all. See `rank_rule`.
    ridge
        Penalty on K, in units of the mean variance of what it is applied to; 0: least squares.
    delays
        Rows that make a state: a row and those before it. 1: the row alone.
    lift
        A function from states (n, delays c), an array, to features (n, p), such as ``PolynomialFeatures(2).fit(x)
        .transform``; the data is read off the features by least squares. None: the states themselves.
    reduction
        What `rank` keeps: "pca", directions in which states vary, before K is fitted; "regression", those that K needs
        (reduced-rank regression; `rank` is an int).
    fit_intercept
        Whether rows vary about their mean (x' = K x + b) or about 0.
    standardize
        Give all features the same variance, so that channels in different units count alike in `rank` and `ridge`.
    clip_spectral_radius
        Eigenvalues of K beyond it are drawn back to it, as long roll-outs need; None: never. A warning names the
        largest one beyond 1.05.

    Attributes
    ----------
    operator_, control_
        K (r, r) and B (r, m) in the coordinates of `transform`, whose rows are z' = K z + B u.
    eigenvalues_
        (r,) of K, the largest absolute value first.
    modes_
        (r, c) complex, a row an eigenvalue: its share of a row of data, in the data's units.
    mode_energies_
        (r,) mean square that each mode adds to the data over the training rows, all channels in units of their
        deviation. Modes are not orthogonal, so that these do not add up to the variance.
    pairs_
        Pairs of rows that were seen.

    Notes
    -----
    Intervals come from the covariance of the one-step error, carried through K: they are right where K is, the errors
    are independent, normal and of one size. `Forecast` says nothing of what a training without such rows cannot know.

    References
    ----------
    Schmid (2010); Tu et al. (2014), arXiv 1312.0041; Williams, Kevrekidis & Rowley (2015), arXiv 1408.4408; Arbabi &
    Mezić (2017), arXiv 1611.06664; control as in Proctor, Brunton & Kutz (2016), arXiv 1409.6358.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.dynamics import KoopmanOperator
    >>> t = np.arange(300)
    >>> x = np.stack([np.cos(0.2 * t), np.cos(0.2 * t) + 0.98**t], axis=1)
    >>> model = KoopmanOperator(delays=2).fit(x[:250])
    >>> np.abs(model.eigenvalues_).round(3).tolist()[:3]
    [1.0, 1.0, 0.98]
    >>> bool(np.abs(model.forecast(x[:250], 50).mean - x[250:]).max() < 1e-6)
    True
    """

    rank: Rank | None = None
    ridge: NonNegative = 0.0
    delays: Count = 1
    lift: Callable[..., Any] | None = None
    reduction: Literal["pca", "regression"] = "pca"
    fit_intercept: bool = True
    standardize: bool = True
    clip_spectral_radius: Positive | None = None

    # ------------------------------------------------------------------ fit

    def fit(self, X: Any, y: Any = None, *, inputs: Any = None) -> KoopmanOperator:
        """Fit to trajectories X: one (n, c), several (a list of unequal lengths, or (m, n, c)), or a `Series`.

        An iterator or DataLoader gives one, batch by batch.

        inputs: rows u (n, m) that act on the step from each row to the next, in the same form; the last is not used.

        Raises ValueError for NaN, a trajectory without a pair, and inputs that do not fit.
        """
        self._check_parameters()
        if self.reduction == "regression" and (self.rank is None or not isinstance(self.rank, int | np.integer)):
            raise ValueError(f"rank: reduction='regression' needs a whole number, got {self.rank!r}")
        for name in ("_pairs", "_tail", "_inputs", "pairs_"):
            self.__dict__.pop(name, None)
        if comes_in_batches(X):
            if inputs is not None:
                raise ValueError("inputs: a trajectory that comes in batches takes none; use partial_fit")
            for number, batch in enumerate(X):
                rows = batch[0] if isinstance(batch, list | tuple) else batch
                self._add(rows, None, first=number == 0, continues=number > 0, whole=False)
            if not hasattr(self, "_pairs"):
                raise ValueError(f"X: gave no {self.delays + 1} rows of one trajectory")
        else:
            parts = listed_trajectories(X)
            acting = [None] * len(parts) if inputs is None else listed_trajectories(inputs)
            if len(acting) != len(parts):
                raise ValueError(f"inputs: expected {len(parts)} trajectories of them, as in X, got {len(acting)}")
            for number, (part, u) in enumerate(zip(parts, acting)):
                self._add(part, u, first=number == 0, continues=False)
        self._solve()
        return self

    def partial_fit(self, X: Any, y: Any = None, *, inputs: Any = None, continues: bool = False) -> KoopmanOperator:
        """Add a trajectory (n, c); continues: it goes on where the last one ended, and the step between them counts."""
        self._check_parameters()
        first = not hasattr(self, "_pairs")
        self._add(X, inputs, first=first, continues=continues and not first)
        self._solve()
        return self

    def solved(self, **parameters: Any) -> KoopmanOperator:
        """Another operator from the same moments, of another rank, ridge or reduction: no row is read again.

        Raises ValueError for parameters on which the moments depend.
        """
        check_is_fitted(self, "eigenvalues_")
        if {"delays", "lift"} & set(parameters):
            raise ValueError(f"parameters: the moments depend on delays and lift, got {list(parameters)}; fit again")
        again = copy.copy(self).set_params(**parameters)
        again._check_parameters()
        again._solve()
        return again

    def _add(self, part: Any, inputs: Any, *, first: bool, continues: bool, whole: bool = True) -> None:
        rows = self._rows(part, reset=first, min_rows=2 if whole and not continues else 1)
        if first:
            self._kind = part if isinstance(part, Tensor) else np.empty(0)
        rows = in_double(rows)
        u = None
        if inputs is not None:
            u = in_double(check_finite(as_tensor(inputs, "inputs"), "inputs"), rows.device)
            u = u[:, None] if u.ndim == 1 else u
            if u.ndim != 2 or len(u) != len(rows):
                raise ValueError(f"inputs: expected {len(rows)} rows, one for each of X, got shape {tuple(u.shape)}")
        if continues:
            before, acting = self._tail
            rows = torch.cat([before, rows])
            u = None if u is None or acting is None else torch.cat([acting, u])
        if len(rows) <= self.delays and whole and not continues:
            raise ValueError(
                f"X: a trajectory of {len(rows)} rows has no pair of states of {self.delays} rows; "
                f"at least {self.delays + 1} are needed"
            )
        width = self.delays * rows.shape[1]
        start = 0
        for block in overlapping(rows, self.delays, width) if len(rows) > self.delays else ():
            lifted, state = self._lifted(delayed(block, self.delays)), block[self.delays - 1 :]
            acts = None if u is None else u[start + self.delays - 1 : start + len(block) - 1]
            if not hasattr(self, "_pairs"):
                self._inputs = 0 if acts is None else acts.shape[1]
                self._pairs = _Pairs(lifted.shape[1], self._inputs, rows.shape[1], rows.device)
            if (0 if acts is None else acts.shape[1]) != self._inputs:
                given = 0 if acts is None else acts.shape[1]
                raise ValueError(f"inputs: expected {self._inputs} columns, as before, got {given}")
            self._pairs.update(lifted, acts, state)
            start += len(block) - self.delays
        self._tail = rows[-self.delays :].clone(), None if u is None else u[-self.delays :].clone()

    def _lifted(self, states: Float[Tensor, "n p"]) -> Float[Tensor, "n q"]:
        if self.lift is None:
            return states
        found = as_tensor(np.asarray(self.lift(states.cpu().numpy())), "lift", ndim=2).to(states)
        if len(found) != len(states):
            raise ValueError(f"lift: gave {len(found)} rows for {len(states)} states")
        return check_finite(found, "lift")

    # ------------------------------------------------------------------ solution

    def _solve(self) -> None:
        pairs, p = self._pairs, self._pairs.y.d
        self.pairs_ = int(pairs.x.count)

        def second(moments: Any) -> Tensor:
            return moments.covariance(0) if self.fit_intercept else moments.second_moment()

        deviation = pairs.x.covariance(0).diagonal().clamp_min(0).sqrt()
        flat = deviation <= 1e-10 * pairs.x.squares.div(max(pairs.x.count, 1)).sqrt()
        scale = torch.where(flat | (not self.standardize), torch.ones_like(deviation), deviation)
        squares = second(pairs.x) / torch.outer(scale, scale)
        cross = second(pairs.cross) / torch.outer(scale, scale[:p])
        data, after = second(pairs.decode) / scale[:p, None], second(pairs.y) / torch.outer(scale[:p], scale[:p])
        basis = torch.eye(p).to(squares)
        if self.reduction == "regression":
            full = reduced_rank_factors(squares, cross, alpha=self.ridge)(int(self.rank))  # pyright: ignore[reportArgumentType]
            basis = torch.linalg.svd(full, full_matrices=False)[0][:, : int(self.rank)]  # pyright: ignore[reportArgumentType]
            first, control = basis.mT @ full[:, :p], basis.mT @ full[:, p:]
            operator = first @ basis
        else:
            if self.rank is not None:
                values, vectors = torch.linalg.eigh(squares[:p, :p])
                kept = rank_rule(self.rank)(values.flip(0).clamp_min(0).cpu().numpy(), self.pairs_, p)
                basis = vectors.flip(1)[:, :kept]
            wide = torch.block_diag(basis, torch.eye(self._inputs).to(basis))
            full = ridge(wide.mT @ squares @ wide, wide.mT @ cross @ basis, alpha=self.ridge).matrix
            operator, control = full[:, : basis.shape[1]], full[:, basis.shape[1] :]
            first = operator @ basis.mT
        operator = self._stable(operator)
        # Errors of a step from all that is known, so that they are not less where the first step knows more.
        wide = torch.block_diag(basis, torch.eye(self._inputs).to(basis))
        both, inner = torch.cat([operator, control], 1), wide.mT @ squares @ wide
        seen = both @ (wide.mT @ cross @ basis)
        free = self.pairs_ / max(self.pairs_ - both.shape[1] - self.fit_intercept, 1)
        noise = (basis.mT @ after @ basis - seen - seen.mT + both @ inner @ both.mT) * free
        spread = inner[: basis.shape[1], : basis.shape[1]]
        decode = ridge(spread, basis.mT @ data, alpha=self.ridge if self.lift is not None else 0.0).matrix
        told = decode @ (basis.mT @ data)
        rest = second(pairs.state) - told - told.mT + decode @ spread @ decode.mT
        zero = torch.zeros_like
        mean, mean_state = pairs.x.mean, pairs.state.mean
        shift = basis.mT @ ((pairs.y.mean - mean[:p]) / scale[:p])
        if not self.fit_intercept:
            mean, mean_state, shift = zero(mean), zero(mean_state), zero(shift)
        self._solution = _Solution(
            mean, scale, basis, first, operator, control, shift, mean_state, decode, noise, rest, spread
        )
        self._set_modes()

    def _stable(self, operator: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
        """K, or K with its eigenvalues drawn back."""
        radius = float(torch.linalg.eigvals(operator).abs().max())
        if self.clip_spectral_radius is None or radius <= self.clip_spectral_radius:
            if radius > _UNSTABLE:
                warnings.warn(
                    f"X: an eigenvalue of K has the absolute value {radius:.3g}, so that roll-outs grow; "
                    "set clip_spectral_radius, a lower rank or a ridge",
                    stacklevel=4,
                )
            return operator
        found: Any = schur(operator.cpu().numpy(), output="real")
        blocks, turn = found
        at = 0
        while at < len(blocks):
            size = 2 if at + 1 < len(blocks) and blocks[at + 1, at] != 0 else 1
            own = slice(at, at + size)
            largest = np.abs(np.linalg.eigvals(blocks[own, own])).max()
            if largest > self.clip_spectral_radius:
                blocks[own, own] *= self.clip_spectral_radius / largest
            at += size
        return torch.from_numpy(turn @ blocks @ turn.T).to(operator)

    def _set_modes(self) -> None:
        found = self._solution
        values, vectors = np.linalg.eig(found.operator.cpu().numpy())
        order = np.argsort(-np.abs(values), kind="stable")
        values, self._vectors = values[order].astype(complex), vectors[:, order].astype(complex)
        modes = (found.decode.cpu().numpy() @ self._vectors).T
        inverse = np.linalg.pinv(self._vectors)
        size = np.einsum("ij,jk,ik->i", inverse, found.spread.cpu().numpy(), inverse.conj()).real.clip(0)
        deviation = self._pairs.state.covariance(0).diagonal().clamp_min(0).sqrt().cpu().numpy()
        relative = modes / np.where(deviation > 0, deviation, 1)
        self.mode_energies_ = size * (np.abs(relative) ** 2).sum(axis=1)
        self.eigenvalues_, self.modes_ = (self._given(torch.from_numpy(each)) for each in (values, modes))
        self.operator_, self.control_ = self._given(found.operator), self._given(found.control)
        self._n_features_out = len(values)

    def _given(self, values: Tensor) -> Any:
        return like(values, self._kind)

    # ------------------------------------------------------------------ use

    def _standing(self, lifted: Float[Tensor, "n q"]) -> Float[Tensor, "n q"]:
        """Lifted states, centred and scaled."""
        p = self._pairs.y.d
        return (lifted - self._solution.mean[:p]) / self._solution.scale[:p]

    def _coordinates(self, rows: Float[Tensor, "n c"]) -> Float[Tensor, "m r"]:
        """Of the states of a trajectory."""
        return self._standing(self._lifted(delayed(rows, self.delays))) @ self._solution.basis

    def transform(self, X: Any) -> Any:
        """Coordinates (n - delays + 1, r) of the states of one trajectory X (n, c), in which `operator_` acts."""
        check_is_fitted(self, "eigenvalues_")
        rows = self._rows(X, min_rows=self.delays)
        found = self._coordinates(in_double(rows, self._solution.basis.device))
        return like(found.to(rows.dtype), X)

    def eigenfunctions(self, X: Any) -> Any:
        """Coordinates (n - delays + 1, r), complex, of X along the modes; a step multiplies each by its eigenvalue."""
        check_is_fitted(self, "eigenvalues_")
        z = in_double(self._rows(X, min_rows=self.delays), self._solution.basis.device)
        z = self._coordinates(z)
        shift = torch.linalg.lstsq(
            torch.eye(len(self._solution.shift)).to(z) - self._solution.operator, self._solution.shift[:, None]
        ).solution[:, 0]
        found = (z - shift).cpu().numpy() @ np.linalg.pinv(self._vectors).T
        return like(torch.from_numpy(found), X)

    def predict(self, X: Any, n_steps: int = 1, inputs: Any = None) -> Any:
        """The rows (n, n_steps, c) that follow each of n histories.

        X: histories (n, h, c) of at least `delays` rows, or, without delays, rows (n, c). inputs: (n_steps, m) for all,
        or (n, n_steps, m), the first acting on the step from the last known row.

        Raises ValueError for histories that are too short and inputs that do not fit.
        """
        check_is_fitted(self, "eigenvalues_")
        if n_steps < 1:
            raise ValueError(f"n_steps: at least 1, got {n_steps}")
        if getattr(X, "ndim", 2) == 3:
            flat = self._rows(X.reshape(-1, X.shape[-1]))
            histories = flat.reshape(*X.shape[:2], -1)
        elif self.delays > 1:
            raise ValueError(f"X: expected histories (n, h, c) of h >= {self.delays} rows, got a matrix; add an axis")
        else:
            histories = self._rows(X)[:, None]
        if histories.shape[1] < self.delays:
            raise ValueError(f"X: histories have {histories.shape[1]} rows, at least {self.delays} are needed")
        states = in_double(histories[:, -self.delays :], self._solution.basis.device).flatten(1)
        start = self._standing(self._lifted(states))
        return like(self._rolled(start, n_steps, inputs).to(histories.dtype), X)

    def _rolled(self, start: Float[Tensor, "n q"], n_steps: int, inputs: Any) -> Float[Tensor, "n s c"]:
        found = self._solution
        acts = self._acting(inputs, len(start), n_steps)
        way = []
        z = start @ found.first.mT
        for step in range(n_steps):
            if step:
                z = z @ found.operator.mT
            z = z + found.shift + (acts[:, step] @ found.control.mT if acts is not None else 0)
            way.append(z)
        return found.mean_state + torch.stack(way, 1) @ found.decode.mT

    def _acting(self, inputs: Any, n: int, n_steps: int) -> Float[Tensor, "n s m"] | None:
        """Inputs of every history, centred and scaled."""
        if (inputs is None) != (self._inputs == 0):
            fitted = f"fitted with {self._inputs} inputs" if self._inputs else "fitted without inputs"
            raise ValueError(f"inputs: the operator was {fitted}, got {'none' if inputs is None else 'some'}")
        if inputs is None:
            return None
        u = check_finite(as_tensor(inputs, "inputs"), "inputs").to(self._solution.basis)
        u = u.expand(n, *u.shape) if u.ndim == 2 else u
        if u.shape != (n, n_steps, self._inputs):
            wanted = f"({n_steps}, {self._inputs}) or ({n}, {n_steps}, {self._inputs})"
            raise ValueError(f"inputs: expected {wanted}, got {tuple(np.shape(inputs))}")
        p = self._pairs.y.d
        return (u - self._solution.mean[p:]) / self._solution.scale[p:]

    def forecast(self, X: Any, n_steps: int, inputs: Any = None, *, level: float = 0.9) -> Forecast:
        """What follows one trajectory X (n, c), with intervals that hold each value with probability `level`."""
        check_is_fitted(self, "eigenvalues_")
        if not 0 < level < 1:
            raise ValueError(f"level: must lie in (0, 1), got {level}")
        rows = self._rows(X, min_rows=self.delays)
        mean = self.predict(rows[None, -self.delays :], n_steps, inputs)[0]
        deviation = self.deviations(n_steps).to(mean)
        reach = float(norm.ppf(0.5 + level / 2)) * deviation
        return Forecast(*(like(each, X) for each in (mean, deviation, mean - reach, mean + reach)))

    def deviations(self, n_steps: int) -> Float[Tensor, "s c"]:
        """Standard deviation of the error of each step ahead and channel, in the data's units."""
        found = self._solution
        spread, way = torch.zeros_like(found.noise), []
        for _ in range(n_steps):
            spread = found.operator @ spread @ found.operator.mT + found.noise
            way.append((found.decode @ spread @ found.decode.mT + found.rest).diagonal().clamp_min(0).sqrt())
        return torch.stack(way)

    def timescales(self, time_step: float = 1.0) -> tuple[Any, Any]:
        """(period, decay time) of each mode, in the unit of `time_step`; infinite where it does not turn, or lasts.

        After the decay time a mode is 1/e of what it was; a mode that grows has a negative one.
        """
        check_is_fitted(self, "eigenvalues_")
        values = np.asarray(self.eigenvalues_)
        turn, rate = np.abs(np.angle(values)), np.log(np.maximum(np.abs(values), 1e-300))
        with np.errstate(divide="ignore"):
            return 2 * math.pi * time_step / turn, -time_step / np.where(np.abs(rate) < 1e-12, -0.0, rate)

    def coherent_subspace(self, threshold: float = 0.95) -> Subspace:
        """The invariant subspace of the modes that last, |eigenvalue| >= threshold, in the coordinates of `transform`.

        Real and orthonormal, by an ordered real Schur form. Raises ValueError where there is no such mode.
        """
        check_is_fitted(self, "eigenvalues_")
        operator = self._solution.operator
        lasts: Any = lambda real, imag: math.hypot(real, imag) >= threshold  # noqa: E731
        found: Any = schur(operator.cpu().numpy(), output="real", sort=lasts)
        _, turn, kept = found
        if not kept:
            largest = float(np.abs(np.asarray(self.eigenvalues_)).max())
            raise ValueError(f"threshold: no eigenvalue reaches {threshold:g}, the largest is {largest:.3g}")
        return Subspace(torch.from_numpy(turn[:, :kept].copy()).to(operator))

    def score(self, X: Any, y: Any = None, *, n_steps: int = 1) -> float:
        """Minus the root mean square error `n_steps` ahead over the data's standard deviation: 0 is best."""
        check_is_fitted(self, "eigenvalues_")
        parts = [np.asarray(like(self._rows(part), np.empty(0))) for part in listed_trajectories(X)]
        return -rollout_errors(self.predict, parts, [n_steps], history=self.delays, starts=256)[n_steps]
