"""A network that predicts a subspace from a cheap key and a memory of labelled keys, of any number and order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn

from subspan.geometry import Subspace
from subspan.nn import MLP
from subspan.solvers import leading_eigenspace

# Eigenvalues L and L + 1 nearer than this (of trace 1) define no subspace: such a sample is taught by energies alone.
LEAST_GAP = 1e-4


class Memory(NamedTuple):
    """Labelled keys of a place.

    Attributes
    ----------
    keys
        (M, q).
    covariances
        (M, d, d) of trace 1.
    """

    keys: Float[Tensor, "n q"]
    covariances: Inexact[Tensor, "n d d"]


def label_covariances(subspaces: Subspace) -> Inexact[Tensor, "*b d d"]:
    """U Λ U' of trace 1; alike variances where a subspace has none."""
    basis = subspaces.basis
    scale = basis.real.new_ones(basis.shape[:-2] + basis.shape[-1:])
    scale = scale if subspaces.variances is None else subspaces.variances.clamp_min(0)
    total = scale.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError("subspaces: one has no variance at all, so that it is no label (a channel without paths?)")
    return (basis * (scale / total).unsqueeze(-2)) @ basis.mH


class _Reading(nn.Module):
    """Queries read the memory: attention with logits <k, k_j> / sqrt(w) - γ |q - q_j|², and a token of its own."""

    def __init__(self, width: int, heads: int, bandwidth: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        # It starts as neighbours' Gaussian weights; what else matters is learnt on top.
        nn.init.zeros_(self.query.weight)
        self.log_sharpness = nn.Parameter(torch.full((heads,), -math.log(2 * bandwidth**2)))

    def forward(
        self, state: Float[Tensor, "m w"], keys: Float[Tensor, "n1 w"], squared: Float[Tensor, "m n"], null: Tensor
    ) -> Float[Tensor, "h m n1"]:
        """Weights of each head over the null token, which is the first, and the pairs."""
        q, k = (
            layer(each).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for layer, each in ((self.query, self.norm(state)), (self.key, keys))
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        near = -self.log_sharpness.exp()[:, None, None] * squared
        start = null.expand(self.heads, len(state), 1)
        return (logits + torch.cat([start, near], 2)).softmax(-1)


class InContextSubspaceRegressor(nn.Module):
    """Predict the subspace of a query from its key and a memory of keys with subspaces, which may be empty.

    The answer does not depend on the order of the memory, nor on phases and rotations of its bases. It starts as a
    Gaussian mean of the memory's covariances with a prior for an empty one, and learns what improves on that.

    Parameters
    ----------
    dim
        d of the subspaces.
    n_components
        L of what is predicted.
    n_features
        q of a key.
    frame
        (g, d) vectors in which energies of labels are read, such as beams; None: the coordinates.
    is_complex
        Whether subspaces are complex.
    rank
        Of the learnt addition to the mean of the memory.
    width, blocks, heads
        Of the states, layers of attention, and heads of each.
    bandwidth
        Of the Gaussian that attention starts as, in units of keys.
    prior_weight
        Of the prior at the start, in pairs with the key that is asked for.
    scale
        Of a key that the networks see: they divide by it.

    Raises
    ------
    ValueError
        For sizes below 1, L above d, a width that heads do not divide, and a frame of another width.

    References
    ----------
    Zhao, Wang, Zhao & Liu (2026), SiFo, arXiv 2605.16141: memory of calibrated users, no update at the target. The
    network is ours; the paper's is not published.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Subspace
    >>> from subspan.wireless import InContextSubspaceRegressor
    >>> network = InContextSubspaceRegressor(6, 2, 3, width=16)
    >>> memory = Subspace.random(6, 2, batch=(5,), dtype=torch.float32)
    >>> network(torch.randn(4, 3), torch.randn(5, 3), memory).basis.shape, network(torch.randn(4, 3)).basis.shape
    (torch.Size([4, 6, 2]), torch.Size([4, 6, 2]))
    """

    prior: Tensor
    frame: Tensor

    def __init__(
        self,
        dim: int,
        n_components: int,
        n_features: int,
        *,
        frame: Inexact[Tensor, "g d"] | None = None,
        is_complex: bool = False,
        rank: int = 8,
        width: int = 256,
        blocks: int = 2,
        heads: int = 4,
        bandwidth: float = 6.0,
        prior_weight: float = 0.1,
        scale: float = 10.0,
    ) -> None:
        super().__init__()
        sizes = {"n_components": n_components, "n_features": n_features, "rank": rank, "width": width, "heads": heads}
        for name, value in {**sizes, "blocks": blocks}.items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if n_components > dim or width % heads:
            raise ValueError(
                f"n_components, width: at most {dim}, and a multiple of {heads}, got {n_components}, {width}"
            )
        if frame is not None and frame.shape[1] != dim:
            raise ValueError(f"frame: expected vectors of {dim}, got {frame.shape[1]}")
        for name, value in {"bandwidth": bandwidth, "prior_weight": prior_weight, "scale": scale}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: must be positive and finite, got {value}")
        self.dim, self.n_components, self.n_features, self.rank, self.scale = dim, n_components, n_features, rank, scale
        dtype = torch.complex64 if is_complex else torch.float32
        frame = torch.eye(dim, dtype=dtype) if frame is None else frame.to(dtype)
        self.register_buffer("frame", frame)
        self.register_buffer("prior", torch.eye(dim, dtype=dtype) / dim)
        self.encoder = MLP((n_features, width, width), norm="layer", last_norm="layer")
        self.values = MLP((len(frame), width, width), norm="layer")
        self.null_key = nn.Parameter(0.02 * torch.randn(1, width))
        self.null_value = nn.Parameter(0.02 * torch.randn(1, width))
        self.null_logit = nn.Parameter(torch.tensor(math.log(prior_weight)))
        self.readings = nn.ModuleList(_Reading(width, heads, bandwidth) for _ in range(blocks))
        self.mixers = nn.ModuleList(MLP((width, 2 * width, width)) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.final = _Reading(width, 1, bandwidth)
        self.addition = nn.Linear(width, (1 + is_complex) * dim * rank)
        nn.init.normal_(self.addition.weight, std=0.1 / (width * dim * rank) ** 0.5)
        nn.init.zeros_(self.addition.bias)

    @property
    def is_complex(self) -> bool:
        """Whether subspaces are complex."""
        return self.prior.is_complex()

    def energies(self, covariances: Inexact[Tensor, "*b d d"]) -> Float[Tensor, "*b g"]:
        """Share of the energy along each vector of the frame."""
        found = ((self.frame.conj() @ covariances) * self.frame).sum(-1).real
        return found / found.sum(-1, keepdim=True)

    def covariance(self, query: Float[Tensor, "m q"], memory: Memory | None = None) -> Inexact[Tensor, "m d d"]:
        """Predicted covariances of trace 1."""
        if memory is None:
            memory = Memory(query.new_zeros(0, self.n_features), self.prior.new_zeros(0, self.dim, self.dim))
        state = self.encoder(query / self.scale)
        squared = torch.cdist(query, memory.keys, compute_mode="donot_use_mm_for_euclid_dist").square()
        keys = torch.cat([self.null_key, self.encoder(memory.keys / self.scale)])
        # Roots, so that weak beams are seen beside strong ones.
        read = self.values((self.energies(memory.covariances).clamp_min(0) * len(self.frame)).sqrt())
        values = torch.cat([self.null_value, read]) + keys
        for reading, norm, mixer in zip(self.readings, self.norms, self.mixers):
            weights = reading(state, keys, squared, self.null_logit)
            heads = values.unflatten(-1, (len(weights), -1)).transpose(0, 1)
            state = state + (weights @ heads).transpose(0, 1).flatten(1)
            state = state + mixer(norm(state))
        weights = self.final(state, keys, squared, self.null_logit)[0].to(self.prior.dtype)
        stored = torch.cat([self.prior.unsqueeze(0), memory.covariances.to(self.prior)])
        mean = (weights @ stored.flatten(1)).unflatten(1, (self.dim, self.dim))
        parts = self.addition(state).unflatten(-1, (self.dim, self.rank, -1))
        factor = torch.view_as_complex(parts.contiguous()) if self.is_complex else parts.squeeze(-1)
        found = mean + factor @ factor.mH
        return found / found.diagonal(dim1=-2, dim2=-1).sum(-1).real[:, None, None]

    def forward(
        self,
        query: Float[Tensor, "m q"],
        mem_keys: Float[Tensor, "n p"] | None = None,
        mem_subspaces: Subspace | None = None,
    ) -> Subspace:
        """Subspaces (m, d, L) of queries, with eigenvalues of what is predicted as variances: shares of the energy."""
        if (mem_keys is None) != (mem_subspaces is None):
            raise ValueError("mem_keys, mem_subspaces: give both or neither")
        memory = None
        if mem_keys is not None and mem_subspaces is not None:
            self._check(mem_keys, mem_subspaces)
            memory = Memory(mem_keys, label_covariances(mem_subspaces))
        return leading_eigenspace(self.covariance(query, memory), self.n_components, cut="exact")

    def _check(self, keys: Tensor, subspaces: Subspace) -> None:
        if keys.ndim != 2 or keys.shape[1] != self.n_features:
            raise ValueError(f"mem_keys: expected {self.n_features} columns, got shape {tuple(keys.shape)}")
        if subspaces.batch_shape != (len(keys),) or subspaces.ambient_dim != self.dim:
            shape = tuple(subspaces.basis.shape)
            raise ValueError(f"mem_subspaces: expected ({len(keys)}, {self.dim}, r), got {shape}")
        if subspaces.basis.is_complex() and not self.is_complex:
            raise ValueError("mem_subspaces: are complex, and the network is real; make it with is_complex=True")


class CaptureLoss(nn.Module):
    """1 - captured energy of the predicted subspace, and the divergence of predicted energies from true ones.

    ``loss(network, (query, covariances, memory_keys, memory_covariances))`` for an `Objective`.

    Parameters
    ----------
    energy_weight
        Of the divergence.

    Notes
    -----
    Where eigenvalues L and L + 1 of a prediction are equal to 1e-4 no subspace is defined, and its gradient has no
    bound: the sample is taught by energies alone.

    Examples
    --------
    >>> import torch
    >>> from subspan.wireless import CaptureLoss, InContextSubspaceRegressor
    >>> network = InContextSubspaceRegressor(4, 1, 2, width=8)
    >>> truth = torch.diag_embed(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    >>> value, terms = CaptureLoss()(network, (torch.zeros(1, 2), truth, torch.zeros(1, 2), truth))
    >>> round(terms["lost"].item(), 3), list(terms)
    (0.0, ['lost', 'energies'])
    """

    def __init__(self, energy_weight: float = 0.1) -> None:
        super().__init__()
        if not 0 <= energy_weight < math.inf:
            raise ValueError(f"energy_weight: must be 0 or more and finite, got {energy_weight}")
        self.energy_weight = energy_weight

    def forward(
        self, network: InContextSubspaceRegressor, batch: Sequence[Tensor]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss and its terms."""
        query, truth, keys, covariances = batch
        predicted = network.covariance(query, Memory(keys, covariances))
        lost = lost_energy(predicted, truth, network.n_components)
        p = network.energies(predicted).clamp_min(1e-9)
        e = network.energies(truth).clamp_min(0)
        divergence = (torch.special.xlogy(e, e) - e * p.log()).sum(-1).mean()
        terms = {"lost": lost, "energies": self.energy_weight * divergence}
        return lost + terms["energies"], terms


def lost_energy(
    predicted: Inexact[Tensor, "m d d"], truth: Inexact[Tensor, "m d d"], n_components: int
) -> Float[Tensor, ""]:
    """Mean share of the energy outside the leading subspace of a prediction; without a gradient where it has no gap."""
    found = leading_eigenspace(predicted, n_components, cut="exact")
    share = found.captured_energy(truth)
    values = found.spectrum
    if values is not None and n_components < values.shape[-1]:
        share = torch.where(
            values[..., n_components - 1] - values[..., n_components] > LEAST_GAP, share, share.detach()
        )
    return 1 - share.mean()
