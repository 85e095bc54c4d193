"""Groups of atoms that hold one manifold, found without labels, each as a `Subspace` to steer or erase with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import silhouette_score

from subspan.base import check_matrix, normalize_rows, require
from subspan.base.parameters import Count, NonNegative, Positive, Share, check_parameters
from subspan.geometry import Subspace, effective_rank
from subspan.geometry.rank import Rank
from subspan.measures import two_nn
from subspan.solvers.spectral import spectral_labels

from .ising import IsingGraph, between, firing

Affinity = Literal["ising", "cosine", "coactivation", "correlation", "mutual-information"]
_GAP, _SMALLEST_VALID, _CURVED = 1.5, 3, 3.0
_POSITIVE, _NEGATIVE = 0.85, 0.15
_BINS, _MOST_GROUPS, _ROWS = 8, 20, 2000


class AtomGroup(NamedTuple):
    """Atoms that belong together; see `AtomGroups`.

    Attributes
    ----------
    atoms
        Their numbers.
    subspace
        Linear, through the origin: principal directions of what the group adds to rows in which it fires, weighted by
        use. `residual` erases the group, moving along a direction steers it.
    regime
        By the signs of couplings inside: "capture" (they fire together), "shatter" (they shut each other out),
        "dilution" (both), "unvalidated" where `validated` is false, None for an affinity without signs.
    gap
        The largest ratio of neighbouring singular values of the centred codes.
    effective_rank
        Of their spectrum.
    intrinsic_dimension
        By TwoNN, of codes in rows where the group fires.
    validated
        Three atoms or more and a gap above 1.5.
    curved
        The effective rank is more than three times the intrinsic dimension: a linear test may not fit.
    """

    atoms: Int[np.ndarray, " s"]
    subspace: Subspace
    regime: Literal["capture", "shatter", "dilution", "unvalidated"] | None
    gap: float
    effective_rank: float
    intrinsic_dimension: float
    validated: bool
    curved: bool


@dataclass(eq=False, repr=False)
class AtomGroups:
    """Communities of atoms in ordinary rows, such as codes of running text: labels of a concept are not needed.

    Parameters
    ----------
    affinity
        "ising": couplings of `IsingGraph`; "cosine" of decoder directions; "coactivation": P(j fires | i fires), the
        mean of both ways; "correlation" of codes; "mutual-information" of codes in 0 and 8 quantiles, over the
        geometric mean of entropies. Of signed ones the absolute value.
    method
        "louvain" (needs networkx, extra: graph) or "spectral", with the number of groups (at most 20) that has the best
        silhouette.
    least_weight
        Affinities up to this are no edges.
    edges
        Keep only so many of the strongest edges; None: all.
    resolution
        Of Louvain: larger ones give smaller groups.
    min_size
        Atoms of a group, at least; others belong to none.
    rank
        Dimensions of the subspaces: a number, a share of the energy, or a rule.
    rates
        Only atoms that fire in a share of the rows between these take part.
    ising
        Parameters for `IsingGraph`, or a fitted one on the same codes; None: its defaults with `rates`.
    random_state
        Seed of the communities.

    Attributes
    ----------
    groups_ : list of AtomGroup
        The largest first.
    labels_ : (c,)
        Group of each atom, -1 for none.
    subspaces_ : tuple of Subspace
        Of the groups.
    affinity_ : (M, M)
        Between the atoms that took part, before edges are cut.
    kept_ : (M,)
        Their numbers.
    ising_ : IsingGraph or None

    Raises
    ------
    ValueError
        In `fit`, for values out of range, codes that do not fit the decoder, negative codes, and where fewer than two
        atoms fire often enough.
    ImportError
        For "louvain" without networkx.

    Notes
    -----
    Leiden's usual implementation is under the GPL; Louvain is what the lab's later code uses.

    References
    ----------
    Bhalla et al. (2026), Do sparse autoencoders capture concept manifolds?, arXiv 2604.28119, appendix E.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import AtomGroups
    >>> random = torch.Generator().manual_seed(0)
    >>> on = (torch.rand(4000, 2, generator=random) < 0.3).repeat_interleave(3, 1)  # two groups of three
    >>> codes = on * (torch.rand(4000, 6, generator=random) < 0.9) * torch.rand(4000, 6, generator=random)
    >>> groups = AtomGroups(random_state=0).fit(codes, torch.eye(6)).groups_
    >>> [(group.atoms.tolist(), group.subspace.dim, group.regime) for group in groups]
    [([0, 1, 2], 3, 'capture'), ([3, 4, 5], 3, 'capture')]
    """

    # `fit` checks the values: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    affinity: Affinity = "ising"
    method: Literal["louvain", "spectral"] = "louvain"
    least_weight: NonNegative = 0.005
    edges: Count | None = None
    resolution: Positive = 1.0
    min_size: Count = 2
    rank: Rank = 0.95
    rates: Sequence[Share] = (0.02, 0.98)
    ising: IsingGraph | None = None
    random_state: int | None = 0

    def fit(self, codes: Any, decoder: Any) -> AtomGroups:
        """Find groups from codes (n, c), best as a sparse matrix (`sparse_codes`), and the decoder (c, d)."""
        check_parameters(self)
        atoms = check_matrix(decoder, "decoder")
        fires: Any = firing(codes)
        if fires.shape[1] != len(atoms):
            raise ValueError(f"codes: {len(atoms)} columns are needed, one an atom, got {fires.shape[1]}")
        z = _sparse(codes)
        self.ising_ = None
        if self.affinity == "ising":
            self.ising_ = self._graph(fires)
            self.kept_ = self.ising_.kept_
        else:
            self.kept_ = between(fires, self.rates)
        self.affinity_ = self._affinities(z[:, self.kept_], fires[:, self.kept_], atoms)
        found = self._communities(self._cut(np.abs(self.affinity_)))
        listed = sorted((np.sort(self.kept_[np.asarray(each)]) for each in found), key=lambda g: (-len(g), g.tolist()))
        self.groups_ = [self._group(g, z, atoms) for g in listed if len(g) >= self.min_size and z[:, g].nnz]
        self.labels_ = np.full(len(atoms), -1)
        for number, group in enumerate(self.groups_):
            self.labels_[group.atoms] = number
        self.subspaces_ = tuple(group.subspace for group in self.groups_)
        return self

    def _graph(self, fires: Any) -> IsingGraph:
        if self.ising is None:
            return IsingGraph(rates=self.rates).fit(fires)
        if not hasattr(self.ising, "couplings_"):
            return self.ising.fit(fires)
        if len(self.ising.kept_) and int(self.ising.kept_.max()) >= fires.shape[1]:
            raise ValueError(f"ising: was fitted to other codes, with atom {int(self.ising.kept_.max())}")
        return self.ising

    # ------------------------------------------------------------------ affinities

    def _affinities(self, z: Any, fires: Any, atoms: torch.Tensor) -> Float[np.ndarray, "m m"]:
        if self.affinity == "ising":
            assert self.ising_ is not None
            return self.ising_.couplings_.copy()
        if self.affinity == "cosine":
            unit = normalize_rows(atoms[torch.from_numpy(self.kept_)].double())
            found = (unit @ unit.mT).cpu().numpy()
        else:
            measures: dict[str, Callable[[], Float[np.ndarray, "m m"]]] = {
                "coactivation": lambda: _coactivation(fires),
                "correlation": lambda: _correlation(z),
                "mutual-information": lambda: _mutual_information(z),
            }
            found = measures[self.affinity]()
        np.fill_diagonal(found, 0)
        return found

    def _cut(self, weights: Float[np.ndarray, "m m"]) -> Float[np.ndarray, "m m"]:
        upper = np.triu(np.where(weights > self.least_weight, weights, 0), 1)
        if self.edges is not None and np.count_nonzero(upper) > self.edges:
            least = np.partition(upper[upper > 0], -self.edges)[-self.edges]
            upper = np.where(upper >= least, upper, 0)
        return upper + upper.T

    # ------------------------------------------------------------------ communities

    def _communities(self, weights: Float[np.ndarray, "m m"]) -> list[list[int]]:
        if not weights.any():
            return []
        if self.method == "louvain":
            networkx = require("networkx", extra="graph")
            graph = networkx.from_numpy_array(weights)
            options: dict[str, Any] = {"resolution": self.resolution, "seed": self.random_state}
            return [sorted(each) for each in networkx.community.louvain_communities(graph, **options)]
        linked = np.flatnonzero(weights.any(0))
        part = weights[np.ix_(linked, linked)]
        labels = _best_spectral(part, self.random_state)
        return [linked[labels == label].tolist() for label in np.unique(labels)]

    # ------------------------------------------------------------------ one group

    def _group(self, members: Int[np.ndarray, " s"], z: Any, atoms: torch.Tensor) -> AtomGroup:
        own = z[:, members]
        rows = own[np.flatnonzero(own.getnnz(1))]
        own_atoms = atoms[torch.from_numpy(members)].double().cpu()
        second = torch.from_numpy(np.asarray((own.T @ own).todense(), dtype=np.float64))
        values, vectors = torch.linalg.eigh(second)
        factor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT @ own_atoms
        options: dict[str, Any] = {"count": float(rows.shape[0]), "dtype": torch.float32}
        subspace = Subspace.from_factor(factor, rank=_at_most(self.rank, len(members)), **options)
        sums = np.asarray(own.sum(0), dtype=np.float64).ravel()
        centred = second.numpy() - np.outer(sums, sums) / z.shape[0]
        spectrum = np.linalg.eigvalsh(centred)[::-1].clip(0)
        ratios = np.sqrt(spectrum[:-1] / np.maximum(spectrum[1:], 1e-12 * spectrum[0])) if spectrum[0] > 0 else [0.0]
        gap = float(max(ratios, default=0.0))
        validated = len(members) >= _SMALLEST_VALID and gap > _GAP
        spread = float(effective_rank(torch.from_numpy(spectrum.copy()))) if spectrum[0] > 0 else 0.0
        intrinsic = two_nn(rows[:_ROWS].toarray())
        curved = bool(intrinsic > 0 and spread > _CURVED * intrinsic)
        regime = self._regime(members) if validated else "unvalidated"
        regime = regime if self.ising_ is not None else None
        return AtomGroup(members, subspace, regime, gap, spread, intrinsic, validated, curved)

    def _regime(self, members: Int[np.ndarray, " s"]) -> Any:
        if self.ising_ is None:
            return None
        places = np.searchsorted(self.kept_, members)
        inside = self.ising_.couplings_[np.ix_(places, places)][np.triu_indices(len(places), 1)]
        inside = inside[inside != 0]
        positive = float((inside > 0).mean()) if len(inside) else 0.5
        return "capture" if positive >= _POSITIVE else "shatter" if positive <= _NEGATIVE else "dilution"


def _at_most(rank: Any, most: int) -> Any:
    return min(rank, most) if isinstance(rank, int) and not isinstance(rank, bool) else rank


def _sparse(codes: Any) -> Any:
    if sparse.issparse(codes):
        return sparse.csr_matrix(codes).astype(np.float64)
    dense = codes.detach().cpu().double().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes, float)
    return sparse.csr_matrix(dense)


def _coactivation(fires: Any) -> Float[np.ndarray, "m m"]:
    together = np.asarray((fires.T @ fires).todense(), dtype=np.float64)
    conditional = together / np.diag(together)[:, None]
    return (conditional + conditional.T) / 2


def _correlation(z: Any) -> Float[np.ndarray, "m m"]:
    n = z.shape[0]
    mean = np.asarray(z.mean(0)).ravel()
    covariance = np.asarray((z.T @ z).todense()) / n - np.outer(mean, mean)
    deviation = np.sqrt(np.diag(covariance).clip(0))
    scale = np.outer(deviation, deviation)
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


def _mutual_information(z: Any) -> Float[np.ndarray, "m m"]:
    """Of codes in a bin for 0 and eight quantiles of the others, from the counts of pairs of bins."""
    n, m = z.shape
    columns, bins = z.tocsc(), _BINS
    hot = np.zeros(len(columns.data), dtype=np.int64)
    for atom in range(m):
        part = slice(columns.indptr[atom], columns.indptr[atom + 1])
        values = columns.data[part]
        cuts = np.quantile(values, np.arange(1, bins) / bins) if len(values) else []
        hot[part] = atom * bins + np.searchsorted(cuts, values, side="right")
    marked: Any = sparse.csr_matrix((np.ones(len(hot)), (columns.indices, hot)), shape=(n, m * bins))
    single = np.asarray(marked.sum(0)).reshape(m, bins)
    marginal = np.concatenate([n - single.sum(1, keepdims=True), single], 1) / n
    entropy = -_xlogx(marginal).sum(1)
    information, turned = np.zeros((m, m)), marked.T.tocsr()
    for atom in range(m):
        joint = np.asarray((turned[atom * bins : (atom + 1) * bins] @ marked).todense())
        whole = np.zeros((m, bins + 1, bins + 1))
        whole[:, 1:, 1:] = joint.reshape(bins, m, bins).transpose(1, 0, 2)
        whole[:, 1:, 0] = single[atom] - whole[:, 1:, 1:].sum(2)
        whole[:, 0, 1:] = single - whole[:, 1:, 1:].sum(1)
        whole[:, 0, 0] = n - whole.sum((1, 2))
        information[atom] = entropy[atom] + entropy + _xlogx(whole / n).sum((1, 2))
    scale = np.sqrt(np.outer(entropy, entropy))
    return np.divide(information, scale, out=np.zeros_like(information), where=scale > 0)


def _xlogx(p: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    return p * np.log(np.where(p > 0, p, 1))


def _best_spectral(weights: Float[np.ndarray, "m m"], random_state: int | None) -> Int[np.ndarray, " m"]:
    """Spectral clustering with the number of groups that has the best mean silhouette, by 1 - weight as the distance.

    Parts without an edge between them are groups of their own at least.
    """
    distances = 1 - weights / weights.max()
    np.fill_diagonal(distances, 0)
    least, labels = connected_components(sparse.csr_matrix(weights), directed=False)
    best = -2.0
    for count in range(max(2, least), min(_MOST_GROUPS, len(weights) - 1) + 1):
        found = spectral_labels(weights, count, random_state=random_state)
        if len(np.unique(found)) < 2:
            continue
        score = float(silhouette_score(distances, found, metric="precomputed"))
        if score > best:
            best, labels = score, found
    return labels
