"""Convergent learning: do two networks learn the same units, combinations of units, or subspaces? (Li et al., 2016)"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.cluster import SpectralClustering
from sklearn.linear_model import lars_path_gram
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import like
from subspan.base.estimators import PairedEstimator
from subspan.base.parameters import Bounds, Count, Positive, check_value
from subspan.geometry import AffineMap, cca
from subspan.geometry.grassmann import random_basis
from subspan.solvers import assign
from subspan.statistics import JointMoments

from .unit_matches import Matching, SparsePrediction, UnitGroup, at_penalty, lasso_path, mean_agreement

Method = Literal["matching", "semi", "sparse", "rotation", "linear"]
# A unit whose spread is a millionth of its mean is constant to the rounding of float32.
_CONSTANT = 1e-12
_RIDGE = 1e-6
# Of the largest variance: a direction with less is there by rounding.
_SINGULAR = 1e-12


@dataclass(eq=False, repr=False)
class ConvergentLearning(ClassNamePrefixFeaturesOutMixin, TransformerMixin, PairedEstimator):
    """Units of two networks paired one to one, predicted from few, grouped many to many, and compared as subspaces.

    Rows are inputs (a feature map: every position of every image), columns are units. All comes from the joint moments
    of the two layers: one pass, O((p + q)²) memory, whatever the number of rows. Units that do not vary are left out.

    Parameters
    ----------
    method
        What `transform` predicts the units of Y from: "matching", the partner in the one-to-one matching with the
        largest total correlation; "semi", the most correlated unit, shared where several want it; "sparse", at most
        `n_partners` units chosen by the lasso; "rotation", all units through an orthogonal map; "linear", all units.
    sign
        "signed" pairs units that rise together, "absolute" also opposite ones; "auto" is "signed" where no activation
        is negative, as behind a ReLU.
    n_partners
        Of "sparse".
    n_groups, power, within
        Of `groups`.
    random_state
        Seed of `groups`.

    Attributes
    ----------
    moments_
        The `JointMoments` of the two layers.
    correlations_
        (p, q), 0 for dead units.
    dead_x_, dead_y_
        Units that do not vary.
    signed_
        Whether pairs must rise together.
    matching_, semi_matching_
        `Matching` each.
    map_
        The `AffineMap` of `method`.

    References
    ----------
    Li, Yosinski, Clune, Lipson & Hopcroft (2016), arXiv 1511.07543.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import ConvergentLearning
    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).relu()
    >>> y = 3 * x[:, [2, 0, 3, 1]] + 1  # the same units in another order and scale
    >>> ConvergentLearning().fit(x, y).matching_.partner.tolist()
    [2, 0, 3, 1]
    """

    method: Method = "matching"
    sign: Literal["auto", "signed", "absolute"] = "auto"
    n_partners: Count = 5
    n_groups: Annotated[int, Bounds(least=2)] | None = None
    power: Positive = 2.0
    within: bool = True
    random_state: int | None = 0

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, Y: Any) -> ConvergentLearning:
        """Fit to activations X (n, p) and Y (n, q) on the same inputs, as arrays or as streams of batches.

        Raises ValueError for NaN, unequal numbers of rows, fewer than 2 rows, or a layer without a living unit.
        """
        for name in ("moments_", "_negative"):
            self.__dict__.pop(name, None)
        return self.partial_fit(X, Y)

    def partial_fit(self, X: Any, Y: Any) -> ConvergentLearning:
        """Add paired rows to the moments and match anew."""
        self._check_parameters()
        reset = not hasattr(self, "moments_")
        for x, y in self._pairs(X, Y, reset=reset):
            if not hasattr(self, "moments_"):
                self.moments_ = JointMoments(x.shape[1], y.shape[1], device=x.device)
                self._negative = False
            self.moments_.update(x, y)
            self._negative = self._negative or bool((x < 0).any()) or bool((y < 0).any())
        return self._solve()

    @classmethod
    def from_moments(cls, moments: JointMoments, **parameters: Any) -> ConvergentLearning:
        """Fitted from joint moments alone (see `layer_moments`); sign "auto" is then "absolute"."""
        model = cls(**parameters)
        model._check_parameters()
        model.moments_, model._negative = moments, True
        model.n_features_in_ = moments.d_x
        return model._solve()

    def _solve(self) -> ConvergentLearning:
        moments = getattr(self, "moments_", None)
        if moments is None or moments.count < 2:
            raise ValueError("X, Y: need at least 2 rows (n_samples = 2)")
        p, q = moments.d_x, moments.d_y
        if moments.count <= p + q:
            warnings.warn(
                f"X, Y: {moments.count:g} rows for {p + q} units; correlations are near one by chance, and least "
                "squares fits anything",
                stacklevel=3,
            )
        variance = moments.joint.scatter.diagonal() / (moments.count - 1)
        alive = variance > _CONSTANT * moments.joint.mean.square()
        self._alive_x, self._alive_y = alive[:p].nonzero()[:, 0], alive[p:].nonzero()[:, 0]
        self.dead_x_, self.dead_y_ = (~alive[:p]).nonzero()[:, 0], (~alive[p:]).nonzero()[:, 0]
        for name, living in (("X", self._alive_x), ("Y", self._alive_y)):
            if not len(living):
                raise ValueError(f"{name}: every unit is constant; there is nothing to correlate")
        self._scale = torch.where(alive, variance, 0).sqrt()
        inverse = torch.where(alive, 1 / self._scale.where(alive, torch.ones_like(variance)), 0)
        self._joint = (moments.joint.covariance() * inverse[:, None] * inverse).clamp(-1, 1)
        self.correlations_ = self._joint[:p, p:]
        self.signed_ = self.sign == "signed" or (self.sign == "auto" and not self._negative)
        self.matching_, self.semi_matching_ = self._matching(), self._semi_matching()
        self.map_ = self.alignment(self.method)
        self._n_features_out = q
        return self

    def _strength(self) -> Float[Tensor, "a b"]:
        """What is matched: correlations of living units, or their magnitudes."""
        table = self.correlations_[self._alive_x][:, self._alive_y]
        return table if self.signed_ else table.abs()

    def _partners(self, chosen: Int[Tensor, " b"]) -> Matching:
        """Partners among the living units (-1: none) as units of the whole layers."""
        partner = torch.full((self.moments_.d_y,), -1, dtype=torch.int64, device=chosen.device)
        partner[self._alive_y] = torch.where(chosen >= 0, self._alive_x[chosen.clamp_min(0)], -1)
        columns = torch.arange(len(partner), device=chosen.device)
        correlation = torch.where(partner >= 0, self.correlations_[partner.clamp_min(0), columns], 0)
        return Matching(partner, correlation)

    def _matching(self) -> Matching:
        return self._partners(assign(self._strength().mT, random_state=self.random_state))

    def _semi_matching(self) -> Matching:
        return self._partners(self._strength().argmax(0))

    # ------------------------------------------------------------------ unit to unit, few to one

    def alignment(self, method: str = "matching") -> AffineMap:
        """The affine prediction of Y's units by one of the methods; least squares within what the method allows.

        A unit that is dead or has no partner is predicted by its mean.
        """
        check_value("method", method, Method)
        if method == "sparse":
            return self.sparse_prediction().map
        p = self.moments_.d_x
        standard = self._joint.new_zeros(self.moments_.d_y, p)
        living = self._alive_y[:, None], self._alive_x
        if method in ("matching", "semi"):
            found = self.matching_ if method == "matching" else self.semi_matching_
            rows = (found.partner >= 0).nonzero()[:, 0]
            standard[rows, found.partner[rows]] = found.correlation[rows]
        elif method == "rotation":
            u, _, vh = torch.linalg.svd(self.correlations_[self._alive_x][:, self._alive_y].mT, full_matrices=False)
            standard[living] = u @ vh
        else:
            gram = self._joint[self._alive_x][:, self._alive_x]
            regular = gram + _RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            cross = self.correlations_[self._alive_x][:, self._alive_y]
            standard[living] = torch.linalg.solve(regular, cross).mT
        return self._unscaled(standard)

    def _unscaled(self, standard: Float[Tensor, "q p"]) -> AffineMap:
        """A map between standardised units as a map between units."""
        p = self.moments_.d_x
        scale_x = torch.where(self._scale[:p] > 0, self._scale[:p], 1)
        matrix = standard * self._scale[p:, None] / scale_x
        return AffineMap(matrix, self.moments_.mean_y - matrix @ self.moments_.mean_x)

    def sparse_prediction(self, n_partners: int | None = None, *, refit: bool = True) -> SparsePrediction:
        """Each unit of Y from at most `n_partners` units of X, chosen by the lasso (its exact path, from the moments).

        refit: least squares on the chosen units; otherwise the shrunk coefficients at the last step with so few.
        """
        most = self.n_partners if n_partners is None else n_partners
        if most < 1:
            raise ValueError(f"n_partners: at least 1, got {most}")
        living = self._alive_x.cpu()
        gram = self._joint[self._alive_x][:, self._alive_x].cpu().numpy()
        standard = torch.zeros(self.moments_.d_y, self.moments_.d_x, dtype=torch.float64)
        partners: list[tuple[int, ...]] = [()] * self.moments_.d_y
        for unit in self._alive_y.tolist():
            cross = self.correlations_[self._alive_x, unit].cpu().numpy()
            order, path = lasso_path(gram, cross, min(most, len(gram)))
            last = path[:, -1]
            chosen = [index for index in order if last[index] != 0]
            if not chosen:
                continue
            if refit:
                block = gram[np.ix_(chosen, chosen)] + _RIDGE * np.eye(len(chosen))
                weights = np.linalg.solve(block, cross[chosen])
            else:
                weights = last[chosen]
            places = living[chosen]
            standard[unit, places] = torch.from_numpy(weights)
            partners[unit] = tuple(places.tolist())
        return SparsePrediction(self._unscaled(standard.to(self._joint)), tuple(partners))

    def sparse_path(
        self, penalties: Sequence[float], *, units: Sequence[int] | None = None
    ) -> list[tuple[float, float, float]]:
        """(penalty, mean number of partners, mean explained variance) along the lasso path, over units of Y.

        Penalties are per unit, in correlations: from the largest correlation of a unit on it has no partner. units: of
        Y (all living ones where None). Explained variance is that of the shrunk coefficients on the fitted moments.
        """
        wanted = sorted((float(value) for value in penalties), reverse=True)
        if not wanted or not wanted[-1] > 0:
            raise ValueError(f"penalties: positive numbers are needed, got {list(penalties)}")
        gram = self._joint[self._alive_x][:, self._alive_x].cpu().numpy()
        chosen = self._alive_y.tolist() if units is None else list(units)
        partners, explained = np.zeros(len(wanted)), np.zeros(len(wanted))
        for unit in chosen:
            cross = self.correlations_[self._alive_x, unit].cpu().numpy()
            least: Any = wanted[-1]
            alphas, _, path = lars_path_gram(cross, gram, n_samples=1, method="lasso", alpha_min=least)
            for place, penalty in enumerate(wanted):
                weights = at_penalty(alphas, path, penalty)
                partners[place] += np.count_nonzero(weights)
                explained[place] += 2 * weights @ cross - weights @ gram @ weights
        return [(a, float(b), float(c)) for a, b, c in zip(wanted, partners / len(chosen), explained / len(chosen))]

    def explained(
        self, method: str | AffineMap = "matching", moments: JointMoments | None = None
    ) -> Float[Tensor, " q"]:
        """Explained variance R² of each unit of Y by a method or a map, on `moments` (held-out ones; else the fitted).

        0 for units that do not vary there. May be negative on held-out moments.
        """
        fitted = self.alignment(method) if isinstance(method, str) else method
        held = self.moments_ if moments is None else moments
        if (held.d_x, held.d_y) != (self.moments_.d_x, self.moments_.d_y):
            fitted_to = f"{self.moments_.d_x} and {self.moments_.d_y}"
            raise ValueError(f"moments: are of {held.d_x} and {held.d_y} units, {fitted_to} were fitted")
        w = fitted.matrix
        offset = fitted.map(held.mean_x[None])[0] - held.mean_y
        factor = (held.count - 1) / held.count
        variance = held.cov_yy.diagonal() * factor
        error = variance + factor * (((w @ held.cov_xx) * w).sum(1) - 2 * (w * held.cov_xy.mT).sum(1))
        living = variance > _CONSTANT * held.mean_y.square()
        ratio = (error + offset.square()) / variance.where(living, torch.ones_like(variance))
        return torch.where(living, 1 - ratio, 0)

    # ------------------------------------------------------------------ many to many, subspaces

    def groups(self, n_groups: int | None = None) -> list[UnitGroup]:
        """Groups of units of both networks by spectral clustering of one graph, the best agreeing first.

        The edge between two units is |correlation|^power; within=False keeps only edges between the networks.
        n_groups: also the estimator's; None for an eighth of the living units.
        """
        m, p = len(self._alive_x) + len(self._alive_y), self.moments_.d_x
        wanted = n_groups or self.n_groups or max(2, m // 8)
        if not 2 <= wanted <= m:
            raise ValueError(f"n_groups: must lie in [2, {m}], the number of living units, got {wanted}")
        living = torch.cat([self._alive_x, self._alive_y + p])
        affinity = self._joint[living][:, living].abs().pow(float(self.power)).fill_diagonal_(0)
        if not self.within:
            border = len(self._alive_x)
            affinity[:border, :border] = 0
            affinity[border:, border:] = 0
        labels = SpectralClustering(
            wanted, affinity="precomputed", assign_labels="kmeans", random_state=self.random_state
        ).fit_predict(affinity.cpu().numpy())
        found = [
            self._group(living[torch.from_numpy(labels == label).to(living.device)]) for label in np.unique(labels)
        ]
        return sorted(found, key=lambda group: -group.agreement)

    def group_prediction(self, groups: Sequence[UnitGroup]) -> AffineMap:
        """Each unit of Y from all units of X in its group, by least squares; by its mean where there is none."""
        p = self.moments_.d_x
        standard = self._joint.new_zeros(self.moments_.d_y, p)
        for group in groups:
            if group.canonical is not None:
                gram = self._joint[group.x][:, group.x]
                regular = gram + _RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                weights = torch.linalg.solve(regular, self._joint[group.x][:, group.y + p])
                standard[group.y[:, None], group.x] = weights.mT
        return self._unscaled(standard)

    def random_groups(self, groups: Sequence[UnitGroup], random_state: int = 0) -> list[UnitGroup]:
        """Groups of the same sizes with members drawn at random: the agreement that their sizes alone give."""
        generator = torch.Generator().manual_seed(random_state)
        living_x = self._alive_x[torch.randperm(len(self._alive_x), generator=generator)]
        living_y = self._alive_y[torch.randperm(len(self._alive_y), generator=generator)]
        x, y = living_x.split([len(g.x) for g in groups]), living_y.split([len(g.y) for g in groups])
        return [self._group(torch.cat([a, b + self.moments_.d_x])) for a, b in zip(x, y)]

    def _group(self, members: Int[Tensor, " g"]) -> UnitGroup:
        p = self.moments_.d_x
        members = members.sort().values
        x, y = members[members < p], members[members >= p] - p
        widths = (p, self.moments_.d_y)
        if not len(x) or not len(y):
            return UnitGroup(x, y, 0.0, None, widths)
        scale = self._scale[members] * self._scale[members, None]
        whole = self._joint[members][:, members] * scale
        canonical = cca(
            whole[: len(x), : len(x)],
            whole[: len(x), len(x) :],
            whole[len(x) :, len(x) :],
            count=self.moments_.count,
            shrinkage=0.0,
        )
        return UnitGroup(x, y, float(self.correlations_[x][:, y].abs().mean()), canonical, widths)

    def canonical_correlations(self) -> Float[Tensor, " k"]:
        """Canonical correlations of the two layers' living units, descending, without shrinkage."""
        x, y = self._alive_x, self._alive_y
        whole = self._joint
        p = self.moments_.d_x
        return cca(
            whole[x][:, x], whole[x][:, y + p], whole[y + p][:, y + p], count=self.moments_.count, shrinkage=0.0
        ).correlations

    def rotation_similarity(self) -> float:
        """Largest total covariance under any rotation over the largest possible, |C_xy|_* / sqrt(tr C_xx tr C_yy)."""
        moments = self.moments_
        spread = moments.cov_xx.diagonal().sum() * moments.cov_yy.diagonal().sum()
        return float(torch.linalg.matrix_norm(moments.cov_xy, "nuc") / spread.sqrt())

    # ------------------------------------------------------------------ controls and report

    def rotated(self, random_state: int = 0) -> ConvergentLearning:
        """The same comparison after a random rotation of Y's living units, whitened before it and coloured after it.

        Y's covariances stay, the subspace that its units span and canonical correlations too; which direction of x a
        unit follows is drawn anew, also where few directions hold most of the variance.
        """
        generator = torch.Generator().manual_seed(random_state)
        places = self._alive_y + self.moments_.d_x
        values, vectors = torch.linalg.eigh(self._joint[places][:, places])
        kept = values > _SINGULAR * values[-1]
        directions, root = vectors[:, kept], values[kept].sqrt()
        turn = random_basis(len(root), len(root), generator=generator).to(root)
        standard = directions * root @ turn @ (directions / root).mT
        scale = self._scale[places]
        matrix = self._joint.new_zeros(len(places), self.moments_.d_y)
        matrix[:, self._alive_y] = scale[:, None] * standard / scale
        # A rotation gives units no sign of their own.
        return self._compared(matrix, "absolute")

    def permuted(self, random_state: int = 0) -> ConvergentLearning:
        """The same comparison with Y's units in random order, which matching must undo."""
        generator = torch.Generator().manual_seed(random_state)
        order = torch.randperm(self.moments_.d_y, generator=generator)
        matrix = torch.eye(self.moments_.d_y, dtype=torch.float64)[order].to(self._joint)
        return self._compared(matrix, "signed" if self.signed_ else "absolute")

    def _compared(self, matrix: Float[Tensor, "r q"], sign: str) -> ConvergentLearning:
        identity = AffineMap.identity(self.moments_.d_x).to(matrix)
        parameters = {**self.get_params(), "sign": sign}
        return type(self).from_moments(self.moments_.map(identity, AffineMap(matrix)), **parameters)

    def report(
        self, moments: JointMoments | None = None, *, groups: Sequence[UnitGroup] | None = None
    ) -> dict[str, float]:
        """The read-out of a pair of layers as numbers; explained variances on `moments` where held-out ones are given.

        groups: as `groups()` makes them (the default). "basis choice": their agreement minus that of matched units.
        """
        found = self.groups() if groups is None else groups
        in_groups = mean_agreement(found)
        both = self.matching_.partner >= 0
        same = self.matching_.partner[both] == self.semi_matching_.partner[both]
        matched = self.matching_.correlation[both].abs()

        def mean(method: str | AffineMap) -> float:
            return float(self.explained(method, moments)[self._alive_y].mean())

        return {
            "units x": float(self.moments_.d_x),
            "units y": float(self.moments_.d_y),
            "dead units": float(len(self.dead_x_) + len(self.dead_y_)),
            "semi-matching": self.semi_matching_.mean(),
            "matching": self.matching_.mean(),
            "same partner": float(same.double().mean()),
            "matched above 0.5": float((matched > 0.5).double().mean()),
            "R² of one partner": mean("matching"),
            "R² of few partners": mean("sparse"),
            "R² of its group": mean(self.group_prediction(found)),
            "R² of all units": mean("linear"),
            "group agreement": in_groups,
            "basis choice": in_groups - self.matching_.mean(),
            "rotation similarity": self.rotation_similarity(),
            "mean canonical correlation": float(self.canonical_correlations().mean()),
            "CKA": self.moments_.cka(),
        }

    def transform(self, X: Any) -> Any:
        """Units of Y (n, q) predicted from activations X (n, p) by `method`; numpy or torch as given."""
        check_is_fitted(self, "map_")
        rows = self._rows(X)
        return like(self.map_.to(rows.device).map(rows), X)
