"""Which atoms of a dictionary fire together or shut each other out: a sparse inverse Ising model of their firing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from subspan.base.parameters import Count, NonNegative, Positive, Share, check_parameters

LAMBDAS = (0.16, 0.08, 0.04, 0.02, 0.01, 0.005)
# Numbers of a block of rows: what stays in a cache.
_BLOCK = 1 << 20


class EBIC(NamedTuple):
    """One strength of the penalty on the way of `IsingGraph`.

    Attributes
    ----------
    penalty
        λ.
    edges
        Pairs that are coupled.
    log_likelihood
        Of the pseudo-likelihood, over all rows and atoms.
    value
        The criterion, which is to be low.
    """

    penalty: float
    edges: int
    log_likelihood: float
    value: float


@dataclass(eq=False, repr=False)
class IsingGraph:
    """Couplings J of spins s (+1: the atom fires, -1: it does not) by an L1-penalised pseudo-likelihood.

    p(s_j | all others) = σ(2 s_j (h_j + Σ_i J_ij s_i)). A coupling is what is left of a correlation once all other
    atoms are known. "fista" minimises the mean negative log pseudo-likelihood plus λ Σ |J_ij| for all atoms at once, J
    symmetric, for falling λ, each starting from the one before; λ is that with the lowest EBIC. Once that has risen
    twice, smaller ones are not tried. "liblinear" fits a logistic regression for each atom and makes J symmetric after.

    Parameters
    ----------
    solver
        "fista" or "liblinear".
    lambdas
        Of "fista", tried from the largest down.
    gamma
        Of the EBIC: -2 log likelihood + |E| log n + 4 γ |E| log M.
    alpha
        Of "liblinear": weight of the L1 term against the sum over rows (C = 1 / alpha).
    rates
        Only atoms that fire in a share of the rows between these are kept.
    max_iter, tolerance
        Of "fista" for each λ: iterations at most, and the largest change of a coupling at which it ends.

    Attributes
    ----------
    couplings_ : (M, M)
        J of the kept atoms, symmetric, 0 on the diagonal.
    fields_ : (M,)
        h.
    kept_ : (M,)
        Numbers of the atoms.
    lambda_ : float or None
        The penalty that was chosen.
    ebic_path_ : list of EBIC

    Raises
    ------
    ValueError
        In `fit`, for values out of range, negative or non-finite codes, and where fewer than two atoms fire often
        enough.

    References
    ----------
    Ravikumar, Wainwright & Lafferty (2010), High-dimensional Ising model selection using l1-regularized logistic
    regression; Foygel & Drton (2010), Extended Bayesian information criteria; Bhalla et al. (2026), arXiv 2604.28119.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import IsingGraph
    >>> random = torch.Generator().manual_seed(0)
    >>> fires = (torch.rand(3000, 4, generator=random) < 0.3).float()
    >>> fires[:, 1] = torch.where(torch.rand(3000, generator=random) < 0.9, fires[:, 0], fires[:, 1])  # together
    >>> graph = IsingGraph().fit(fires)
    >>> [(int(i), int(j)) for i, j in graph.edges()], bool(graph.couplings_[0, 1] > 0.3)
    ([(0, 1)], True)
    """

    # `fit` checks the values: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    solver: Literal["fista", "liblinear"] = "fista"
    lambdas: Sequence[Positive] = LAMBDAS
    gamma: NonNegative = 0.5
    alpha: Positive = 0.01
    rates: Sequence[Share] = (0.02, 0.98)
    max_iter: Count = 300
    tolerance: Positive = 1e-4

    def fit(self, codes: Any) -> IsingGraph:
        """Fit to codes (n, c): an array, a tensor, or a sparse matrix of scipy; of signed codes give `codes != 0`."""
        check_parameters(self)
        if not len(self.lambdas):
            raise ValueError("lambdas: at least one is needed")
        fires = firing(codes)
        self.kept_ = between(fires, self.rates)
        spins = _Spins(fires[:, self.kept_])
        self.lambda_, self.ebic_path_ = None, []
        if self.solver == "liblinear":
            self.couplings_, self.fields_ = spins.by_atom(self.alpha)
            return self
        best, rises = np.inf, 0
        couplings, fields = np.zeros((spins.m, spins.m)), spins.independent()
        for penalty in sorted(map(float, self.lambdas), reverse=True):
            couplings, fields, loss = spins.fista(couplings, fields, penalty, self.max_iter, self.tolerance)
            edges = int((np.triu(couplings, 1) != 0).sum())
            likelihood = -loss * spins.n
            value = -2 * likelihood + edges * (np.log(spins.n) + 4 * self.gamma * np.log(spins.m))
            self.ebic_path_.append(EBIC(penalty, edges, likelihood, value))
            if value < best:
                best, rises, self.lambda_ = value, 0, penalty
                self.couplings_, self.fields_ = couplings, fields - 2 * spins.rates @ couplings + couplings.sum(0)
            else:
                rises += 1
                if rises == 2:
                    break
        return self

    def edges(self) -> Int[np.ndarray, "e 2"]:
        """Numbers of the atoms of each coupled pair."""
        return self.kept_[np.argwhere(np.triu(self.couplings_, 1) != 0)]


def firing(codes: Any) -> sparse.csr_matrix:
    """Where codes (n, c) are above 0, as a sparse matrix of ones. Raises ValueError for NaN and negative codes."""
    if sparse.issparse(codes):
        found: Any = sparse.csr_matrix(codes).astype(np.float32)
        values = found.data
    else:
        dense = codes.detach().cpu() if isinstance(codes, Tensor) else torch.as_tensor(np.asarray(codes))
        if dense.ndim != 2 or not len(dense):
            raise ValueError(f"codes: expected (n, c), got shape {tuple(dense.shape)}")
        values = dense.float().numpy()
        found = sparse.csr_matrix(values)
    if not np.isfinite(values).all():
        raise ValueError("codes: contain NaN or infinity")
    if (values < 0).any():
        raise ValueError("codes: some are negative; of signed codes give `codes != 0`, whether each atom is active")
    found = found.copy()
    found.sum_duplicates()
    found.eliminate_zeros()
    found.data = np.ones_like(found.data)
    return found


def firing_rates(fires: Any) -> Float[np.ndarray, " c"]:
    """Share of rows in which each atom fires."""
    return np.asarray(fires.sum(0), dtype=np.float64).ravel() / fires.shape[0]


def between(fires: Any, rates: Sequence[float]) -> Int[np.ndarray, " m"]:
    """Atoms that fire in a share of the rows between two. Raises ValueError where there are fewer than two."""
    if len(rates) != 2 or not rates[0] < rates[1]:
        raise ValueError(f"rates: expected two shares, the smaller first, got {tuple(rates)}")
    share = firing_rates(fires)
    kept = np.flatnonzero((share >= rates[0]) & (share <= rates[1]))
    if len(kept) < 2:
        raise ValueError(
            f"codes: {len(kept)} of {len(share)} atoms fire in {rates[0]:g} to {rates[1]:g} of the rows, two are "
            "needed; give other rates, or more rows"
        )
    return kept


class _Spins:
    """Spins s = 2 b - 1 by the sparse b, and sums over all rows; fields are of spins less their means, folded back."""

    def __init__(self, fires: sparse.csr_matrix) -> None:
        self.fires: Any = sparse.csr_matrix(fires)
        self.n, self.m = self.fires.shape
        self.rates = firing_rates(fires)
        together = np.asarray((self.fires.T @ self.fires).todense(), dtype=np.float64) / self.n
        # The mean of the curvature of the loss is at most the covariance of the spins, which bounds the step.
        self.curvature = float(np.linalg.eigvalsh(4 * (together - np.outer(self.rates, self.rates)))[-1])

    def independent(self) -> Float[np.ndarray, " m"]:
        """Fields without any coupling."""
        return 0.5 * np.log(self.rates / (1 - self.rates))

    def _blocks(self) -> Iterator[Any]:
        step = max(1, _BLOCK // self.m)
        return (self.fires[start : start + step] for start in range(0, self.n, step))

    def loss(
        self, couplings: Float[np.ndarray, "m m"], fields: Float[np.ndarray, " m"]
    ) -> tuple[float, Float[np.ndarray, "m m"], Float[np.ndarray, " m"]]:
        """Mean negative log pseudo-likelihood, and its gradients (of a free J, before it is made symmetric)."""
        quarter = (4 * couplings).astype(np.float32)
        offset = (2 * (fields - 2 * self.rates @ couplings)).astype(np.float32)
        total, products, sums = 0.0, np.zeros((self.m, self.m)), np.zeros(self.m)
        for block in self._blocks():
            logits = np.asarray(block @ quarter) + offset
            rows, columns = block.nonzero()
            small = np.exp(-np.abs(logits))
            # log(1 + exp(u)) - b u, without overflow.
            total += float((np.maximum(logits, 0) + np.log1p(small)).sum(dtype=np.float64))
            total -= float(logits[rows, columns].sum(dtype=np.float64))
            rest = np.where(logits >= 0, 1, small) / (1 + small)
            rest[rows, columns] -= 1
            products += block.T @ rest
            sums += rest.sum(0, dtype=np.float64)
        gradient = 4 * (products - np.outer(self.rates, sums)) / self.n
        return total / self.n, gradient, 2 * sums / self.n

    def fista(
        self,
        couplings: Float[np.ndarray, "m m"],
        fields: Float[np.ndarray, " m"],
        penalty: float,
        max_iter: int,
        tolerance: float,
    ) -> tuple[Float[np.ndarray, "m m"], Float[np.ndarray, " m"], float]:
        """Accelerated proximal steps, whose momentum ends where it points uphill; J, fields and the loss there."""
        step = 1 / max(self.curvature, 1e-12)
        ahead, ahead_fields, momentum = couplings, fields, 1.0
        for _ in range(max_iter):
            _, gradient, slope = self.loss(ahead, ahead_fields)
            gradient = (gradient + gradient.T) / 2
            moved = ahead - step * gradient
            moved = np.sign(moved) * np.maximum(np.abs(moved) - step * penalty, 0)
            np.fill_diagonal(moved, 0)
            # Spins less their means are orthogonal to a constant: fields may take the step of their own curvature.
            moved_fields = ahead_fields - slope
            change, change_fields = moved - couplings, moved_fields - fields
            uphill = ((ahead - moved) * change).sum() / step + ((ahead_fields - moved_fields) * change_fields).sum()
            following = 1.0 if uphill > 0 else (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            weight = 0.0 if uphill > 0 else (momentum - 1) / following
            ahead, ahead_fields = moved + weight * change, moved_fields + weight * change_fields
            couplings, fields, momentum = moved, moved_fields, following
            if max(np.abs(change).max(), np.abs(change_fields).max()) < tolerance:
                break
        return couplings, fields, self.loss(couplings, fields)[0]

    def by_atom(self, alpha: float) -> tuple[Float[np.ndarray, "m m"], Float[np.ndarray, " m"]]:
        """One logistic regression on the others' firing an atom, and what its coefficients are in spins."""
        weights, offsets = np.zeros((self.m, self.m)), np.zeros(self.m)
        # Newer versions of scikit-learn name the L1 term by its share.
        newer = inspect.signature(LogisticRegression).parameters["penalty"].default == "deprecated"
        options: dict[str, Any] = {"l1_ratio": 1.0} if newer else {"penalty": "l1"}
        whole: Any = self.fires.tocsc()
        for atom in range(self.m):
            others = np.delete(np.arange(self.m), atom)
            target = np.asarray(whole[:, [atom]].todense()).ravel()
            model = LogisticRegression(C=1 / alpha, solver="liblinear", max_iter=1000, random_state=0, **options)
            fitted = model.fit(self.fires[:, others], target)
            weights[others, atom], offsets[atom] = fitted.coef_[0], fitted.intercept_[0]
        fields = (offsets + weights.sum(0) / 2) / 2
        return (weights + weights.T) / 8, fields
