"""White-box transformers: each layer compresses tokens onto learnt subspaces, then makes them sparse."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry import Subspace, coding_rate
from ..geometry.grassmann import orthonormalize
from .orthogonal import register_orthonormal


def compression_rate(
    z: Float[Tensor, "*b n d"], bases: Float[Tensor, "k d p"], *, epsilon: float = 0.5
) -> Float[Tensor, "*b"]:
    """R^c(Z | U) = Σ_k ½ logdet(I + p/(n ε²) (Z U_k)'(Z U_k)), nats: the rate of tokens coded in k subspaces."""
    return coding_rate(torch.einsum("...nd,kdp->...knp", z, bases), epsilon=epsilon).sum(-1)


def compression_gradient(
    z: Float[Tensor, "*b n d"], bases: Float[Tensor, "k d p"], *, epsilon: float = 0.5
) -> Float[Tensor, "*b n d"]:
    """Gradient of `compression_rate` in z, in closed form, solved in the smaller of n x n and p x p."""
    n, p = z.shape[-2], bases.shape[-1]
    scale = p / (n * epsilon**2)
    w = torch.einsum("...nd,kdp->...knp", z, bases)
    if p <= n:
        gram = torch.eye(p, dtype=z.dtype, device=z.device) + scale * w.mT @ w
        inner = torch.linalg.solve(gram, w.mT).mT
    else:
        gram = torch.eye(n, dtype=z.dtype, device=z.device) + scale * w @ w.mT
        inner = torch.linalg.solve(gram, w)
    return scale * torch.einsum("...knp,kdp->...nd", inner, bases)


class SubspaceSelfAttention(nn.Module):
    """Tokens (…, n, d) → Σ_k softmax(w_k w_k' / √p) w_k, w_k = z U_k: attention whose query, key and value are one map.

    The layer as released: U free, and an output map of its own with a bias. strict: U_k orthonormal (all of them
    together: U'U = I) and the output map U itself, so that the layer is what the derivation says. causal: a token
    looks at none after it. Raises ValueError where heads do not divide d. Source: Yu et al. (2023), arXiv 2311.13110.
    """

    def __init__(
        self, dim: int, heads: int, *, strict: bool = False, causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"heads: must divide dim, got {heads} and {dim}")
        self.dim = dim
        self.heads = heads
        self.strict = strict
        self.causal = causal
        self.dropout = dropout
        self.subspace_map = nn.Linear(dim, dim, bias=False)
        self.output = nn.Identity() if strict else nn.Linear(dim, dim)
        if strict:
            register_orthonormal(self.subspace_map, "weight")

    @property
    def bases(self) -> Float[Tensor, "k d p"]:
        """U_k of every head, as they stand (orthonormal in strict layers only)."""
        return self.subspace_map.weight.unflatten(0, (self.heads, -1)).mT

    def subspaces(self) -> Subspace:
        """Spans of the U_k, one batch (heads, d, p)."""
        return Subspace(orthonormalize(self.bases.detach().double()))

    def forward(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """The compressed tokens, to be added to z."""
        if z.shape[-1] != self.dim:
            raise ValueError(f"z: expected width {self.dim}, got {z.shape[-1]}")
        w = self.subspace_map(z).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(w, w, w, is_causal=self.causal, dropout_p=drop)
        mixed = mixed.transpose(-3, -2).flatten(-2)
        return mixed @ self.subspace_map.weight.to(mixed.dtype) if self.strict else self.output(mixed)

    def attention(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b k n n"]:
        """The attention maps of every head."""
        w = self.subspace_map(z).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        scores = w @ w.mT / math.sqrt(w.shape[-1])
        if self.causal:
            future = torch.ones(w.shape[-2], w.shape[-2], dtype=torch.bool, device=z.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        return scores.softmax(-1)


class ISTA(nn.Module):
    """y → ReLU(y + η D'(y - D y) - η λ), `steps` times from y: steps of non-negative lasso, min ½|y - D a|² + λ Σ a.

    step: η, threshold: λ, as in the released classifier (0.1 and 0.1); D (d, d) starts Kaiming-uniform. `stability` is
    η σ_max(D)², below 2 where the steps converge. Raises ValueError for values that are not positive.
    """

    def __init__(self, dim: int, *, step: float = 0.1, threshold: float = 0.1, steps: int = 1) -> None:
        super().__init__()
        if dim < 1 or steps < 1:
            raise ValueError(f"dim, steps: must be at least 1, got {dim} and {steps}")
        if not (step > 0 and threshold >= 0):
            raise ValueError(f"step, threshold: must be positive, got {step} and {threshold}")
        self.step = step
        self.threshold = threshold
        self.steps = steps
        self.dictionary = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.dictionary)

    @property
    def stability(self) -> float:
        """η σ_max(D)²."""
        return self.step * float(torch.linalg.matrix_norm(self.dictionary.detach().double(), 2)) ** 2

    def forward(self, y: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Non-negative sparse codes."""
        code = y
        for _ in range(self.steps):
            residual = y - F.linear(code, self.dictionary)
            code = F.relu(code + self.step * (residual @ self.dictionary) - self.step * self.threshold)
        return code

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"dim={self.dictionary.shape[0]}, step={self.step}, threshold={self.threshold}, steps={self.steps}"


class CRATELayer(nn.Module):
    """One layer: z½ = z + MSSA(LN z), z⁺ = ISTA(LN z½), with no residual around the second.

    strict: the exact gradient step z½ = z - κ ∇R^c(z | U) on orthonormal U in place of the attention and its free
    output map (kappa: κ; epsilon: ε of the rate); no published model is trained so.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        step: float = 0.1,
        threshold: float = 0.1,
        strict: bool = False,
        kappa: float = 0.5,
        epsilon: float = 0.5,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if strict and causal:
            raise ValueError("strict: the rate's gradient mixes all tokens, so a strict layer cannot be causal")
        if not (kappa > 0 and epsilon > 0):
            raise ValueError(f"kappa, epsilon: must be positive, got {kappa} and {epsilon}")
        self.strict, self.kappa, self.epsilon = strict, kappa, epsilon
        self.compress_norm = nn.LayerNorm(dim)
        self.compress = SubspaceSelfAttention(dim, heads, strict=strict, causal=causal, dropout=dropout)
        self.sparsify_norm = nn.LayerNorm(dim)
        self.sparsify = ISTA(dim, step=step, threshold=threshold)

    def forward(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """The next layer's tokens."""
        y = self.compress_norm(z)
        if self.strict:
            with torch.autocast(z.device.type, enabled=False):
                wide = y.to(torch.promote_types(y.dtype, torch.float32))
                bases = self.compress.bases.to(wide.dtype)
                half = wide - self.kappa * compression_gradient(wide, bases, epsilon=self.epsilon)
            half = half.to(z.dtype)
        else:
            half = z + self.compress(y)
        return self.sparsify(self.sparsify_norm(half))


class CRATEDecoderLayer(nn.Module):
    """The inverse in reverse order: y = A LN(x), x⁺ = y - MSSA(LN y). Source: Pai et al. (2024)."""

    def __init__(self, dim: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, dim, bias=False)
        self.decompress_norm = nn.LayerNorm(dim)
        self.decompress = SubspaceSelfAttention(dim, heads, dropout=dropout)

    def forward(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """The next layer's tokens."""
        y = self.expand(self.expand_norm(x))
        return y - self.decompress(self.decompress_norm(y))


class LayerRate(NamedTuple):
    """Of one layer on a batch: R^c of its normalised head tokens (nats an image) and the share of zeros it puts out."""

    compression: float
    zeros: float


class CRATE(nn.Module):
    """Images (n, c, h, w) → class logits by patches, a class token and `CRATELayer`s.

    patch → LN → linear → LN; tables of positions and the class token are drawn N(0, 1); LN and a linear head on the
    class token. sizes of the paper: tiny 384/6/12 (dim/heads/depth), small 576/12/12, base 768/12/12, large 1024/16/24.
    Raises ValueError for images that patches do not divide. options: of `CRATELayer`.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        heads: int,
        depth: int,
        *,
        channels: int = 3,
        layer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size: must divide image_size, got {patch_size} and {image_size}")
        if depth < 1 or num_classes < 1:
            raise ValueError(f"depth, num_classes: must be at least 1, got {depth} and {num_classes}")
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        pixels, tokens = channels * patch_size**2, (image_size // patch_size) ** 2
        self.embed = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim))
        self.position = nn.Parameter(torch.randn(1, tokens + 1, dim))
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        make = layer or (lambda: CRATELayer(dim, heads, **options))
        self.layers = nn.ModuleList(make() for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def tokens(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n t d"]:
        """The embedded patches behind the class token, with their positions."""
        if images.shape[1:] != (self.channels, self.image_size, self.image_size):
            raise ValueError(
                f"images: expected {(self.channels, self.image_size, self.image_size)}, got {tuple(images.shape[1:])}"
            )
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).mT
        embedded = self.embed(patches)
        return torch.cat([self.class_token.expand(len(embedded), -1, -1), embedded], 1) + self.position

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        z = self.tokens(images)
        for layer in self.layers:
            z = layer(z)
        return self.head(z[:, 0])

    @torch.no_grad()
    def rate_profile(self, images: Float[Tensor, "n c h w"], *, epsilon: float = 0.1) -> list[LayerRate]:
        """R^c and sparsity of every layer on a batch: tokens of a head at unit length, ε² = 0.01, as published."""
        z, found = self.tokens(images), []
        for layer in self.layers:
            one: Any = layer
            if not isinstance(layer, CRATELayer):
                raise ValueError(f"layers: the profile is of CRATE layers, got {type(layer).__name__}")
            w = one.compress.subspace_map(one.compress_norm(z)).unflatten(-1, (one.compress.heads, -1)).transpose(1, 2)
            rate = coding_rate(F.normalize(w.float(), dim=-1), epsilon=epsilon).sum(-1)
            z = layer(z)
            found.append(LayerRate(float(rate.mean()), float((z == 0).float().mean())))
        return found

    def subspaces(self) -> list[Subspace]:
        """The heads' subspaces, one batch a layer."""
        return [layer.compress.subspaces() for layer in self.layers if isinstance(layer, CRATELayer)]


class CRATEAutoencoder(nn.Module):
    """Images → patches that were masked, filled in: encoder layers, then as many decoder layers.

    Positions are fixed sines; a mask token stands in for `masked` of the patches, drawn anew for every image, *before*
    the encoder, so that it sees all places. `loss` is the mean squared error on masked patches alone. threshold: λ of
    the encoder, 0.5 as released. options: of the encoder's `CRATELayer`.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        heads: int,
        depth: int,
        *,
        channels: int = 3,
        masked: float = 0.75,
        threshold: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size: must divide image_size, got {patch_size} and {image_size}")
        if not 0 < masked < 1:
            raise ValueError(f"masked: must lie in (0, 1), got {masked}")
        self.patch_size, self.masked = patch_size, masked
        pixels, side = channels * patch_size**2, image_size // patch_size
        self.embed = nn.Linear(pixels, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.register_buffer("position", sine_positions(side, dim), persistent=False)
        self.encoder = nn.Sequential(
            *(CRATELayer(dim, heads, threshold=threshold, **options) for _ in range(depth)), nn.LayerNorm(dim)
        )
        self.decoder = nn.Sequential(*(CRATEDecoderLayer(dim, heads) for _ in range(depth)), nn.LayerNorm(dim))
        self.output = nn.Linear(dim, pixels)

    position: Tensor

    def forward(self, images: Float[Tensor, "n c h w"], hidden: Tensor) -> Float[Tensor, "n t p"]:
        """Pixels of every patch, those with hidden (n, t) = True not having been seen."""
        z = torch.where(hidden.unsqueeze(-1), self.mask_token, self.embed(self.patches(images)))
        return self.output(self.decoder(self.encoder(z + self.position)))

    def patches(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n t p"]:
        """The images' patches as rows."""
        return F.unfold(images, self.patch_size, stride=self.patch_size).mT

    def draw_mask(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """A mask (n, t) that hides the same number of patches of each image."""
        t = len(self.position)
        order = torch.rand(n, t, generator=generator).argsort(1)
        return (order < round(self.masked * t)).to(self.position.device)

    def loss(self, images: Float[Tensor, "n c h w"], generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """Mean squared error of hidden patches."""
        hidden = self.draw_mask(len(images), generator)
        return F.mse_loss(self(images, hidden)[hidden], self.patches(images)[hidden])


def sine_positions(side: int, dim: int) -> Float[Tensor, "t d"]:
    """Fixed positions of a square grid: sines and cosines of rows and columns, a quarter of dim each."""
    if dim % 4:
        raise ValueError(f"dim: must be a multiple of 4 for positions of a grid, got {dim}")
    frequency = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side).unsqueeze(1) * frequency
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line.unsqueeze(1).expand(-1, side, -1), line.unsqueeze(0).expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)
