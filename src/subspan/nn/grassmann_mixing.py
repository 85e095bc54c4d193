"""Causal mixing of a sequence by the planes of token pairs, in place of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.geometry import Subspace
from subspan.geometry.grassmann import orthonormalize, parallelogram_area, plucker

OFFSETS = (1, 2, 4, 8, 12, 16)
_BLOCK = 2048


class MixingState(NamedTuple):
    """What decoding keeps: the reduced states of the last tokens, and which are tokens, not padding.

    The last max(offsets) are looked at; there may be more, or fewer at the start of a sequence.

    Attributes
    ----------
    reduced
        States (n, w, rank), newest last.
    known
        True for tokens, (n, w).
    """

    reduced: Float[Tensor, "n w r"]
    known: Bool[Tensor, "n w"]


def gated_blend(gate: nn.Linear, states: Tensor, g: Tensor) -> Tensor:
    """α h + (1 - α) g with α = σ(gate [h, g]): the gate is the way past the mixing, there is no other residual."""
    g = g.to(states.dtype)
    alpha = torch.sigmoid(gate(torch.cat([states, g], -1)))
    return alpha * states + (1 - alpha) * g


class GrassmannMixing(nn.Module):
    """States (n, L, d) → α h + (1 - α) g, g made of the planes that each token spans with earlier ones.

    z = reduce(h) ∈ R^rank; g_t = project(mean over offsets Δ <= t of (z_t ∧ z_{t-Δ}) / area); α = σ(gate [h, g]). Pairs
    are with the past: the paper's text pairs t with t + Δ, which shows a language model its target. Since the wedge is
    bilinear, the mean is z_t ∧ mean(z_{t-Δ} / area), one wedge a token whatever the number of offsets; areas come from
    inner products. A token without a pair has g = 0. Cost O(L (d r + d r² / 2 + 2 d²)).

    Parameters
    ----------
    d_model
        Width d of the states.
    rank
        r, the width that pairs are formed in; at least 2.
    offsets
        How many tokens back the partners lie: positive whole numbers, each once.
    normalize
        False leaves the areas out.
    epsilon
        Areas are at least epsilon |z_t| |z_{t-Δ}|, below which the plane of two nearly parallel tokens is noise.
    output_projection
        One more linear map on g, with which the paper's parameter counts come out though its text does not have it.

    Raises
    ------
    ValueError
        For offsets that are not positive whole numbers, and rank < 2.

    References
    ----------
    Zhang Chong (2025), arXiv 2512.19428.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import GrassmannMixing
    >>> mixing, states = GrassmannMixing(8, rank=4, offsets=(1, 2)), torch.randn(1, 6, 8)
    >>> torch.allclose(mixing(states)[:, :3], mixing(states[:, :3]), atol=1e-5)
    True
    """

    def __init__(
        self,
        d_model: int,
        rank: int = 32,
        offsets: Sequence[int] = OFFSETS,
        *,
        normalize: bool = True,
        epsilon: float = 1e-3,
        output_projection: bool = False,
    ) -> None:
        super().__init__()
        if rank < 2:
            raise ValueError(f"rank: a plane needs at least 2 dimensions, got {rank}")
        if not offsets or any(not isinstance(each, int) or each < 1 for each in offsets):
            raise ValueError(f"offsets: positive whole numbers (only the past is paired), got {tuple(offsets)}")
        if len(set(offsets)) < len(offsets):
            raise ValueError(f"offsets: {tuple(offsets)} has one twice")
        if not epsilon > 0:
            raise ValueError(f"epsilon: must be positive, got {epsilon}")
        self.d_model = d_model
        self.rank = rank
        self.offsets = tuple(offsets)
        self.normalize = normalize
        self.epsilon = epsilon
        self.reduce = nn.Linear(d_model, rank)
        self.project = nn.Linear(rank * (rank - 1) // 2, d_model)
        self.output = nn.Linear(d_model, d_model) if output_projection else nn.Identity()
        self.gate = nn.Linear(2 * d_model, d_model)

    def forward(
        self,
        states: Float[Tensor, "n L d"],
        mask: Bool[Tensor, "n L"] | None = None,
        past: MixingState | None = None,
    ) -> Float[Tensor, "n L d"]:
        """Mixed states; mask: True for tokens, False for padding, which pairs with nothing; past: the tokens before."""
        if states.shape[-1] != self.d_model:
            raise ValueError(f"states: expected width {self.d_model}, got {states.shape[-1]}")
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(f"mask: expected shape {tuple(states.shape[:2])}, got {tuple(mask.shape)}")
        z = self.reduce(states)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        known = torch.ones_like(z[..., 0], dtype=torch.bool) if mask is None else mask
        whole = self._with_past(z, known, past)
        if z.shape[1] <= _BLOCK or torch.compiler.is_compiling():
            return self._mix(states, z, whole)
        # Coordinates of more tokens than these leave the cache before they are projected.
        window, mixed = max(self.offsets), []
        for start in range(0, z.shape[1], _BLOCK):
            part = slice(start, start + _BLOCK)
            seen = slice(start, start + window + _BLOCK)
            mixed.append(self._mix(states[:, part], z[:, part], MixingState(*(each[:, seen] for each in whole))))
        return torch.cat(mixed, 1)

    def _with_past(self, z: Tensor, known: Tensor, past: MixingState | None) -> MixingState:
        """The last max(offsets) states before z, zeros where there were fewer, and z."""
        window = max(self.offsets)
        if past is None:
            return MixingState(F.pad(z, (0, 0, window, 0)), F.pad(known, (window, 0)))
        missing = window - past.reduced.shape[1]
        before = F.pad(past.reduced.to(z.dtype), (0, 0, missing, 0)), F.pad(past.known, (missing, 0))
        return MixingState(torch.cat([before[0], z], 1), torch.cat([before[1], known], 1))

    def _mix(self, states: Tensor, z: Tensor, whole: MixingState) -> Tensor:
        """Mixed states; z (n, L, r) and `whole`, what it stands at the end of."""
        with torch.autocast(z.device.type, enabled=False):
            window, length = max(self.offsets), z.shape[1]
            slices = [slice(window - each, window - each + length) for each in self.offsets]
            partners = torch.stack([whole.reduced[:, each] for each in slices], -2)
            tokens = whole.known.to(z.dtype)
            valid = torch.stack([tokens[:, each] for each in slices], -1) * tokens[:, window:].unsqueeze(-1)
            weight = valid / valid.sum(-1, keepdim=True).clamp_min(1)
            if self.normalize:
                area = parallelogram_area(z.unsqueeze(-2).expand_as(partners), partners, self.epsilon)
                weight = torch.where(valid > 0, weight / area, 0)
            pairs = torch.triu_indices(self.rank, self.rank, 1, device=z.device)
            coordinates = plucker(z, (weight.unsqueeze(-1) * partners).sum(-2), pairs)
        any_pair = (valid.amax(-1, keepdim=True) > 0).to(states.dtype)
        g = self.output(self.project(coordinates.to(self.project.weight.dtype))) * any_pair
        return gated_blend(self.gate, states, g)

    def step(
        self, state: Float[Tensor, "n d"], past: MixingState | None = None
    ) -> tuple[Float[Tensor, "n d"], MixingState]:
        """One more token (n, d), as `forward` would mix it; the second result is `past` for the next. O(max offset)."""
        z = self.reduce(state.unsqueeze(1))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        whole = self._with_past(z, torch.ones_like(z[..., 0], dtype=torch.bool), past)
        mixed = self._mix(state.unsqueeze(1), z, whole)
        return mixed.squeeze(1), MixingState(whole.reduced[:, 1:], whole.known[:, 1:])

    @torch.no_grad()
    def planes(self, states: Float[Tensor, "n L d"], offset: int) -> Subspace:
        """The planes of all pairs (t - offset, t), one batch (n, L - offset, rank, 2). Raises where one is a line."""
        z = self.reduce(states).double()
        if not 1 <= offset < z.shape[1]:
            raise ValueError(f"offset: must lie in [1, {z.shape[1] - 1}], got {offset}")
        pairs = torch.stack([z[:, offset:], z[:, :-offset]], -1)
        area = parallelogram_area(pairs[..., 0], pairs[..., 1])
        scale = torch.linalg.vector_norm(pairs, dim=-2).prod(-1)
        if bool((area <= 1e-9 * scale).any()):
            raise ValueError("states: two paired tokens are parallel and span no plane")
        return Subspace(orthonormalize(pairs))

    def multiply_adds(self, states: Tensor) -> int:
        """Multiply-adds of the linear maps."""
        maps = [self.reduce, self.project, self.gate, *([self.output] if isinstance(self.output, nn.Linear) else [])]
        return states.numel() // states.shape[-1] * sum(part.weight.numel() for part in maps)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"d_model={self.d_model}, rank={self.rank}, offsets={self.offsets}, normalize={self.normalize}"


class GrassmannBlock(nn.Module):
    """Mixing, layer norm, feed-forward part with the only additive residual: h' = LN(u + FFN(u)), u = LN(mixed).

    Parameters
    ----------
    d_model
        Width d of the states (n, L, d).
    mixing
        Any module (n, L, d) → (n, L, d); None: `GrassmannMixing(d_model)`.
    ffn
        Hidden width of the feed-forward part; None: 4 d.
    dropout
        Behind the mixing and the feed-forward part, in [0, 1).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import GrassmannBlock
    >>> GrassmannBlock(16)(torch.randn(2, 6, 16)).shape
    torch.Size([2, 6, 16])
    """

    def __init__(
        self, d_model: int, mixing: nn.Module | None = None, *, ffn: int | None = None, dropout: float = 0.1
    ) -> None:
        super().__init__()
        hidden = 4 * d_model if ffn is None else ffn
        self.mixing = GrassmannMixing(d_model) if mixing is None else mixing
        self.mixing_norm = nn.LayerNorm(d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, hidden), nn.GELU(), nn.Linear(hidden, d_model), nn.Dropout(dropout)
        )
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Float[Tensor, "n L d"], *given: Any) -> Float[Tensor, "n L d"]:
        """The next layer's states; what else is given (a mask, say) goes to the mixing."""
        mixed = self.dropout(self.mixing_norm(self.mixing(states, *given)))
        return self.norm(mixed + self.feed_forward(mixed))


class GrassmannLanguageModel(nn.Module):
    """Token ids (n, L) → next-token logits (n, L, vocabulary): embeddings, blocks, the embedding as output head.

    More than `context` tokens raise ValueError.

    Parameters
    ----------
    vocabulary
        Number of token ids.
    mixing
        The mixing module of each layer.
    d_model
        Width of the states.
    context
        The most tokens of a sequence.
    dropout
        Of the embeddings and in the blocks, in [0, 1).

    Raises
    ------
    ValueError
        Without a mixing module.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import GrassmannLanguageModel, GrassmannMixing
    >>> model = GrassmannLanguageModel(50, [GrassmannMixing(16, rank=4)] * 2, d_model=16)
    >>> model(torch.randint(50, (2, 6))).shape
    torch.Size([2, 6, 50])
    """

    def __init__(
        self,
        vocabulary: int,
        mixing: Sequence[nn.Module],
        *,
        d_model: int = 256,
        context: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not mixing:
            raise ValueError("mixing: expected one module a layer, got none")
        self.context = context
        self.token = nn.Embedding(vocabulary, d_model)
        self.position = nn.Embedding(context, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(GrassmannBlock(d_model, part, dropout=dropout) for part in mixing)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Int[Tensor, "n L"], mask: Bool[Tensor, "n L"] | None = None) -> Float[Tensor, "n L v"]:
        """Logits; mask: True for tokens, False for padding, which is given no position and pairs with nothing."""
        states = self.embed(ids, mask)
        for block in self.blocks:
            states = block(states) if mask is None else block(states, mask)
        return self.logits(states)

    def embed(self, ids: Int[Tensor, "n L"], mask: Bool[Tensor, "n m"] | None = None) -> Float[Tensor, "n L d"]:
        """The blocks' input; mask (n, m >= L) with the tokens before these too, whose number is the first position."""
        length = ids.shape[1] if mask is None else mask.shape[1]
        if length > self.context:
            raise ValueError(f"ids: at most {self.context} tokens, got {length}")
        if mask is None:
            return self.dropout(self.token(ids) + self.position(torch.arange(length, device=ids.device)))
        if length < ids.shape[1]:
            raise ValueError(f"mask: expected at least {ids.shape[1]} columns, got {length}")
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, length - ids.shape[1] :]
        return self.dropout(self.token(ids) + self.position(positions))

    def logits(self, states: Float[Tensor, "n L d"]) -> Float[Tensor, "n L v"]:
        """Logits of the last block's states."""
        return F.linear(states, self.token.weight)
