"""A memory of subspaces under cheap keys: the subspace of a new key is the mean of those of its neighbours."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Inexact, Int
from torch import Tensor
from torch.nn import functional as F

from subspan.base import as_tensor, check_matrix, save_arrays, saved_object
from subspan.base.saved import optional
from subspan.geometry import Subspace
from subspan.geometry.grassmann import chordal_mean
from subspan.solvers import nearest

METRICS = ("euclidean", "cosine", "inner")
_SAVED: dict[str, Any] = {
    "keys": optional(Float[Tensor, "n q"]),
    "basis": optional(Inexact[Tensor, "n d r"]),
    "variances": optional(Float[Tensor, "n r"]),
    "weights": optional(Float[Tensor, " n"]),
    "prior_basis": optional(Inexact[Tensor, "d p"]),
    "prior_variances": optional(Float[Tensor, " p"]),
}
_FACTS: dict[str, Any] = {
    "n_components": int,
    "capacity": int | None,
    "metric": Literal["euclidean", "cosine", "inner"],
    "prior_weight": float,
}
# Numbers of all neighbours' bases that are in memory at once, and the share of a direction that only fills up.
_NUMBERS, _NO_SHARE = 1 << 24, 1e-6


class SubspaceBank:
    """Pairs of a key and a subspace; a query is answered by the weighted mean of the subspaces of its nearest keys.

    Nothing is trained: to add a pair is to learn it, and to evict it is to forget it. Real or complex subspaces.

    Parameters
    ----------
    n_components
        Dimension of what is answered.
    capacity
        Pairs that are kept, at most: the oldest are evicted. None: all.
    metric
        "euclidean", "cosine" or "inner", of keys.
    prior
        What is answered far from all keys, and by an empty bank: one subspace.
    prior_weight
        Of the prior, in pairs with the key that is asked for.

    Attributes
    ----------
    keys
        (n, q), or None where nothing was added yet.
    subspaces
        Their subspaces (n, d, r), a batch whose variances are shares of each one's total, or None.
    weights
        (n,) of each pair.

    Raises
    ------
    ValueError
        For numbers below 1, an unknown metric, a negative weight, and a prior that is a batch or too small.

    Notes
    -----
    The mean is extrinsic: the leading eigenvectors of sum_j w_j U_j Λ_j U_j', with Λ_j the shares of variance
    (``reduce="covariance"``, the mean covariance), or the identity (``reduce="projector"``). Spectra are worth keeping:
    directions that matter little in a neighbour count little.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Subspace
    >>> from subspan.represent import SubspaceBank
    >>> lines = Subspace(torch.eye(3).unsqueeze(-1))  # three axes, each under a number
    >>> bank = SubspaceBank(1).add([[0.0], [1.0], [10.0]], lines)
    >>> bank.query([[0.1], [9.0]], k=1).basis.squeeze(-1).abs().tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """

    def __init__(
        self,
        n_components: int,
        *,
        capacity: int | None = None,
        metric: str = "euclidean",
        prior: Subspace | None = None,
        prior_weight: float = 1e-6,
    ) -> None:
        for name, value in {"n_components": n_components, "capacity": capacity}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
        if not 0 < prior_weight < float("inf"):
            raise ValueError(f"prior_weight: must be positive and finite, got {prior_weight}")
        if prior is not None and (prior.batch_shape or prior.dim < n_components):
            raise ValueError(f"prior: expected one subspace of {n_components} directions or more, got {prior}")
        self.n_components, self.capacity, self.metric = n_components, capacity, metric
        self.prior = None if prior is None else shares(prior)
        self.prior_weight = prior_weight
        self.keys: Float[Tensor, "n q"] | None = None
        self.subspaces: Subspace | None = None
        self.weights: Float[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else len(self.keys)

    def __repr__(self) -> str:
        return f"SubspaceBank({self.n_components}, {len(self)} pairs)"

    # ------------------------------------------------------------------ memory

    def add(self, keys: Any, subspaces: Subspace, *, weights: Any = None) -> SubspaceBank:
        """Remember pairs of a key (n, q) and a subspace, of a batch of n; weights (n,) by default 1.

        Variances become shares of each subspace's total, so that labels of any scale count alike.

        Raises ValueError for NaN, other numbers or sizes than the bank holds, and a subspace without variance.
        """
        held = None if self.keys is None else self.keys.shape[1]
        rows = check_matrix(keys, "keys", columns=held, min_rows=1).detach()
        if len(subspaces.batch_shape) != 1 or len(subspaces) != len(rows):
            raise ValueError(
                f"subspaces: expected a batch of {len(rows)}, one a key, got batch shape {subspaces.batch_shape}"
            )
        if subspaces.ambient_dim < self.n_components:
            raise ValueError(f"n_components: {self.n_components} directions do not fit {subspaces.ambient_dim} dims")
        other = self.subspaces or self.prior
        if other is not None and other.ambient_dim != subspaces.ambient_dim:
            raise ValueError(f"subspaces: expected {other.ambient_dim} dimensions, got {subspaces.ambient_dim}")
        if other is not None and other.basis.is_complex() != subspaces.basis.is_complex():
            kinds = ["real", "complex"]
            raise ValueError(f"subspaces: the bank's are {kinds[other.basis.is_complex()]}, these are not")
        if self.subspaces is not None and self.subspaces.dim != subspaces.dim:
            raise ValueError(f"subspaces: expected {self.subspaces.dim} directions each, got {subspaces.dim}")
        given = rows.new_ones(len(rows)) if weights is None else as_tensor(weights, "weights").to(rows)
        if given.shape != (len(rows),) or not bool((given > 0).all()) or not bool(given.isfinite().all()):
            raise ValueError(f"weights: expected {len(rows)} positive numbers")
        new = shares(subspaces)
        if self.keys is None or self.subspaces is None or self.weights is None:
            self.keys, self.subspaces, self.weights = rows, new, given
        else:
            parts = {
                name: torch.cat([held, value.to(held)])
                for (name, held), value in zip(self.subspaces.arrays().items(), new.arrays().values())
            }
            self.keys = torch.cat([self.keys, rows.to(self.keys)])
            self.subspaces, self.weights = (
                Subspace.from_arrays(parts, None),
                torch.cat([self.weights, given.to(self.weights)]),
            )
        if self.capacity is not None and len(self) > self.capacity:
            self.evict(torch.arange(len(self) - self.capacity))
        return self

    def evict(self, index: Int[Tensor, " m"] | Bool[Tensor, " n"] | Any) -> SubspaceBank:
        """Forget pairs by their places (the oldest is 0), or by a mask (n,). Raises IndexError for places beyond."""
        if self.keys is None or self.subspaces is None or self.weights is None:
            raise IndexError("index: the bank is empty")
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[torch.as_tensor(index)] = False
        if not bool(kept.any()):
            self.keys = self.subspaces = self.weights = None
            return self
        places = torch.nonzero(kept)[:, 0]
        self.keys, self.subspaces, self.weights = self.keys[places], self.subspaces[places], self.weights[places]
        return self

    # ------------------------------------------------------------------ answers

    def query(
        self,
        keys: Any,
        k: int = 8,
        *,
        bandwidth: float | None = None,
        reduce: str = "covariance",
    ) -> Subspace:
        """The mean subspace of the nearest k pairs of each key.

        Parameters
        ----------
        keys
            (m, q).
        k
            Neighbours; all where the bank has fewer.
        bandwidth
            Of a Gaussian of the distance, in its units ("cosine" and "inner": of 1 - similarity, and of the largest
            less each product); None: all k alike.
        reduce
            "covariance" or "projector": whether shares of variance count.

        Returns
        -------
        A batch of m subspaces with variances, the share of the mean along each direction. Where the neighbours have
        fewer than `n_components` directions together, the rest is any complement, of share 0.

        Raises
        ------
        ValueError
            For an empty bank without a prior, NaN, other widths, and a bandwidth that is not positive.
        """
        if reduce not in ("covariance", "projector"):
            raise ValueError(f"reduce: expected 'covariance' or 'projector', got {reduce!r}")
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"bandwidth: must be positive, got {bandwidth}")
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        rows = check_matrix(keys, "keys", columns=None if self.keys is None else self.keys.shape[1], min_rows=1)
        # Bases of all neighbours of a block of queries are in memory at once.
        held = self.subspaces if self.subspaces is not None else self.prior
        if held is None:
            raise ValueError("keys: the bank is empty and has no prior, so that there is nothing to answer with")
        block = max(1, _NUMBERS // (min(k, len(self) + 1) * held.ambient_dim * held.dim))
        parts = [self._answer(part.detach(), k, bandwidth, reduce) for part in rows.split(block)]
        basis, variances = (torch.cat(each) for each in zip(*parts))
        return Subspace(basis, variances=variances)

    def _answer(
        self, rows: Float[Tensor, "m q"], k: int, bandwidth: float | None, reduce: str
    ) -> tuple[Inexact[Tensor, "m d c"], Float[Tensor, "m c"]]:
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        if self.keys is not None and self.subspaces is not None and self.weights is not None:
            values, index = nearest(rows, self.keys, min(k, len(self)), metric=self.metric)
            log_weights = self.weights[index].log().to(values)
            if bandwidth is not None:
                best = 1.0 if self.metric == "cosine" else values.amax(1, keepdim=True)
                squared = values if self.metric == "euclidean" else (best - values).square()
                log_weights = log_weights - squared / (2 * bandwidth**2)
            found.append((self.subspaces.basis[index], self.subspaces.variances[index], log_weights))  # pyright: ignore[reportOptionalSubscript]
        if self.prior is not None and self.prior.variances is not None:
            basis, variances = (x.expand(len(rows), 1, *x.shape) for x in (self.prior.basis, self.prior.variances))
            found.append((basis, variances, rows.new_full((len(rows), 1), self.prior_weight).log()))
        count = sum(log_weights.shape[1] for *_, log_weights in found)
        width = max(-(-self.n_components // count), *(basis.shape[-1] for basis, *_ in found))
        bases = torch.cat([F.pad(basis, (0, width - basis.shape[-1])) for basis, *_ in found], 1)
        spectra = torch.cat([F.pad(shares, (0, width - shares.shape[-1])) for _, shares, _ in found], 1)
        if reduce == "projector":
            spectra = (spectra > _NO_SHARE).to(spectra)
            spectra = spectra / spectra.sum(-1, keepdim=True)
        weights = torch.cat([log_weights.to(spectra) for *_, log_weights in found], 1).softmax(1)
        return chordal_mean(bases, self.n_components, weights=weights, spectra=spectra)

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, whole or not at all."""
        arrays: dict[str, Tensor] = {}
        if self.keys is not None and self.subspaces is not None and self.weights is not None:
            arrays = {"keys": self.keys, "weights": self.weights, **self.subspaces.arrays()}
        if self.prior is not None:
            arrays |= {f"prior_{name}": value for name, value in self.prior.arrays().items()}
        facts = {name: getattr(self, name) for name in _FACTS}
        save_arrays(path, "subspace bank", arrays, **facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SubspaceBank:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        with saved_object(path, "subspace bank", _SAVED, _FACTS) as (arrays, facts):
            prior = {name.removeprefix("prior_"): arrays[name] for name in arrays if name.startswith("prior_")}
            bank = cls(**facts, prior=Subspace.from_arrays(prior, None) if prior else None)
            if bank.prior is not None:
                bank.prior = Subspace.from_arrays(prior, None)  # as it was, to the last digit
            if "keys" in arrays:
                held = Subspace(arrays["basis"], variances=arrays["variances"])
                bank.add(arrays["keys"], held, weights=arrays["weights"])
                bank.subspaces = held
            return bank


def shares(subspace: Subspace) -> Subspace:
    """The same directions with the share of the total variance along each, alike where there are no variances.

    The total is that of the spectrum, where it is known. Raises ValueError where it is zero.
    """
    variances = subspace.variances
    if variances is None:
        return Subspace(subspace.basis, variances=subspace.basis.real.new_full(_spectral(subspace), 1 / subspace.dim))
    total = (variances if subspace.spectrum is None else subspace.spectrum.clamp_min(0)).sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError("subspaces: one has no variance at all, so that it is no label (a channel without paths?)")
    return Subspace(subspace.basis, variances=variances.clamp_min(0) / total)


def _spectral(subspace: Subspace) -> tuple[int, ...]:
    return (*subspace.batch_shape, subspace.dim)
