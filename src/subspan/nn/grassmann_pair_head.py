"""A classifier of sentence pairs on a frozen encoder's tokens that mixes them by the planes of token pairs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from subspan.geometry.grassmann import pairwise_areas, plucker

from .grassmann_mixing import GrassmannBlock, gated_blend


class GrassmannPairMixing(nn.Module):
    """States (n, t, d) → α h + (1 - α) g, g made of the planes of each token with those that `pairs` says.

    reduce(h) is cut into `heads` parts z of rank / heads; head i takes the i-th kind of pair, in turn:
    g_s = project([mean over paired u of ± (z_s ∧ z_u) / area of each head]), one wedge a token and head since the wedge
    is bilinear. epsilon: as in `GrassmannMixing`. Cost O(t² rank + t (d² + d rank² / heads)).
    """

    def __init__(self, d_model: int, rank: int, heads: int, *, epsilon: float = 1e-3) -> None:
        super().__init__()
        each = rank // heads
        self.heads = heads
        self.each = each
        self.epsilon = epsilon
        self.reduce = nn.Linear(d_model, rank)
        self.project = nn.Linear(heads * each * (each - 1) // 2, d_model)
        self.gate = nn.Linear(2 * d_model, d_model)

    def forward(self, states: Float[Tensor, "n t d"], pairs: Float[Tensor, "n k t t"]) -> Float[Tensor, "n t d"]:
        """The mixed states; pairs: weight and orientation of each pair of tokens, zero where there is none."""
        z = self.reduce(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            weight = pairs.to(z.dtype).repeat(1, self.heads // pairs.shape[1], 1, 1)
            partner = torch.where(weight != 0, weight / pairwise_areas(z, z, self.epsilon), 0) @ z
            coordinates = torch.triu_indices(self.each, self.each, 1, device=z.device)
            planes = plucker(z, partner, coordinates).transpose(1, 2).flatten(2)
        return gated_blend(self.gate, states, self.project(planes.to(self.project.weight.dtype)))


def paired_means(
    a: Float[Tensor, "n p d"], b: Float[Tensor, "n q d"], a_mask: Bool[Tensor, "n p"], b_mask: Bool[Tensor, "n q"]
) -> Float[Tensor, "n e"]:
    """[a, b, |a - b|, a b] of the means over the tokens of two sentences, zero where there is none."""
    a, b = (
        (part * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        for part, mask in ((a, a_mask), (b, b_mask))
    )
    return torch.cat([a, b, (a - b).abs(), a * b], -1)


class GrassmannPairHead(nn.Module):
    """A premise (n, p, in_features) and a hypothesis (n, q, in_features), tokens of a frozen encoder → logits.

    Tokens are projected to d_model and go through Grassmann blocks. Odd heads pair a token with the others of its
    windows, even heads with every token of the other sentence; never with itself. A plane is oriented from the earlier
    token to the later, from premise to hypothesis, so that order counts inside a window. The logits (n, num_classes)
    are a linear map of [a, b, |a - b|, a ∘ b], a and b the means of the two sentences. The paper gives the sizes, and
    neither how its heads group pairs nor the pooling; these are ours. Padding pairs with nothing and is not pooled; a
    sentence of padding alone pools to zeros. Inputs of another width, number or mask raise ValueError.

    Parameters
    ----------
    in_features, num_classes
        Width of the tokens and number of logits.
    rank
        Width that pairs are formed in, over all heads.
    window, stride
        Tokens of a window of a sentence; there is one every `stride` tokens.
    layers
        Number of blocks.
    d_model
        Width of the blocks.
    heads
        An even number that divides rank into parts of 2 or more.
    ffn
        Hidden width of the feed-forward parts.
    dropout
        In the blocks and before the classifier, in [0, 1).

    Raises
    ------
    ValueError
        For heads that are odd or do not divide rank so, a stride beyond the window, and sizes out of range.

    References
    ----------
    Zhang Chong (2025), arXiv 2512.19428.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import GrassmannPairHead
    >>> head = GrassmannPairHead(12, num_classes=3, rank=8, d_model=16, ffn=16)
    >>> head(torch.randn(2, 5, 12), torch.randn(2, 7, 12)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        rank: int = 64,
        window: int = 8,
        stride: int = 8,
        layers: int = 2,
        d_model: int = 256,
        heads: int = 4,
        ffn: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "num_classes": num_classes, "layers": layers, "d_model": d_model}
        for name, value in {**sizes, "ffn": ffn}.items():
            if value < 1:
                raise ValueError(f"{name}: at least 1, got {value}")
        if heads < 2 or heads % 2:
            raise ValueError(f"heads: an even number, half for each kind of pair, got {heads}")
        if rank % heads or rank < 2 * heads:
            raise ValueError(f"rank: a multiple of heads = {heads}, at least twice as large, got {rank}")
        if window < 2:
            raise ValueError(f"window: at least 2 tokens make a pair, got {window}")
        if not 1 <= stride <= window:
            raise ValueError(f"stride: in [1, window = {window}], or tokens between windows are in none; got {stride}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: in [0, 1), got {dropout}")
        self.in_features = in_features
        self.window = window
        self.stride = stride
        self.embed = nn.Linear(in_features, d_model)
        self.blocks = nn.ModuleList(
            GrassmannBlock(d_model, GrassmannPairMixing(d_model, rank, heads), ffn=ffn, dropout=dropout)
            for _ in range(layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(4 * d_model, num_classes)

    def forward(
        self,
        premise: Float[Tensor, "n p f"],
        hypothesis: Float[Tensor, "n q f"],
        premise_mask: Bool[Tensor, "n p"] | None = None,
        hypothesis_mask: Bool[Tensor, "n q"] | None = None,
    ) -> Float[Tensor, "n c"]:
        """Logits; masks: True for tokens, False for padding."""
        masks = [
            self._checked_mask("premise", premise, premise_mask),
            self._checked_mask("hypothesis", hypothesis, hypothesis_mask),
        ]
        if len(hypothesis) != len(premise):
            raise ValueError(f"hypothesis: expected {len(premise)}, one for each premise, got {len(hypothesis)}")
        pairs = self.pairs(*masks)
        states = self.embed(torch.cat([premise, hypothesis], 1))
        for block in self.blocks:
            states = block(states, pairs)
        a, b = states.split([premise.shape[1], hypothesis.shape[1]], 1)
        return self.classifier(self.dropout(paired_means(a, b, *masks)))

    def pairs(
        self, premise_mask: Bool[Tensor, "n p"], hypothesis_mask: Bool[Tensor, "n q"]
    ) -> Float[Tensor, "n 2 t t"]:
        """Which tokens are paired, t = p + q: in windows, and with the other sentence.

        Entry (s, u) is 1 / the number of s's partners, positive where s comes before u; zero for no pair.
        """
        mask = torch.cat([premise_mask, hypothesis_mask], 1)
        place = torch.arange(mask.shape[1], device=mask.device)
        second = place >= premise_mask.shape[1]
        position = torch.cat([premise_mask.long().cumsum(1), hypothesis_mask.long().cumsum(1)], 1) - 1
        first_window = (position - self.window + self.stride).clamp_min(0) // self.stride
        last_window = position // self.stride
        # Two tokens share a window where the numbers of their windows, which are successive, overlap.
        reaches = first_window.unsqueeze(2) <= last_window.unsqueeze(1)
        same = second.unsqueeze(1) == second
        own = reaches & reaches.transpose(1, 2) & same & (place.unsqueeze(1) != place)
        both = (mask.unsqueeze(2) & mask.unsqueeze(1)).unsqueeze(1)
        paired = (torch.stack([own, (~same).expand_as(own)], 1) & both).float()
        orientation = 2.0 * (place > place.unsqueeze(1)).float() - 1
        return orientation * paired / paired.sum(-1, keepdim=True).clamp_min(1)

    def _checked_mask(self, name: str, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if tokens.shape[-1] != self.in_features:
            raise ValueError(f"{name}: expected width {self.in_features}, got {tokens.shape[-1]}")
        if mask is None:
            return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask.shape != tokens.shape[:2]:
            raise ValueError(f"{name}_mask: expected shape {tuple(tokens.shape[:2])}, got {tuple(mask.shape)}")
        return mask

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"in_features={self.in_features}, window={self.window}, stride={self.stride}"
