"""Sparse autoencoders: rows as few atoms of a learnt dictionary, k a row or k on average, and their training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import check_matrix
from subspan.base.files import atomic_write, write_text

if TYPE_CHECKING:
    from .objective import Objective

Variant = Literal["topk", "batchtopk", "matching-pursuit"]
SAELoss = Literal["mse", "l1"]

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
"""Files of a folder in sae-lens' format."""
# Rates of firing are means over about 1,000 batches; rarer than `_DEAD` is dead, than `_LOST` aimed anew.
_DECAY, _DEAD, _LOST = 0.999, 1e-4, 1e-5
_REVIVE_EVERY = 2000
_THRESHOLD_DECAY = 0.9


class ActiveAtoms(NamedTuple):
    """The entries of codes (n, c) that are not zero, row by row.

    Attributes
    ----------
    starts
        (n,) where the entries of each row begin.
    atoms
        (m,) which atoms; one may stand twice in a row, and then counts twice.
    values
        (m,) how much of them, positive.
    """

    starts: Int[Tensor, " n"]
    atoms: Int[Tensor, " m"]
    values: Float[Tensor, " m"]

    def rows(self) -> Int[Tensor, " m"]:
        """The row of each entry."""
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([len(self.atoms)])])
        return torch.arange(len(self.starts), device=self.starts.device).repeat_interleave(ends - self.starts)

    def dense(self, n_atoms: int) -> Float[Tensor, "n c"]:
        """The codes with their zeros."""
        whole = self.values.new_zeros(len(self.starts), n_atoms)
        return whole.index_put_((self.rows(), self.atoms), self.values, accumulate=True)

    def decode(self, atoms: Float[Tensor, "c d"]) -> Float[Tensor, "n d"]:
        """What the codes stand for."""
        return F.embedding_bag(self.atoms, atoms, self.starts, per_sample_weights=self.values, mode="sum")


class SparseAutoencoder(nn.Module):
    """Encoder, rule of sparsity and decoder with atoms of unit length; codes are never negative.

    x ~ mean + Σ_j z_j d_j. Of (W (x - mean) + b)₊ the largest k of each row stay ("topk"), or the largest n k of n rows
    of a batch ("batchtopk": what is above a threshold learnt on the way, once trained); "matching-pursuit" has no
    encoder: k times the atom that fits best what is left. Only the atoms that fire cost anything beyond the encoder.

    Parameters
    ----------
    d
        Width of the rows.
    n_atoms
        c, atoms of the dictionary.
    k
        Atoms of a row.
    variant
        Rule of sparsity.
    loss
        "mse", or "l1": the sum of absolute errors.
    dead_weight
        Of the mean gap to the threshold of atoms that do not fire any more; 0: none.
    generator
        Of the first atoms. The encoder starts as the decoder (tied), and is free from then on.

    Attributes
    ----------
    decoder
        (c, d), rows of unit length.
    mean, scale
        What rows are centred and divided by inside, set by `set_statistics`; codes and atoms are in the rows' units.
    threshold
        Of "batchtopk" outside of training, in inner units.
    firing
        (c,) share of rows in which each atom fires, over the last batches.

    Raises
    ------
    ValueError
        For k outside [1, n_atoms], and unknown names.

    References
    ----------
    Gao et al. (2024), Scaling and evaluating sparse autoencoders. Bussmann, Leask & Nanda (2024), BatchTopK sparse
    autoencoders. Costa et al. (2025), From flat to hierarchical: extracting sparse representations with matching
    pursuit.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SparseAutoencoder
    >>> sae = SparseAutoencoder(8, 32, 4, generator=torch.Generator().manual_seed(0))
    >>> codes = sae.encode(torch.randn(5, 8))
    >>> codes.shape, int((codes > 0).sum(1).max()) <= 4, sae.decode(codes).shape
    (torch.Size([5, 32]), True, torch.Size([5, 8]))
    """

    mean: Tensor
    scale: Tensor
    threshold: Tensor
    firing: Tensor
    batches: Tensor

    def __init__(
        self,
        d: int,
        n_atoms: int,
        k: int,
        *,
        variant: str = "topk",
        loss: str = "mse",
        dead_weight: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= k <= n_atoms:
            raise ValueError(f"k: must lie in [1, {n_atoms}], the number of atoms, got {k}")
        for name, value, known in (("variant", variant, Variant), ("loss", loss, SAELoss)):
            if value not in get_args(known):
                raise ValueError(f"{name}: expected one of {get_args(known)}, got {value!r}")
        if not dead_weight >= 0:
            raise ValueError(f"dead_weight: must be 0 or more, got {dead_weight}")
        self.d, self.n_atoms, self.k = d, n_atoms, k
        self.variant, self.loss, self.dead_weight = variant, loss, dead_weight
        self.decoder = nn.Parameter(torch.empty(n_atoms, d))
        self.encoder = self.bias = None
        if variant != "matching-pursuit":
            self.encoder, self.bias = nn.Parameter(torch.empty(n_atoms, d)), nn.Parameter(torch.empty(n_atoms))
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("firing", torch.zeros(n_atoms))
        self.register_buffer("batches", torch.zeros(()))
        self._errors: Tensor | None = None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random atoms, and an encoder that is the same."""
        drawn = torch.randn(self.n_atoms, self.d, generator=generator)
        self.decoder.copy_(F.normalize(drawn, dim=1))
        if self.encoder is not None and self.bias is not None:
            self.encoder.copy_(self.decoder)
            self.bias.zero_()

    def extra_repr(self) -> str:
        """Sizes and rule, for printing."""
        return f"d={self.d}, n_atoms={self.n_atoms}, k={self.k}, variant={self.variant!r}"

    @torch.no_grad()
    def set_statistics(self, x: Float[Tensor, "n d"]) -> None:
        """Centre and scale (root mean square distance from the centre) of rows; ValueError where they are all equal."""
        rows = check_matrix(x, "x", columns=self.d).double()
        mean = rows.mean(0)
        scale = (rows - mean).square().sum(1).mean().sqrt()
        if not float(scale) > 1e-12 * float(mean.norm()) or float(scale) == 0:
            raise ValueError(f"x: no variance among n_samples = {len(rows)} rows; nothing can be learnt")
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    # ------------------------------------------------------------------ the three callables

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Codes (n, c) of rows, without a gradient. Raises ValueError for NaN and another width."""
        return self.active_atoms(x).dense(self.n_atoms)

    def decode(self, codes: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        """The rows that codes stand for."""
        return codes @ self.decoder.to(codes) + self.mean.to(codes)

    @torch.no_grad()
    def active_atoms(self, x: Float[Tensor, "n d"]) -> ActiveAtoms:
        """The same codes without their zeros."""
        rows = check_matrix(x, "x", columns=self.d).to(self.decoder)
        found = self._coded(self._inner(rows), batchwise=False)
        return found._replace(values=found.values * self.scale)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Rows rebuilt from their codes; in training "batchtopk" shares the atoms of the batch."""
        inner = self._inner(x)
        found = self._coded(inner, batchwise=self.training)
        return found.decode(self.decoder) * self.scale + self.mean

    # ------------------------------------------------------------------ inside

    def _inner(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale

    def _coded(self, inner: Tensor, *, batchwise: bool) -> ActiveAtoms:
        n = len(inner)
        if self.encoder is None or self.bias is None:
            atoms, values = self._pursued(inner)
            return ActiveAtoms(torch.arange(0, atoms.numel(), self.k, device=inner.device), atoms.flatten(), values)
        weight, bias = self.encoder, self.bias
        with torch.no_grad():
            products = torch.addmm(bias, inner, weight.mT)
            if self.variant == "topk":
                atoms = products.topk(self.k, dim=1, sorted=False).indices.flatten()
                starts = torch.arange(0, len(atoms), self.k, device=inner.device)
                rows = torch.arange(n, device=inner.device).repeat_interleave(self.k)
            else:
                if batchwise:
                    flat = products.flatten().topk(self.k * n, sorted=False).indices.sort().values
                    rows, atoms = flat // self.n_atoms, flat % self.n_atoms
                else:
                    rows, atoms = (products > self.threshold.clamp_min(0)).nonzero().unbind(1)
                counts = rows.bincount(minlength=n)
                starts = counts.cumsum(0) - counts
            known = products[rows, atoms] - bias[atoms]
        values = (_Products.apply(inner, weight, rows, atoms, known) + bias[atoms]).relu()
        return ActiveAtoms(starts, atoms, values)

    def _pursued(self, inner: Tensor) -> tuple[Int[Tensor, "n k"], Float[Tensor, " m"]]:
        """Atoms in the order in which they are taken, and the products with what was left, with a gradient."""
        decoder = self.decoder
        with torch.no_grad():
            products = inner @ decoder.mT
            # Products of what is left follow from those of the atoms with each other, where that matrix is small.
            gram = decoder @ decoder.mT if self.n_atoms <= len(inner) * self.k else None
            chosen, left = [], inner
            for _ in range(self.k):
                value, atom = products.max(1)
                chosen.append(atom)
                value = value.relu().unsqueeze(1)
                if gram is None:
                    left = left - value * decoder[atom]
                    products = left @ decoder.mT
                else:
                    products = products - value * gram[atom]
        left, values = inner, []
        for atom in chosen:
            direction = decoder[atom]
            value = (left * direction).sum(1).relu()
            left = left - value.unsqueeze(1) * direction
            values.append(value)
        return torch.stack(chosen, 1), torch.stack(values, 1).flatten()

    # ------------------------------------------------------------------ training

    @property
    def dead(self) -> Bool[Tensor, " c"]:
        """Atoms that fired in fewer than one of 10,000 rows of the last batches; none before the first."""
        return self._rates() < _DEAD if float(self.batches) else torch.zeros_like(self.firing, dtype=torch.bool)

    def _rates(self) -> Tensor:
        """Means over batches, of which there are few at first."""
        return self.firing / (1 - _DECAY**self.batches)

    def training_loss(self, x: Float[Tensor, "n d"], step: int = 0, *, warmup: int = 0) -> dict[str, Float[Tensor, ""]]:
        """Error of a batch in inner units (of "mse": the share of variance), and the term that wakes dead atoms.

        That term is dead_weight times the mean gap between the smallest active product of a row and those of dead
        atoms; its weight falls from four times to once over the first `warmup` steps.
        """
        inner = self._inner(x)
        found = self._coded(inner, batchwise=True)
        error = inner - found.decode(self.decoder)
        terms = {"error": error.square().sum(1).mean() if self.loss == "mse" else error.abs().sum(1).mean()}
        self._count(found, error.detach())
        if self.dead_weight and bool((dead := self.dead).any()):
            weight = self.dead_weight * (1 + 3 * max(0.0, 1 - step / warmup) if warmup else 1)
            terms["dead"] = weight * self._gap(inner, found, dead)
        return terms

    @torch.no_grad()
    def _count(self, found: ActiveAtoms, error: Tensor) -> None:
        used = found.values > 0
        rate = found.atoms[used].bincount(minlength=self.n_atoms).to(self.firing) / len(error)
        self.firing.lerp_(rate, 1 - _DECAY)
        if self.variant == "batchtopk" and bool(used.any()):
            least = found.values[used].min()
            self.threshold.copy_(torch.lerp(least, self.threshold, _THRESHOLD_DECAY) if float(self.batches) else least)
        self.batches += 1
        self._errors = error

    def _gap(self, inner: Tensor, found: ActiveAtoms, dead: Tensor) -> Float[Tensor, ""]:
        rows = found.rows()
        least = torch.full((len(inner),), torch.inf, dtype=inner.dtype, device=inner.device)
        least = least.scatter_reduce(0, rows, found.values.detach(), "amin")
        if self.encoder is None or self.bias is None:
            products = inner @ self.decoder[dead].mT
        else:
            products = torch.addmm(self.bias[dead], inner, self.encoder[dead].mT)
        # A row without any active atom has no threshold.
        least = torch.where(least.isinf(), 0, least)
        return (least.unsqueeze(1) - products).relu().mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Atoms back to unit length; every 2,000 steps those that never fire are aimed at the rows coded worst."""
        self.decoder.copy_(F.normalize(self.decoder, dim=1))
        if step % _REVIVE_EVERY or self._errors is None:
            return
        lost = (self._rates() < _LOST).nonzero().flatten()
        worst = self._errors.square().sum(1).topk(min(len(lost), len(self._errors))).indices
        lost = lost[: len(worst)]
        aims = F.normalize(self._errors[worst], dim=1)
        self.decoder[lost] = aims
        if self.encoder is not None and self.bias is not None:
            self.encoder[lost] = aims
            self.bias[lost] = 0

    def objective(
        self, *, learning_rate: float = 3e-3, warmup: int = 0, final_rate: float = 0.1, **options: Any
    ) -> Objective:
        """For a Trainer (extra: train) on batches of rows (n, d), or tuples of which these are the first: Adam, cosine.

        warmup: steps over which the weight of dead atoms falls. options: of `Objective`.
        """
        from .objective import Objective

        def loss(model: SparseAutoencoder, batch: Any, step: int) -> dict[str, Tensor]:
            rows = batch if isinstance(batch, Tensor) else batch[0]
            return model.training_loss(rows.to(model.decoder), step, warmup=warmup)

        options = {"optimizer": "adam", "schedule": "cosine", "final_rate": final_rate, **options}
        return Objective(self, loss, learning_rate=learning_rate, after_step=SparseAutoencoder.after_step, **options)

    # ------------------------------------------------------------------ files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write cfg.json and sae_weights.safetensors as sae-lens does, which it and `load_sae` read.

        "batchtopk" is written as the jump of its threshold. Raises ValueError for "matching-pursuit", which that format
        does not have.
        """
        if self.encoder is None or self.bias is None:
            raise ValueError("variant: sae-lens' format has no matching-pursuit encoder; save the state_dict instead")
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        weights = {
            "W_enc": self.encoder.detach().mT,
            "b_enc": self.bias.detach() * self.scale,
            "W_dec": self.decoder.detach(),
            "b_dec": self.mean,
        }
        facts: dict[str, Any] = {"d_in": self.d, "d_sae": self.n_atoms, "dtype": "float32", "device": "cpu"}
        facts |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
        facts |= {"metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": "6.0.0"}}
        if self.variant == "topk":
            facts |= {"architecture": "topk", "k": self.k, "rescale_acts_by_decoder_norm": False}
        else:
            weights["threshold"] = (self.threshold.clamp_min(0) * self.scale).expand(self.n_atoms)
            facts["architecture"] = "jumprelu"
        with atomic_write(path / WEIGHTS) as temporary:
            save_file({name: value.float().cpu().contiguous().clone() for name, value in weights.items()}, temporary)
        write_text(path / CONFIG, json.dumps(facts, indent=2))


class _Products(torch.autograd.Function):
    """Products of some rows with some weights, known already; the gradient costs what these few do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, known: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, rows, columns)
        return known.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, rows, columns = ctx.saved_tensors
        to_x = to_weight = None
        places = torch.stack([columns, rows])
        by_column = torch.sparse_coo_tensor(places, gradient, (len(weight), len(x)), check_invariants=False)
        if ctx.needs_input_grad[1]:
            to_weight = torch.sparse.mm(by_column, x)
        if ctx.needs_input_grad[0]:
            to_x = torch.sparse.mm(by_column.mT, weight)
        return to_x, to_weight, None, None, None
