"""Diffusion as subspace clustering: mixtures of low-rank Gaussians and their denoiser (Wang et al., 2024)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import ClusterMixin
from sklearn.cluster import SpectralClustering
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import check_matrix, like, normalize_rows
from subspan.base.estimators import Estimator
from subspan.base.parameters import Count, NonNegative, Seed
from subspan.geometry import Subspace
from subspan.geometry.grassmann import orthonormalize
from subspan.nn.low_rank_mixture import LowRankMixtureDenoiser
from subspan.solvers.self_expression import RIDGE, mean_energy, ridge_self_expression
from subspan.solvers.spectral import affinity_from_representation, spectral_labels

# Responsibilities below this move no estimate in double precision.
_NEGLIGIBLE = 1e-9


@dataclass(eq=False, repr=False)
class LowRankMixtureDiffusion(ClusterMixin, Estimator):
    """Mixture of n_components Gaussians, each of `rank` directions and an isotropic rest, fitted to rows (n, d).

    As a clusterer it gives labels and one subspace a component; as a diffusion model its denoiser and score are known
    at every noise level in closed form, so that it samples and denoises without a network.

    Parameters
    ----------
    n_components, rank
        Number of Gaussians, and directions of each.
    method
        "em", expectation maximisation (a mixture of probabilistic PCAs) from where "hard" ends; "hard", each row to one
        component, which with covariance="identity", center=False and floor=0 is K-subspaces; "diffusion", gradient
        descent of the denoising loss over the bases (extra: train), from the start.
    covariance
        Of the directions: estimated ("spectrum") or 1 ("identity", as in the theory).
    center
        Whether the components have means.
    floor
        Variance off the subspace: "residual", estimated by component ("em": in common, or a component of few rows would
        shrink around them), or a number; 0 is exactly low rank, which denoises badly at low noise.
    init
        "shape-interaction", spectral clustering of |VV'|² with V the n_components · rank leading left singular vectors;
        "lsr", of the `rank` largest coefficients of each row in a ridge self-expression of unit rows (both O(n²)
        memory); "random"; or labels (n,).
    n_init
        Random starts.
    max_iter, tolerance
        Rounds, and the relative gain of the objective that ends them.
    epochs
        Of "diffusion".
    random_state
        Seed of the starts, the training and `sample`.

    Attributes
    ----------
    labels_
        (n,), in the kind of X.
    weights_, means_
        Shares (n_components,) and means (n_components, d) of the components.
    subspaces_
        Batched `Subspace`, one a component.
    denoiser_
        A `LowRankMixtureDenoiser`.
    objective_, n_iter_
        By round, and their number: log likelihood a row; hard: minus the mean squared residual; diffusion: empty.

    References
    ----------
    Wang et al. (2024), arXiv 2409.02426; Tipping & Bishop (1999) for the mixture of PCAs.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.cluster import LowRankMixtureDiffusion
    >>> rng = np.random.default_rng(0)
    >>> x = np.vstack([rng.normal(size=(40, 2)) @ rng.normal(size=(2, 8)) for _ in range(2)])
    >>> x += 0.05 * rng.normal(size=x.shape)
    >>> model = LowRankMixtureDiffusion(2, 2, random_state=0).fit(x)
    >>> noisy = x + 0.3 * rng.normal(size=x.shape)
    >>> bool(np.square(model.denoise(noisy, 0.3) - x).sum() < 0.5 * np.square(noisy - x).sum())
    True
    """

    n_components: Count = 2
    rank: Count = 4
    _: KW_ONLY
    method: Literal["em", "hard", "diffusion"] = "em"
    covariance: Literal["spectrum", "identity"] = "spectrum"
    center: bool = True
    floor: Literal["residual"] | NonNegative = "residual"
    init: Literal["shape-interaction", "lsr", "random"] | Sequence[int] = "shape-interaction"
    n_init: Count = 5
    max_iter: Count = 100
    tolerance: NonNegative = 1e-5
    epochs: Count = 60
    random_state: Seed = None

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, y: Any = None) -> LowRankMixtureDiffusion:
        """Fit to rows X (n, d); y is ignored.

        Raises ValueError for NaN, constant rows, rank >= d, or more components than rows. Warns where a component has
        no more rows than dimensions, so that its subspace is not determined.
        """
        self._check_parameters()
        rows = self._rows(X, reset=True).double()
        self._check_sizes(*rows.shape)
        self._random = check_random_state(self.random_state)
        scale = float((rows - rows.mean(0)).square().mean())
        if not scale > 1e-24 * float(rows.square().mean()):
            raise ValueError("X: the rows are constant; there is nothing to fit")
        self._smallest = 1e-9 * scale
        best: tuple[float, Any] | None = None
        for labels in self._starts(rows):
            found = self._alternate(rows, torch.nn.functional.one_hot(labels, self.n_components).double())
            if best is None or found[0][-1] > best[0]:
                best = found[0][-1], found
        assert best is not None
        self.objective_, denoiser = best[1]
        if self.method == "diffusion":
            denoiser = self._descend(rows, denoiser)
        self.n_iter_ = len(self.objective_)
        return self._keep(X, denoiser, rows)

    def _check_sizes(self, n: int, d: int) -> None:
        if self.n_components > n:
            raise ValueError(f"n_components: at most {n} with n_samples = {n}, got {self.n_components}")
        if d < 2:
            raise ValueError(f"X: {d} feature(s) leave no room for a subspace; at least 2 are needed")
        if self.rank >= d:
            raise ValueError(f"rank: at most {d - 1} with {d} feature(s), and a rest is needed, got {self.rank}")
        if self.method == "em" and self.floor == 0:
            raise ValueError("floor: the likelihood of an exactly low-rank mixture is unbounded; use method='hard'")

    def _starts(self, rows: Tensor) -> list[Int[Tensor, " n"]]:
        n, k = len(rows), self.n_components
        if not isinstance(self.init, str):
            labels = torch.as_tensor(np.asarray(self.init), dtype=torch.int64)
            if labels.shape != (n,) or int(labels.min()) < 0 or int(labels.max()) >= k:
                raise ValueError(f"init: expected {n} labels of 0 … {k - 1}, got shape {tuple(labels.shape)}")
            return [labels.to(rows.device)]
        if k == 1:
            return [torch.zeros(n, dtype=torch.int64, device=rows.device)]
        if self.init == "random":
            draws = [self._random.randint(k, size=n) for _ in range(self.n_init)]
            return [torch.from_numpy(draw).long().to(rows.device) for draw in draws]
        if self.init == "lsr":
            points = normalize_rows(rows)
            expression = ridge_self_expression(points, RIDGE * mean_energy(points))
            affinity = affinity_from_representation(expression.cpu().numpy(), retain=min(self.rank, n - 1))
            labels = spectral_labels(affinity, k, random_state=self._random)
            return [torch.from_numpy(labels).long().to(rows.device)]
        return [shape_interaction_labels(rows, k, self.rank, random_state=self._random)]

    def _alternate(
        self, rows: Float[Tensor, "n d"], weight: Float[Tensor, "n K"]
    ) -> tuple[list[float], LowRankMixtureDenoiser]:
        """Expectation and maximisation in turn, from responsibilities; objectives by round and the last mixture."""
        if self.method == "diffusion":
            denoiser = self._maximise(rows, weight)
            return [-float(denoiser.residual_energy(rows).amin(1).mean())], denoiser
        objective, denoiser = self._rounds(rows, weight, hard=True)
        if self.method == "em" and self.n_components > 1:
            nearest = denoiser.residual_energy(rows).argmin(1)
            weight = torch.nn.functional.one_hot(nearest, self.n_components).double()
        return (objective, denoiser) if self.method == "hard" else self._rounds(rows, weight, hard=False)

    def _rounds(
        self, rows: Float[Tensor, "n d"], weight: Float[Tensor, "n K"], *, hard: bool
    ) -> tuple[list[float], LowRankMixtureDenoiser]:
        objective: list[float] = []
        denoiser = self._maximise(rows, weight, common=not hard)
        for _ in range(self.max_iter):
            energies = denoiser.residual_energy(rows) if hard else None
            value = float(denoiser.log_density(rows).mean()) if energies is None else -float(energies.amin(1).mean())
            # Gains are judged beside the spread of the data, so that units do not matter.
            unit = abs(value) if hard else float(rows.shape[1])
            done = bool(objective) and value - objective[-1] <= self.tolerance * unit
            objective.append(value)
            if done:
                break
            if energies is None:
                weight = denoiser.responsibilities(rows)
            else:
                weight = torch.nn.functional.one_hot(energies.argmin(1), self.n_components).double()
            denoiser = self._maximise(rows, self._reseeded(rows, weight, denoiser), common=not hard)
        return objective, denoiser

    def _reseeded(self, rows: Tensor, weight: Tensor, denoiser: LowRankMixtureDenoiser) -> Tensor:
        """Empty components are given the rows that the others fit worst."""
        empty = (weight.sum(0) < 1e-6).nonzero()[:, 0].tolist()
        if not empty:
            return weight
        weight = weight.clone()
        worst = denoiser.residual_energy(rows).amin(1).argsort(descending=True)
        take = min(self.rank + 1, max(1, len(rows) // (2 * len(empty))))
        for place, component in enumerate(empty):
            chosen = worst[place * take : (place + 1) * take]
            weight[chosen] = 0
            weight[chosen, component] = 1
        return weight

    def _maximise(
        self, rows: Float[Tensor, "n d"], weight: Float[Tensor, "n K"], *, common: bool = False
    ) -> LowRankMixtureDenoiser:
        """Weighted principal components of each component: the maximum-likelihood low-rank Gaussians."""
        n, d = rows.shape
        bases, variances, means, floors = [], [], [], []
        counts = weight.sum(0)
        for k in range(weight.shape[1]):
            kept = weight[:, k] > _NEGLIGIBLE
            part, share = rows[kept], weight[kept, k]
            total = share.sum().clamp_min(1e-12)
            mean = (share.unsqueeze(1) * part).sum(0) / total if self.center else part.new_zeros(d)
            vectors, values, left = _principal(
                (part - mean) * (share / total).sqrt().unsqueeze(1), self.rank, self._random
            )
            bases.append(vectors)
            variances.append(values)
            means.append(mean)
            floors.append(left / (d - self.rank))
        estimated = torch.stack(floors)
        if common:
            estimated = ((counts / n) @ estimated).expand_as(estimated)
        floor = estimated.clamp_min(self._smallest) if self.floor == "residual" else float(self.floor)
        spread = torch.stack(variances)
        lowest = floor.unsqueeze(1) if isinstance(floor, Tensor) else max(floor, self._smallest)
        spread = torch.maximum(spread, torch.as_tensor(lowest, dtype=spread.dtype).expand_as(spread))
        return LowRankMixtureDenoiser(
            torch.stack(bases),
            variances=torch.ones_like(spread) if self.covariance == "identity" else spread,
            means=torch.stack(means),
            weights=(counts / n).clamp_min(1e-12),
            floor=floor,
        ).requires_grad_(False)

    def _descend(self, rows: Tensor, start: LowRankMixtureDenoiser) -> LowRankMixtureDenoiser:
        """Adam on the denoising loss of the bases; the rest of the mixture stays."""
        from torch.utils.data import DataLoader, TensorDataset

        from subspan.nn import Objective
        from subspan.nn.denoising import DenoisingLoss
        from subspan.nn.training import quiet_trainer

        seed = int(self._random.randint(2**31 - 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            data = TensorDataset(rows.float())
            loader = DataLoader(data, 128, shuffle=True, generator=torch.Generator().manual_seed(seed))
            spread = float((rows - rows.mean(0)).square().mean().sqrt())
            denoiser = start.float().requires_grad_(True)
            loss = DenoisingLoss(spread)
            with quiet_trainer(max_epochs=self.epochs) as trainer:
                adam = {"optimizer": "adam", "learning_rate": 1e-2, "schedule": "cosine"}
                trainer.fit(Objective(denoiser, loss, **adam), loader)
        return denoiser.double().requires_grad_(False)

    def _keep(self, X: Any, denoiser: LowRankMixtureDenoiser, rows: Tensor) -> LowRankMixtureDiffusion:
        self.denoiser_ = denoiser.eval()
        self.weights_ = like(denoiser.log_weights.exp(), X)
        self.means_ = like(denoiser.means, X)
        labels = self._labels(rows)
        counts = torch.bincount(labels, minlength=self.n_components)
        if bool((counts <= self.rank).any()):
            warnings.warn(
                f"rank: {int((counts <= self.rank).sum())} of {self.n_components} components have no more than "
                f"{self.rank} rows, so their subspaces are not determined; use a smaller rank or more rows",
                stacklevel=3,
            )
        floor = denoiser.floor
        self.subspaces_ = Subspace(
            denoiser.bases,
            center=denoiser.means if self.center else None,
            variances=denoiser.log_variances.exp(),
            residual_variance=floor,
        )
        self.labels_ = like(labels, X)
        return self

    # ------------------------------------------------------------------ use

    def _labels(self, rows: Tensor) -> Int[Tensor, " n"]:
        if self.method == "em":
            return self.denoiser_.responsibilities(rows.double()).argmax(1)
        return self.denoiser_.residual_energy(rows.double()).argmin(1)

    def predict(self, X: Any) -> Any:
        """Component of each row: the most probable one; "hard" and "diffusion": that of the nearest subspace."""
        check_is_fitted(self, "denoiser_")
        return like(self._labels(self._rows(X)), X)

    def predict_proba(self, X: Any, sigma: float = 0.0) -> Any:
        """Probabilities (n, K) of the components given rows with noise `sigma`."""
        check_is_fitted(self, "denoiser_")
        return like(self.denoiser_.responsibilities(self._rows(X).double(), sigma), X)

    def score_samples(self, X: Any, sigma: float = 0.0) -> Any:
        """Log density (nats) of rows with noise `sigma`. Raises ValueError for sigma = 0 without a floor."""
        check_is_fitted(self, "denoiser_")
        return like(self.denoiser_.log_density(self._rows(X).double(), sigma), X)

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log density a row."""
        return float(np.mean(np.asarray(self.score_samples(X))))

    def denoise(self, X: Any, sigma: float) -> Any:
        """Posterior mean of the clean rows behind rows X (n, d) with noise of standard deviation `sigma`."""
        check_is_fitted(self, "denoiser_")
        return like(self.denoiser_(self._rows(X).double(), sigma), X)

    def sample(self, n_samples: int = 1) -> tuple[Any, Any]:
        """Rows (n_samples, d) drawn from the mixture, and their components, in the kind of the rows of `fit`."""
        check_is_fitted(self, "denoiser_")
        if n_samples < 1:
            raise ValueError(f"n_samples: at least 1, got {n_samples}")
        random = check_random_state(self.random_state)
        mixture = self.denoiser_
        share = mixture.log_weights.exp().cpu().numpy()
        labels = np.sort(random.choice(len(share), size=n_samples, p=share / share.sum()))
        bases, spread = mixture.bases.cpu().numpy(), mixture.log_variances.exp().cpu().numpy()
        floor = mixture.floor.cpu().numpy()[labels]
        rest = random.standard_normal((n_samples, bases.shape[1])) * np.sqrt(floor)[:, None]
        z = random.standard_normal((n_samples, bases.shape[2])) * np.sqrt(
            np.maximum(spread[labels] - floor[:, None], 0)
        )
        inside = np.einsum("bd,bnd->bn", z, bases[labels])
        drawn = mixture.means.cpu().numpy()[labels] + inside + rest
        return tuple(like(torch.from_numpy(part), self.means_) for part in (drawn, labels))


def _principal(
    rows: Float[Tensor, "m d"], dim: int, random: np.random.RandomState
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"], Float[Tensor, ""]]:
    """Leading directions of weighted, centred rows, their variances and what is left over of the total variance.

    Where the rows span fewer than `rank` dimensions, random directions outside of them complete the basis.
    """
    m, d = rows.shape
    total = rows.square().sum()
    if m >= d:
        values, vectors = torch.linalg.eigh(rows.mT @ rows)
        vectors, values = vectors.flip(1)[:, :dim], values.flip(0)[:dim].clamp_min(0)
    else:
        values, left = torch.linalg.eigh(rows @ rows.mT)
        values, left = values.flip(0)[:dim].clamp_min(0), left.flip(1)[:, :dim]
        known = values > 1e-12 * values[:1].clamp_min(1e-300)
        values = values[known]
        vectors = (rows.mT @ left[:, known]) / values.sqrt()
        if vectors.shape[1] < dim:
            extra = torch.from_numpy(random.standard_normal((d, dim - vectors.shape[1]))).to(rows)
            vectors = orthonormalize(torch.cat([vectors, extra], 1))
            values = torch.cat([values, values.new_zeros(dim - len(values))])
    return vectors, values, (total - values.sum()).clamp_min(0)


def shape_interaction_labels(X: Any, n_clusters: int, rank: int, *, random_state: Any = None) -> Int[Tensor, " n"]:
    """Labels (n,) by spectral clustering of the squared entries of VV', V the n_clusters · rank leading left singular
    vectors of X (n, d): exact for independent subspaces without noise, a start for everything else. Memory O(n²).

    Source: Costeira & Kanade (1998).
    """
    rows = check_matrix(X, "X", min_rows=2)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    kept = u[:, : min(n_clusters * rank, int((s > 1e-10 * s[0]).sum()))]
    affinity = (kept @ kept.mT).square().fill_diagonal_(0)
    # A row that meets no other has no place in the graph; a faint tie to all of them gives it one.
    affinity = affinity + 1e-12 * affinity.max().clamp_min(1e-12)
    model = SpectralClustering(n_clusters, affinity="precomputed", random_state=random_state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        labels = model.fit_predict(affinity.cpu().numpy())
    return torch.from_numpy(labels).long().to(rows.device)
