"""Do a sparse autoencoder's atoms span a concept's manifold, tile it, or dilute it? (Bhalla et al., 2026)"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from subspan.base import check_matrix
from subspan.base.parameters import Count, NonNegative, Positive, Share, Whole, check_parameters
from subspan.geometry import Subspace
from subspan.nn import SAE

from .atom_groups import AtomGroup
from .capture_curves import CaptureCurve, capture_curve
from .manifold_diagnostics import manifold_diagnostics, tuning_curves
from .sae_training import check_codes

_ROWS = 2048


class GroupMatch(NamedTuple):
    """How a group of atoms goes with a concept; see `ManifoldCapture.matches`.

    Attributes
    ----------
    group
        Its number in the list.
    held
        Share of the concept's first atoms that are in the group.
    overlap
        Share of the concept's variance inside the group's subspace.
    largest_angle
        Largest principal angle, in degrees, between the group's subspace and as many directions of the concept (or the
        other way round): small before the group may be called "the" concept.
    """

    group: int
    held: float
    overlap: float
    largest_angle: float


@dataclass(eq=False, repr=False)
class ManifoldCapture:
    """Reads one concept in a sparse autoencoder: capture curves, support, receptive fields and tuning of its atoms.

    Parameters
    ----------
    max_atoms
        Of the curves, at most.
    share
        Of the variance that counts as captured, and that the concept's own subspace holds.
    outlier
        Points whose norm is more than so many standard deviations above the mean are left out; None: none.
    n_tuned, sigma
        Atoms with tuning curves, the first of the statistical curve, and the smoothing of these, in values.
    controls
        Random bases and dictionaries that are averaged.
    random_state
        Of the controls.

    Attributes
    ----------
    geometric_, statistical_, affine_ : CaptureCurve
        By directions alone; by what the autoencoder does; by the best affine map from the codes, of the points
        projected on `subspace_` (or of the contributions that were given).
    subspace_ : Subspace
        Principal subspace of the concept, `share` of its variance. Not there where the concept does not vary.
    diagnostics_ : Diagnostics
    tuning_ : TuningCurves or None
        Where labels are given.
    atoms_ : (n_tuned,)
        First atoms of the statistical curve.
    dilution_ : float or None
        Atoms of the statistical curve over principal directions, for `share`; None where it is not reached.
    codes_ : (n, c)

    Raises
    ------
    ValueError
        In `fit`, for values out of range, an autoencoder of another width, fewer than 10 points, NaN, and labels or
        contributions that are not one a point.

    References
    ----------
    Bhalla et al. (2026), Do sparse autoencoders capture concept manifolds?, arXiv 2604.28119.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SAEAdapter
    >>> from subspan.probe import ManifoldCapture
    >>> angle = torch.arange(120) * 6.2832 / 120
    >>> circle = torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
    >>> atoms = torch.cat([torch.eye(3), -torch.eye(3)])
    >>> sae = SAEAdapter(lambda x: (x @ atoms.T).relu(), lambda z: z @ atoms, atoms)
    >>> found = ManifoldCapture(max_atoms=6).fit(sae, circle, labels=range(120))
    >>> found.geometric_.atoms_needed(), found.statistical_.atoms_needed(), found.dilution_
    (2, 4, 2.0)
    >>> found.diagnostics_.regime, found.subspace_.dim
    ('capture', 2)
    """

    # `fit` checks the values: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    max_atoms: Count = 64
    share: Share = 0.95
    outlier: Positive | None = 3.0
    n_tuned: Count = 10
    sigma: NonNegative = 3.0
    controls: Whole = 5
    random_state: int = 0

    def fit(self, sae: SAE, X: Any, labels: Sequence[Any] | None = None, contributions: Any = None) -> ManifoldCapture:
        """Read the points X (n, d) of one concept through an autoencoder; labels (n,), such as years, are optional.

        contributions: (n, d) what the concept alone adds to the points, where that is known (planted manifolds).
        """
        check_parameters(self)
        decoder = check_matrix(sae.decoder, "sae")
        given = check_matrix(X, "X")
        if given.shape[1] != decoder.shape[1]:
            raise ValueError(f"sae: is of width {decoder.shape[1]}, X has {given.shape[1]} columns")
        if labels is not None and len(labels) != len(given):
            raise ValueError(f"labels: {len(given)} are needed, one a point, got {len(labels)}")
        # Where an autoencoder normalises rows, its atoms belong to rows so prepared.
        prepare = getattr(sae, "prepare", None)
        with torch.no_grad():
            parts = [(sae.encode(rows), rows if prepare is None else prepare(rows)) for rows in _parts(given, decoder)]
        self.codes_ = check_codes(torch.cat([codes for codes, _ in parts]), "sae", len(decoder))
        x = torch.cat([rows for _, rows in parts])
        points = x if contributions is None else check_matrix(contributions, "contributions")
        if points.shape != x.shape:
            raise ValueError(f"contributions: expected shape {tuple(x.shape)}, as X has, got {tuple(points.shape)}")
        options: dict[str, Any] = {"max_atoms": min(self.max_atoms, len(decoder)), "outlier": self.outlier}
        options |= {"controls": self.controls, "random_state": self.random_state}
        self.geometric_ = capture_curve(points, decoder, **options)
        kept = torch.from_numpy(self.geometric_.kept)
        options |= {"controls": 0}
        # What is left out is the same in all three.
        options |= {"outlier": None}
        codes, points = self.codes_[kept], points[kept]
        self.statistical_ = capture_curve(points, decoder, codes, method="statistical", **options)
        self.atoms_ = self.statistical_.order[: self.n_tuned]
        target, dim = points, None
        self.__dict__.pop("subspace_", None)
        if len(self.geometric_.pca):
            self.subspace_ = Subspace.fit(points.double(), rank=self.share)
            dim = self.subspace_.dim
            target = self.subspace_.project(points) if contributions is None else points
        self.affine_ = capture_curve(points, decoder, codes, method="affine", target=target, **options)
        self.diagnostics_ = manifold_diagnostics(codes, points, dim=dim)
        self.dilution_ = self._dilution()
        self.tuning_ = None
        if labels is not None and len(self.atoms_):
            values = [label for label, keep in zip(labels, self.geometric_.kept) if keep]
            self.tuning_ = tuning_curves(codes, values, self.atoms_.tolist(), sigma=self.sigma)
        return self

    def _dilution(self) -> float | None:
        atoms, directions = (
            self.statistical_.atoms_needed(self.share),
            CaptureCurve.atoms_needed(self.geometric_._replace(explained=self.geometric_.pca), self.share),
        )
        return None if atoms is None or directions is None else atoms / directions

    def matches(self, groups: Iterable[AtomGroup]) -> list[GroupMatch]:
        """How groups that were found without labels go with this concept; the best first.

        Raises ValueError before `fit`, for a concept that does not vary, and for groups of another width.
        """
        if not hasattr(self, "subspace_"):
            raise ValueError("fit: nothing was fitted, or the concept does not vary; it has no subspace")
        own, found = self.subspace_, []
        weights = own.variances / own.variances.sum() if own.variances is not None else None
        assert weights is not None
        for number, group in enumerate(groups):
            space = group.subspace
            if space.ambient_dim != own.ambient_dim:
                raise ValueError(f"groups: {number} is of width {space.ambient_dim}, the concept of {own.ambient_dim}")
            basis, concept = space.basis.float(), own.basis.float()
            inside = (basis.mT @ concept).square().sum(0)
            dim = min(space.dim, own.dim)
            angles = torch.rad2deg(Subspace(basis[:, :dim]).angles(Subspace(concept[:, :dim])))
            held = float(np.isin(self.atoms_, group.atoms).mean()) if len(self.atoms_) else 0.0
            found.append(GroupMatch(number, held, float((inside * weights).sum()), float(angles.max())))
        return sorted(found, key=lambda match: (-match.held, -match.overlap))


def _parts(x: Tensor, decoder: Tensor) -> Iterable[Tensor]:
    return (part.to(decoder) for part in x.split(_ROWS))
