"""Sparse autoencoders fitted to rows, and the codes of many rows kept sparse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import check_matrix, like
from subspan.base.estimators import Estimator
from subspan.base.parameters import Count, NonNegative, Positive, Seed
from subspan.nn import SAE, SparseAutoencoder
from subspan.nn.sparse_autoencoder import SAELoss, Variant
from subspan.nn.training import batch_rows, quiet_trainer
from subspan.statistics import batches, is_stream

_ROWS = 2048
_WAKING_EPOCHS = 2


class _Shuffled:
    """Batches of rows, in another order each time they are gone through; half precision stays as it is until then."""

    def __init__(self, x: Float[Tensor, "n d"], size: int, generator: torch.Generator) -> None:
        self.x, self.size, self.generator = x, size, generator

    def __len__(self) -> int:
        return max(1, len(self.x) // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.x), generator=self.generator)
        return (self.x[order[start * self.size :][: self.size]].float() for start in range(len(self)))


@dataclass(eq=False, repr=False)
class TopKSAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """A sparse autoencoder fitted to rows: `transform` gives codes, `inverse_transform` rows.

    The module is `nn.SparseAutoencoder`; training is by Adam with a cosine fall of the rate to a tenth. Atoms are put
    back to unit length after every step, dead ones are woken by a term of the loss, and what stays dead is aimed anew.

    Parameters
    ----------
    n_atoms
        Of the dictionary; None: four times the width.
    k
        Atoms of a row (on average, of "batchtopk").
    variant
        "topk", "batchtopk" or "matching-pursuit".
    loss
        "mse" or "l1".
    dead_weight
        Of the term that wakes dead atoms, four times as much at first, falling over two epochs.
    learning_rate
        Of Adam, the largest one.
    batch_size
        Rows of a step; fewer (32 at least) where an epoch would lack 32 steps.
    epochs
        Passes over the rows.
    random_state
        Seed of the first atoms and of the order.

    Attributes
    ----------
    sae_ : SparseAutoencoder
        Frozen, in evaluation mode.
    decoder_ : (n_atoms, d)
        Atoms, of unit length.
    losses_ : list of float
        Of every epoch; of "mse" the share of variance that is left, and the term of dead atoms.
    dead_ : (n_atoms,)
        Which atoms hardly fired in the last batches of the training.

    Raises
    ------
    ValueError
        In `fit`, for values out of range, k above n_atoms, NaN, and rows that are all equal.

    References
    ----------
    Bhalla et al. (2026), arXiv 2604.28119; Gao et al. (2024), Scaling and evaluating sparse autoencoders.

    Examples
    --------
    >>> from subspan.datasets import ManifoldZoo
    >>> from subspan.probe import TopKSAE
    >>> x = ManifoldZoo(("circle",), variants=1, ambient_dim=6).sample(2000, 1).x
    >>> sae = TopKSAE(n_atoms=12, k=2, random_state=0).fit(x)
    >>> error = (sae.inverse_transform(sae.transform(x)) - x).square().sum() / x.square().sum()
    >>> sae.transform(x).shape, bool(error < 0.1)
    (torch.Size([2000, 12]), True)
    """

    n_atoms: Count | None = None
    k: Count = 8
    variant: Variant = "topk"
    loss: SAELoss = "mse"
    dead_weight: NonNegative = 0.05
    learning_rate: Positive = 3e-3
    batch_size: Count = 1024
    epochs: Count = 10
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None) -> TopKSAE:
        """Train on rows X (n, d), which stay in memory; half precision is promoted batch by batch."""
        self._check_parameters()
        x = self._rows(X, reset=True)
        random = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        n_atoms = 4 * x.shape[1] if self.n_atoms is None else self.n_atoms
        options: dict[str, Any] = {"variant": self.variant, "loss": self.loss, "dead_weight": self.dead_weight}
        sae = SparseAutoencoder(x.shape[1], n_atoms, self.k, generator=generator, **options)
        sae.set_statistics(x)
        rows = _Shuffled(x, batch_rows(len(x), None, self.batch_size), generator)
        objective = sae.objective(learning_rate=self.learning_rate, warmup=_WAKING_EPOCHS * len(rows))
        device = "cpu" if x.device.type == "cpu" else "gpu"
        with torch.enable_grad(), quiet_trainer(max_epochs=self.epochs, accelerator=device) as trainer:
            trainer.fit(objective, rows)
        self.losses_ = list(objective.losses)
        self.sae_ = sae.to(x.device).requires_grad_(False).eval()
        self.decoder_ = like(sae.decoder.detach(), X)
        self.dead_ = like(sae.dead, X)
        self._n_features_out = n_atoms
        return self

    def transform(self, X: Any) -> Any:
        """Codes (n, n_atoms) of rows, in their kind and precision. See `sparse_codes` for many rows."""
        check_is_fitted(self, "sae_")
        x = self._rows(X)
        codes = torch.cat([self.sae_.encode(part) for part in x.split(_ROWS)])
        return like(codes.to(x.dtype), X)

    def inverse_transform(self, Z: Any) -> Any:
        """Rows (n, d) that codes (n, n_atoms) stand for."""
        check_is_fitted(self, "sae_")
        return like(self.sae_.decode(check_matrix(Z, "Z", columns=self._n_features_out)), Z)


def sparse_codes(sae: SAE, x: Any, *, batch_size: int = _ROWS) -> sparse.csr_matrix:
    """Codes of many rows, which are never dense for more than a batch.

    Parameters
    ----------
    sae
        Any sparse autoencoder.
    x
        Rows (n, d), or a stream of batches of them, such as states of a model.
    batch_size
        Rows that are coded at once.

    Returns
    -------
    scipy.sparse.csr_matrix (n, c), in float32.

    Raises
    ------
    ValueError
        For rows with NaN or of another width, and codes that are not finite or of another width than the decoder.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SparseAutoencoder
    >>> from subspan.probe import sparse_codes
    >>> codes = sparse_codes(SparseAutoencoder(8, 32, 4), torch.randn(100, 8))
    >>> codes.shape, codes.nnz <= 400
    ((100, 32), True)
    """
    decoder = check_matrix(sae.decoder, "decoder")
    c, d = decoder.shape
    blocks = batches(x, batch_size) if is_stream(x) else check_matrix(x, "x", columns=d).split(batch_size)
    parts = []
    for block in blocks:
        rows = check_matrix(block, "x", columns=d).to(decoder)
        with torch.no_grad():
            codes = sae.encode(rows)
        parts.append(sparse.csr_matrix(check_codes(codes, "sae", c).cpu().numpy().astype(np.float32, copy=False)))
    if not parts:
        raise ValueError("x: there are no rows")
    return sparse.csr_matrix(sparse.vstack(parts, format="csr"))


def check_codes(codes: Any, name: str, n_atoms: int | None) -> Tensor:
    """Codes as a finite matrix of as many columns as there are atoms; `name` is who is to blame for others."""
    found = torch.as_tensor(codes).detach()
    if found.ndim != 2 or (n_atoms is not None and found.shape[1] != n_atoms):
        raise ValueError(f"{name}: codes (n, {n_atoms}), one column an atom, are needed, got {tuple(found.shape)}")
    return check_matrix(found, name)
