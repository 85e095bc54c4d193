"""A compact diffusion transformer with adaptive layer norm by time and class (Peebles & Xie, 2023; Ma et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class FlowTransformer(nn.Module):
    """Noised images (b, c, h, w), times (b,) in [0, 1], labels (b,) → a field (b, c, h, w): velocity or image.

    The blocks (`blocks.0` …) take and give tokens (b, t, width), rows first, on the grid `hw`. The output starts at 0:
    modulations and the last layer are zero at first (adaLN-zero).

    Parameters
    ----------
    size
        Image side or (height, width), a multiple of `patch`.
    channels
        c.
    patch
        Side of a patch, in pixels.
    width, depth, heads
        Width of the tokens, a multiple of 4 and of the heads; number of blocks; heads of each.
    classes
        Their number; label `classes` stands for no class (`null`).
    mlp_ratio
        Hidden width of each block's network over `width`.

    Raises
    ------
    ValueError
        For sizes that do not divide as said, or are below 1.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import FlowTransformer
    >>> model = FlowTransformer(8, width=16, depth=1, heads=2)
    >>> field = model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([3, model.null]))
    >>> field.shape, bool((field == 0).all())
    (torch.Size([2, 3, 8, 8]), True)
    """

    positions: Tensor

    def __init__(
        self,
        size: int | tuple[int, int] = 32,
        *,
        channels: int = 3,
        patch: int = 4,
        width: int = 384,
        depth: int = 8,
        heads: int = 6,
        classes: int = 10,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        height, breadth = (size, size) if isinstance(size, int) else size
        if patch < 1 or height % patch or breadth % patch or min(height, breadth) < patch:
            raise ValueError(f"size: a multiple of the patch {patch} is needed, got {height}×{breadth}")
        if width % heads or width % 4:
            raise ValueError(f"width: a multiple of 4 and of the {heads} heads is needed, got {width}")
        if min(depth, classes, channels) < 1:
            raise ValueError(f"depth, classes, channels: at least 1, got {depth}, {classes} and {channels}")
        self.image_shape = (channels, height, breadth)
        self.patch = patch
        self.hw = (height // patch, breadth // patch)
        self.classes = self.null = classes
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("positions", sinusoidal_grid(*self.hw, width), persistent=False)
        self.time = TimeEmbedding(width)
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch * patch * channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, small embeddings, zeros where a block must start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.embed.weight.view(self.embed.weight.shape[0], -1))
        assert self.embed.bias is not None
        nn.init.zeros_(self.embed.bias)
        nn.init.normal_(self.label.weight, std=0.02)
        for layer in (self.modulation, self.head, *(block.modulation for block in self.blocks)):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlowTransformer:
        empty = self.positions.is_meta
        super()._apply(fn, recurse)
        if empty and not self.positions.is_meta:
            # They are no part of a state that could fill them.
            self.positions = sinusoidal_grid(*self.hw, self.positions.shape[1]).to(self.positions)
        return self

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, " b"], label: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """The field at `x`."""
        if tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x: images of shape {self.image_shape} are needed, got {tuple(x.shape[1:])}")
        tokens = self.embed(x).flatten(2).mT + self.positions
        condition = F.silu(self.time(time) + self.label(label))
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        pixels = self.head(self.norm(tokens) * (1 + scale) + shift)
        (h, w), p = self.hw, self.patch
        grid = pixels.unflatten(-1, (self.image_shape[0], p, p)).unflatten(1, (h, w))
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer network, each shifted, scaled and gated by the condition.

    causal: tokens attend to those before them and to themselves. A condition is of all tokens, or one for each.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        hidden = int(mlp_ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, x: Float[Tensor, "b t d"], condition: Float[Tensor, "b d"] | Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """Tokens to tokens."""
        each = condition if condition.ndim == 3 else condition[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(each).chunk(6, -1)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1)).unbind(2)
        parts = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        x = x + gate1 * self.out(mixed.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class TimeEmbedding(nn.Module):
    """Times (b,) in [0, 1] → (b, width): sines and cosines of 1000 t, then two layers."""

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """The embedding, in the dtype of the weights."""
        angles = _angles(1000 * time.float(), self.frequencies)
        parameter = next(self.layers.parameters())
        return self.layers(torch.cat([angles.cos(), angles.sin()], -1).to(parameter.dtype))


def sinusoidal_grid(h: int, w: int, width: int) -> Float[Tensor, "t d"]:
    """Fixed embeddings of the places of an h × w grid: sin and cos of row and column, a quarter of the width each."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    parts = [_angles(axis.flatten().float(), width // 4) for axis in (rows, columns)]
    return torch.cat([turned for angle in parts for turned in (angle.sin(), angle.cos())], -1)


def _angles(values: Float[Tensor, " n"], frequencies: int) -> Float[Tensor, "n f"]:
    rates = torch.exp(-math.log(10_000) * torch.arange(frequencies, device=values.device) / frequencies)
    return values[:, None] * rates
