"""White-box transformers: each layer compresses tokens onto learnt subspaces, then makes them sparse."""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.geometry import Subspace, compression_gradient
from subspan.geometry.grassmann import orthonormalize

from .orthogonal import register_orthonormal

_STRICT = (None, "gradient", "softmax")


class SubspaceSelfAttention(nn.Module):
    """Tokens (…, n, d) → Σ_k softmax(w_k w_k' / √p) w_k, w_k = z U_k: attention whose query, key and value are one map.

    As released, U is free and the output map its own, with a bias; a single head has none, as it needs no mixing.
    `tied` and `orthonormal` together make the layer what the derivation says.

    Parameters
    ----------
    dim
        Width d of the tokens.
    heads
        Number of heads k; p = d / heads.
    tied
        The output map is U itself.
    orthonormal
        U'U = I is kept through training, all heads together.
    causal
        A token looks at none after it.
    dropout
        Of the attention and of the output, in [0, 1).

    Raises
    ------
    ValueError
        Where heads do not divide d.

    References
    ----------
    Yu et al. (2023), arXiv 2311.13110.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SubspaceSelfAttention
    >>> layer = SubspaceSelfAttention(8, heads=2, tied=True, orthonormal=True)
    >>> layer(torch.randn(3, 5, 8)).shape, layer.subspaces().basis.shape
    (torch.Size([3, 5, 8]), torch.Size([2, 8, 4]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        tied: bool = False,
        orthonormal: bool = False,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"heads: must divide dim, got {heads} and {dim}")
        self.dim = dim
        self.heads = heads
        self.tied = tied
        self.orthonormal = orthonormal
        self.causal = causal
        self.dropout = dropout
        self.subspace_map = nn.Linear(dim, dim, bias=False)
        self.output = nn.Identity() if tied or heads == 1 else nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))
        if orthonormal:
            register_orthonormal(self.subspace_map, "weight")

    @property
    def bases(self) -> Float[Tensor, "k d p"]:
        """U_k of every head, as they stand (orthonormal where the layer keeps them so)."""
        return self.subspace_map.weight.unflatten(0, (self.heads, -1)).mT

    def subspaces(self) -> Subspace:
        """Spans of the U_k, one batch (heads, d, p)."""
        return Subspace(orthonormalize(self.bases.detach().double()))

    def coordinates(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b k n p"]:
        """w_k of every head: query, key and value at once."""
        if z.shape[-1] != self.dim:
            raise ValueError(f"z: expected width {self.dim}, got {z.shape[-1]}")
        return self.subspace_map(z).unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """The compressed tokens, to be added to z."""
        w = self.coordinates(z)
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(w, w, w, is_causal=self.causal, dropout_p=drop)
        mixed = mixed.transpose(-3, -2).flatten(-2)
        return mixed @ self.subspace_map.weight.to(mixed.dtype) if self.tied else self.output(mixed)

    def attention(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b k n n"]:
        """The attention maps of every head."""
        w = self.coordinates(z)
        scores = w @ w.mT / math.sqrt(w.shape[-1])
        if self.causal:
            future = torch.ones(w.shape[-2], w.shape[-2], dtype=torch.bool, device=z.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        return scores.softmax(-1)


class ISTA(nn.Module):
    """Tokens y → codes by proximal gradient steps of the lasso min ½|y - D a|² + λ|a|₁, a ≥ 0.

    One step is a ← ReLU(a + η D'(y - D a) - η λ), from a = y. D starts Kaiming-uniform. `stability` is η σ_max(D)²,
    below 2 where the steps converge.

    Parameters
    ----------
    dim
        Width d of the tokens.
    step
        η, as in the released classifier.
    threshold
        λ, as in the released classifier.
    steps
        Number of steps.
    expansion
        Above 1, D is (d, expansion · d), and the codes have that width and start at zero (CRATE-α).
    nonnegative
        False: soft thresholds in place of the ReLU.

    Raises
    ------
    ValueError
        For sizes below 1, a step that is not positive, or a negative threshold.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import ISTA
    >>> layer = ISTA(3, step=0.1, threshold=1.0)
    >>> _ = torch.nn.init.eye_(layer.dictionary)
    >>> layer(torch.tensor([1.0, 0.05, -1.0])).detach()
    tensor([0.9000, 0.0000, 0.0000])
    """

    def __init__(
        self,
        dim: int,
        *,
        step: float = 0.1,
        threshold: float = 0.1,
        steps: int = 1,
        expansion: int = 1,
        nonnegative: bool = True,
    ) -> None:
        super().__init__()
        if dim < 1 or steps < 1 or expansion < 1:
            raise ValueError(f"dim, steps, expansion: must be at least 1, got {dim}, {steps} and {expansion}")
        if not (step > 0 and threshold >= 0):
            raise ValueError(f"step, threshold: must be > 0 and >= 0, got {step} and {threshold}")
        self.step = step
        self.threshold = threshold
        self.steps = steps
        self.expansion = expansion
        self.nonnegative = nonnegative
        self.dictionary = nn.Parameter(torch.empty(dim, expansion * dim))
        nn.init.kaiming_uniform_(self.dictionary)

    @property
    def stability(self) -> float:
        """η σ_max(D)²."""
        return self.step * float(torch.linalg.matrix_norm(self.dictionary.detach().double(), 2)) ** 2

    def forward(self, y: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        """Sparse codes."""
        code = y if self.expansion == 1 else y.new_zeros(*y.shape[:-1], self.dictionary.shape[1])
        for _ in range(self.steps):
            residual = y - F.linear(code, self.dictionary)
            code = code + self.step * (residual @ self.dictionary)
            level = self.step * self.threshold
            code = F.relu(code - level) if self.nonnegative else F.softshrink(code, level)
        return code

    def extra_repr(self) -> str:
        """Shown by print."""
        return (
            f"dim={self.dictionary.shape[0]}, step={self.step}, threshold={self.threshold}, steps={self.steps}, "
            f"expansion={self.expansion}, nonnegative={self.nonnegative}"
        )


class CRATELayer(nn.Module):
    """One layer: z½ = z + MSSA(LN z), z⁺ = ISTA(LN z½), with no residual around the second.

    Parameters
    ----------
    dim, heads
        Width d of the tokens and heads of `SubspaceSelfAttention`.
    step, threshold
        η and λ of `ISTA`.
    steps
        Of `ISTA`; None: 1, or 2 where expansion > 1.
    expansion
        Above 1 it is CRATE-α: z⁺ = z½ + E ISTA(LN z½), from zero with a dictionary of expansion · d and a second one,
        E.
    strict
        None: as published. The others use orthonormal tied U, and no published model is trained so. "gradient": the
        exact step z½ = y - κ ∇R^c(y | U), y = LN z. "softmax": its first order with softmax memberships, z½ = (1 - κ
        p/(n ε²)) y + κ p/(n ε²) MSSA(y).
    kappa, epsilon
        κ, and ε of the rate, where `strict`.
    causal
        A token looks at none after it; not with "gradient", which mixes all tokens.
    dropout
        Of the attention, in [0, 1).

    Raises
    ------
    ValueError
        For another `strict`, a causal gradient, or values that are not positive.

    References
    ----------
    Yu et al. (2023), arXiv 2311.13110; Yang et al. (2024) for CRATE-α.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import CRATELayer
    >>> tokens = CRATELayer(8, heads=2)(torch.randn(3, 5, 8))
    >>> tokens.shape, bool((tokens >= 0).all())
    (torch.Size([3, 5, 8]), True)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        step: float = 0.1,
        threshold: float = 0.1,
        steps: int | None = None,
        expansion: int = 1,
        strict: str | None = None,
        kappa: float = 0.5,
        epsilon: float = 0.5,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if strict not in _STRICT:
            raise ValueError(f"strict: expected one of {_STRICT}, got {strict!r}")
        if strict == "gradient" and causal:
            raise ValueError("strict: the rate's gradient mixes all tokens, so such a layer cannot be causal")
        if not (kappa > 0 and epsilon > 0):
            raise ValueError(f"kappa, epsilon: must be positive, got {kappa} and {epsilon}")
        self.strict, self.kappa, self.epsilon = strict, kappa, epsilon
        exact = strict is not None
        self.compress_norm = nn.LayerNorm(dim)
        self.compress = SubspaceSelfAttention(dim, heads, tied=exact, orthonormal=exact, causal=causal, dropout=dropout)
        self.sparsify_norm = nn.LayerNorm(dim)
        steps = steps or (1 if expansion == 1 else 2)
        self.sparsify = ISTA(dim, step=step, threshold=threshold, steps=steps, expansion=expansion)
        self.decode = nn.Linear(expansion * dim, dim, bias=False) if expansion > 1 else None

    def forward(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """The next layer's tokens."""
        half = self._compressed(z)
        code = self.sparsify(self.sparsify_norm(half))
        return code if self.decode is None else half + self.decode(code)

    def _compressed(self, z: Tensor) -> Tensor:
        y = self.compress_norm(z)
        if self.strict is None:
            return z + self.compress(y)
        if self.strict == "softmax":
            weight = self.kappa * (z.shape[-1] // self.compress.heads) / (z.shape[-2] * self.epsilon**2)
            return (1 - weight) * y + weight * self.compress(y)
        with torch.autocast(z.device.type, enabled=False):
            wide = y.to(torch.promote_types(y.dtype, torch.float32))
            bases = self.compress.bases.to(wide.dtype)
            return (wide - self.kappa * compression_gradient(wide, bases, epsilon=self.epsilon)).to(z.dtype)


class CRATEDecoderLayer(nn.Module):
    """The inverse of `CRATELayer` in reverse order: y = A LN(x), x⁺ = y - MSSA(LN y).

    Parameters
    ----------
    dim, heads
        Width d of the tokens and heads of `SubspaceSelfAttention`.
    dropout
        Of the attention, in [0, 1).

    References
    ----------
    Pai et al. (2024).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import CRATEDecoderLayer
    >>> CRATEDecoderLayer(8, heads=2)(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, dim: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, dim, bias=False)
        # As D of the encoder's layers.
        nn.init.kaiming_uniform_(self.expand.weight)
        self.decompress_norm = nn.LayerNorm(dim)
        self.decompress = SubspaceSelfAttention(dim, heads, dropout=dropout)

    def forward(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """The next layer's tokens."""
        y = self.expand(self.expand_norm(x))
        return y - self.decompress(self.decompress_norm(y))


class LayerStack(nn.ModuleList):
    """Layers one after another, with a warning, once, for one whose output is all zero: λ has silenced it.

    Looked for in the first pass and in evaluation, so that training does not wait for the device.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self._looked = self._warned = False

    def forward(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """Tokens after the last layer."""
        looks = not self._warned and not (self._looked and self.training) and not torch.compiler.is_compiling()
        for index, layer in enumerate(self):
            z = layer(z)
            if looks and not bool(z.detach().any()):
                warnings.warn(f"layer {index} puts out zeros alone; lower threshold (λ) or step (η)", stacklevel=2)
                looks, self._warned = False, True
        self._looked = True
        return z

    def attention(self, z: Float[Tensor, "*b n d"], layer: int = -1) -> Float[Tensor, "*b k n n"]:
        """The attention maps of one layer's heads, of tokens z before the first."""
        if not -len(self) <= layer < len(self):
            raise ValueError(f"layer: must lie in [{-len(self)}, {len(self)}), got {layer}")
        index = layer % len(self)
        for each in list(self)[:index]:
            z = each(z)
        last = self[index]
        if not isinstance(last, CRATELayer):
            raise ValueError(f"layer: {index} is no CRATE layer but a {type(last).__name__}")
        return last.compress.attention(last.compress_norm(z))

    def subspaces(self) -> list[Subspace]:
        """The heads' subspaces, one batch (heads, d, p) a layer."""
        found = []
        for layer in self:
            part = layer.decompress if isinstance(layer, CRATEDecoderLayer) else getattr(layer, "compress", None)
            if isinstance(part, SubspaceSelfAttention):
                found.append(part.subspaces())
        return found
