"""White-box transformers ready made: image classifier, masked autoencoder, causal language model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.geometry import Subspace

from .crate import CRATEDecoderLayer, CRATELayer, LayerStack
from .spatial import resize_tokens

SIZES = {"tiny": (384, 6, 12), "small": (576, 12, 12), "base": (768, 12, 12), "large": (1024, 16, 24)}
"""dim, heads and depth of the published models."""


def _size(name: str) -> tuple[int, int, int]:
    if name not in SIZES:
        raise ValueError(f"name: expected one of {tuple(SIZES)}, got {name!r}")
    return SIZES[name]


def _grid(image_size: int, patch_size: int) -> int:
    if patch_size < 1 or image_size % patch_size:
        raise ValueError(f"patch_size: must divide image_size, got {patch_size} and {image_size}")
    return image_size // patch_size


def _check_images(images: Tensor, channels: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    _, c, h, w = images.shape
    if c != channels or h % patch_size or w % patch_size or not h or not w:
        raise ValueError(
            f"images: expected {channels} channels and sides that {patch_size} divides, got {tuple(images.shape[1:])}"
        )
    return h // patch_size, w // patch_size


class CRATE(nn.Module):
    """Images (n, c, h, w) → class logits (n, num_classes) by patches, a class token and `CRATELayer`s.

    A patch goes through LN, a linear map and LN. The tables of positions and the class token are drawn N(0, 1). Images
    of another size than `image_size` have the positions resized, bicubic. `preset` has the sizes of the paper.

    Parameters
    ----------
    image_size, patch_size
        Sides, in pixels; the patch divides the image.
    num_classes
        Width of the logits.
    dim, heads, depth
        Width of the tokens, heads of each layer and number of layers.
    channels
        c.
    pool
        What goes through LN and the linear head: the "class" token, or the "mean" of all tokens.
    layer
        Makes a layer, in place of `CRATELayer(dim, heads, **options)`.
    **options
        Of `CRATELayer`.

    Raises
    ------
    ValueError
        For images that patches do not divide, sizes below 1, or another `pool`.

    References
    ----------
    Yu et al. (2023), arXiv 2311.13110.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import CRATE
    >>> model = CRATE(image_size=8, patch_size=4, num_classes=10, dim=16, heads=2, depth=2)
    >>> images = torch.randn(3, 3, 8, 8)
    >>> model(images).shape, model.attention_maps(images).shape
    (torch.Size([3, 10]), torch.Size([3, 2, 2, 2]))
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
        pool: str = "class",
        layer: Callable[[], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        side = _grid(image_size, patch_size)
        if depth < 1 or num_classes < 1:
            raise ValueError(f"depth, num_classes: must be at least 1, got {depth} and {num_classes}")
        if pool not in ("class", "mean"):
            raise ValueError(f"pool: expected 'class' or 'mean', got {pool!r}")
        self.image_size, self.patch_size, self.channels, self.pool = image_size, patch_size, channels, pool
        pixels = channels * patch_size**2
        self.embed = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim))
        self.position = nn.Parameter(torch.randn(1, side**2 + 1, dim))
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        make = layer or (lambda: CRATELayer(dim, heads, **options))
        self.layers = LayerStack([make() for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    @classmethod
    def preset(
        cls, name: str, *, image_size: int = 224, patch_size: int = 16, num_classes: int = 1000, **options: Any
    ) -> CRATE:
        """A published size: "tiny" (6.09 M parameters), "small" (13.12 M), "base" (22.80 M) or "large" (77.64 M)."""
        return cls(image_size, patch_size, num_classes, *_size(name), **options)

    def tokens(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n t d"]:
        """The embedded patches behind the class token, with their positions."""
        hw = _check_images(images, self.channels, self.patch_size)
        embedded = self.embed(F.unfold(images, self.patch_size, stride=self.patch_size).mT)
        side = self.image_size // self.patch_size
        first, rest = self.position[:, :1], resize_tokens(self.position[:, 1:], (side, side), hw)
        tokens = torch.cat([self.class_token.expand(len(embedded), -1, -1), embedded], 1)
        return tokens + torch.cat([first, rest], 1)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        z = self.layers(self.tokens(images))
        return self.head(z[:, 0] if self.pool == "class" else z.mean(1))

    @torch.no_grad()
    def attention_maps(
        self, images: Float[Tensor, "n c h w"], layer: int = -1, *, mass: float | None = None
    ) -> Float[Tensor, "n k h2 w2"] | Bool[Tensor, "n k h2 w2"]:
        """What the class token attends to in a layer, a map of patches a head (shares of all tokens).

        mass: in place of the map, the fewest patches whose share of it reaches that much: a foreground mask.
        """
        hw = _check_images(images, self.channels, self.patch_size)
        maps = self.layers.attention(self.tokens(images), layer)[:, :, 0, 1:]
        if mass is not None:
            if not 0 < mass <= 1:
                raise ValueError(f"mass: must lie in (0, 1], got {mass}")
            values, order = maps.sort(-1, descending=True)
            share = values / values.sum(-1, keepdim=True)
            kept = share.cumsum(-1) - share < mass
            maps = torch.zeros_like(kept).scatter(-1, order, kept)
        return maps.unflatten(-1, hw)

    def subspaces(self) -> list[Subspace]:
        """The heads' subspaces, one batch (heads, d, p) a layer."""
        return self.layers.subspaces()


class CRATEAutoencoder(nn.Module):
    """Images → patches that were masked, filled in: encoder layers, then as many decoder layers.

    Positions are fixed sines. A mask token stands in for the hidden patches, drawn anew for every image, *before* the
    encoder, so that it sees all places; a class token goes along. `loss` is the mean squared error on hidden patches
    alone.

    Parameters
    ----------
    image_size, patch_size
        Sides, in pixels; the patch divides the image.
    dim, heads, depth
        Width of the tokens, heads of each layer and layers of each half.
    channels
        Of the images.
    masked
        Share of the patches that are hidden, in (0, 1).
    threshold
        λ of the encoder, 0.5 as released.
    normalize
        The loss is on patches whose pixels have mean 0 and variance 1 each.
    **options
        Of the encoder's `CRATELayer`.

    Raises
    ------
    ValueError
        For images that patches do not divide, or `masked` outside (0, 1).

    References
    ----------
    Pai et al. (2024).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import CRATEAutoencoder
    >>> model = CRATEAutoencoder(8, 4, dim=16, heads=2, depth=1, threshold=0.1)
    >>> hidden = model.draw_mask(2)
    >>> hidden.sum(1)
    tensor([3, 3])
    >>> model(torch.randn(2, 3, 8, 8), hidden).shape
    torch.Size([2, 4, 48])
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
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        side = _grid(image_size, patch_size)
        if not 0 < masked < 1:
            raise ValueError(f"masked: must lie in (0, 1), got {masked}")
        self.patch_size, self.masked, self.normalize, self.channels = patch_size, masked, normalize, channels
        pixels = channels * patch_size**2
        self.embed = nn.Linear(pixels, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.class_token = nn.Parameter(0.02 * torch.randn(dim))
        self.register_buffer("position", torch.cat([torch.zeros(1, dim), sine_positions(side, dim)]))
        self.encoder = LayerStack([CRATELayer(dim, heads, threshold=threshold, **options) for _ in range(depth)])
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder = LayerStack([CRATEDecoderLayer(dim, heads) for _ in range(depth)])
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.output = nn.Linear(dim, pixels)
        for name, part in self.named_modules():
            # The dictionaries of both halves keep their Kaiming start, as released.
            if isinstance(part, nn.Linear) and not name.endswith(".expand"):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    position: Tensor

    @classmethod
    def preset(cls, name: str, *, image_size: int = 224, patch_size: int = 16, **options: Any) -> CRATEAutoencoder:
        """A published size, by name: "tiny", "small", "base" or "large", each with as many decoder layers."""
        return cls(image_size, patch_size, *_size(name), **options)

    def tokens(
        self, images: Float[Tensor, "n c h w"], hidden: Bool[Tensor, "n t"] | None = None
    ) -> Float[Tensor, "n s d"]:
        """What enters the encoder: class token and patches with positions, mask tokens where hidden."""
        embedded = self.embed(self.patches(images))
        if hidden is not None:
            embedded = torch.where(hidden.unsqueeze(-1), self.mask_token, embedded)
        return torch.cat([self.class_token.expand(len(embedded), 1, -1), embedded], 1) + self.position

    def encode(
        self, images: Float[Tensor, "n c h w"], hidden: Bool[Tensor, "n t"] | None = None
    ) -> Float[Tensor, "n s d"]:
        """Features of the class token and of the patches, none being hidden by default."""
        return self.encoder_norm(self.encoder(self.tokens(images, hidden)))

    def forward(self, images: Float[Tensor, "n c h w"], hidden: Bool[Tensor, "n t"]) -> Float[Tensor, "n t p"]:
        """Pixels of every patch, those with hidden (n, t) = True not having been seen."""
        return self.output(self.decoder_norm(self.decoder(self.encode(images, hidden))))[:, 1:]

    def patches(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n t p"]:
        """The images' patches as rows."""
        h, w = _check_images(images, self.channels, self.patch_size)
        if h * w != len(self.position) - 1:
            raise ValueError(f"images: expected {len(self.position) - 1} patches, got {h * w}")
        return F.unfold(images, self.patch_size, stride=self.patch_size).mT

    def draw_mask(self, n: int, generator: torch.Generator | None = None) -> Bool[Tensor, "n t"]:
        """A mask (n, t) that hides the same number of patches of each image."""
        t = len(self.position) - 1
        rank = torch.rand(n, t, generator=generator).argsort(1).argsort(1)
        return (rank < t - int(t * (1 - self.masked))).to(self.position.device)

    def loss(self, images: Float[Tensor, "n c h w"], generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """Mean squared error of hidden patches."""
        hidden = self.draw_mask(len(images), generator)
        target = self.patches(images)
        if self.normalize:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return F.mse_loss(self(images, hidden)[hidden], target[hidden])

    def subspaces(self) -> list[Subspace]:
        """The heads' subspaces, one batch (heads, d, p) a layer, encoder first."""
        return self.encoder.subspaces() + self.decoder.subspaces()


def sine_positions(side: int, dim: int) -> Float[Tensor, "t d"]:
    """Fixed positions of a square grid: sines and cosines of columns, then of rows, a quarter of dim each."""
    if dim % 4:
        raise ValueError(f"dim: must be a multiple of 4 for positions of a grid, got {dim}")
    frequency = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side).unsqueeze(1) * frequency
    line = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = line.unsqueeze(0).expand(side, -1, -1), line.unsqueeze(1).expand(-1, side, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1)


class CRATELanguageModel(nn.Module):
    """Token ids (n, t) → next-token logits (n, t, vocabulary): GPT-2's frame around causal `CRATELayer`s.

    Positions are learnt, a layer norm comes last, and the embedding is the output map. `preset("base")` is
    Causal-CRATE-B (60 M parameters with GPT-2's vocabulary). More than `context` tokens raise ValueError.

    Parameters
    ----------
    vocabulary
        Number of token ids.
    context
        The most tokens of a sequence.
    dim, heads, depth
        Width of the tokens, heads of each layer and number of layers.
    **options
        Of `CRATELayer`.

    Raises
    ------
    ValueError
        For sizes below 1.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import CRATELanguageModel
    >>> model = CRATELanguageModel(vocabulary=20, context=8, dim=16, heads=2, depth=1)
    >>> ids = torch.arange(6).unsqueeze(0)
    >>> torch.allclose(model(ids)[:, :4], model(ids[:, :4]), atol=1e-5)
    True
    """

    def __init__(self, vocabulary: int, context: int, dim: int, heads: int, depth: int, **options: Any) -> None:
        super().__init__()
        if min(vocabulary, context, depth) < 1:
            raise ValueError(f"vocabulary, context, depth: at least 1, got {vocabulary}, {context} and {depth}")
        self.context = context
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(context, dim)
        self.layers = LayerStack([CRATELayer(dim, heads, causal=True, **options) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    @classmethod
    def preset(cls, name: str, *, vocabulary: int = 50_257, context: int = 1024, **options: Any) -> CRATELanguageModel:
        """A published size, by name."""
        return cls(vocabulary, context, *_size(name), **options)

    def forward(self, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        """Logits."""
        if ids.shape[1] > self.context:
            raise ValueError(f"ids: at most {self.context} tokens, got {ids.shape[1]}")
        place = self.position(torch.arange(ids.shape[1], device=ids.device))
        return F.linear(self.norm(self.layers(self.token(ids) + place)), self.token.weight)

    def loss(self, ids: Int[Tensor, "n t"], mask: Bool[Tensor, "n t"] | None = None) -> Float[Tensor, ""]:
        """Mean cross entropy of every token but the first, nats; mask: False for padding, which follows the tokens.

        Raises ValueError for padding before a token, which would be looked at, and where nothing is predicted.
        """
        logits, following = self(ids[:, :-1]), ids[:, 1:]
        if mask is None:
            return F.cross_entropy(logits.flatten(0, 1), following.flatten())
        if mask.shape != ids.shape or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError(f"mask: expected shape {tuple(ids.shape)} with padding behind the tokens alone")
        predicted = mask[:, 1:]
        if not bool(predicted.any()):
            raise ValueError("mask: no sequence has two tokens, so nothing is predicted")
        return F.cross_entropy(logits[predicted], following[predicted])

    def subspaces(self) -> list[Subspace]:
        """The heads' subspaces, one batch (heads, d, p) a layer."""
        return self.layers.subspaces()


_PART = r"(weight|bias)"


def _layers(theirs: str, ours: str) -> dict[str, Callable[[re.Match[str]], str]]:
    """Rules for a stack of encoder layers, named up to the layer's number there and here."""
    return {
        rf"{theirs}0\.norm\.{_PART}": lambda m: f"{ours}.{m[1]}.compress_norm.{m[2]}",
        rf"{theirs}0\.fn\.qkv\.weight": lambda m: f"{ours}.{m[1]}.compress.subspace_map.weight",
        rf"{theirs}0\.fn\.to_out\.0\.{_PART}": lambda m: f"{ours}.{m[1]}.compress.output.0.{m[2]}",
        rf"{theirs}1\.norm\.{_PART}": lambda m: f"{ours}.{m[1]}.sparsify_norm.{m[2]}",
        rf"{theirs}1\.fn\.weight": lambda m: f"{ours}.{m[1]}.sparsify.dictionary",
    }


_CLASSIFIER = {
    rf"to_patch_embedding\.([123])\.{_PART}": lambda m: f"embed.{int(m[1]) - 1}.{m[2]}",
    r"pos_embedding": lambda m: "position",
    r"cls_token": lambda m: "class_token",
    **_layers(r"transformer\.layers\.(\d+)\.", "layers"),
    rf"mlp_head\.([01])\.{_PART}": lambda m: f"head.{m[1]}.{m[2]}",
}
_AUTOENCODER = {
    rf"patch_embed\.proj\.{_PART}": lambda m: f"embed.{m[1]}",
    r"decoder_pos_embed": lambda m: "position",
    r"(cls|mask)_token": lambda m: "class_token" if m[1] == "cls" else "mask_token",
    **_layers(r"blocks\.(\d+)\.layers\.0\.", "encoder"),
    rf"decoder_blocks\.(\d+)\.layers\.0\.0\.norm\.{_PART}": lambda m: f"decoder.{m[1]}.expand_norm.{m[2]}",
    r"decoder_blocks\.(\d+)\.layers\.0\.0\.fn\.weight": lambda m: f"decoder.{m[1]}.expand.weight",
    rf"decoder_blocks\.(\d+)\.layers\.0\.1\.norm\.{_PART}": lambda m: f"decoder.{m[1]}.decompress_norm.{m[2]}",
    r"decoder_blocks\.(\d+)\.layers\.0\.1\.fn\.qkv\.weight": lambda m: f"decoder.{m[1]}.decompress.subspace_map.weight",
    rf"decoder_blocks\.(\d+)\.layers\.0\.1\.fn\.to_out\.0\.{_PART}": lambda m: (
        f"decoder.{m[1]}.decompress.output.0.{m[2]}"
    ),
    rf"norm\.{_PART}": lambda m: f"encoder_norm.{m[1]}",
    rf"decoder_norm\.{_PART}": lambda m: f"decoder_norm.{m[1]}",
    rf"decoder_pred\.{_PART}": lambda m: f"output.{m[1]}",
}
# In the released autoencoder's files, and used by nothing there.
_UNUSED = ("pos_embed", "decoder_embed.weight", "decoder_embed.bias")
# Pixels of a patch are (row, column, channel) there, (channel, row, column) here.
_PIXELS = ("embed.0.weight", "embed.0.bias", "embed.1.weight")


def load_published(model: CRATE | CRATEAutoencoder, state: Mapping[str, Tensor]) -> None:
    """Load weights in the layout of the authors' code (Ma-Lab-Berkeley/CRATE) into a model of the same size.

    Parameters
    ----------
    model
        The model that is filled.
    state
        Their `state_dict`; a prefix "module." is taken off. Positions must be of the model's image size.

    Raises
    ------
    ValueError
        Lists missing and unexpected keys and wrong shapes; then nothing is loaded.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import CRATE, load_published
    >>> model = CRATE(image_size=8, patch_size=4, num_classes=10, dim=16, heads=2, depth=2)
    >>> load_published(model, {"module.cls_token": torch.zeros(1, 1, 16)})
    Traceback (most recent call last):
    ValueError: state: not of this model; missing: position, ...
    """
    classifies = isinstance(model, CRATE)
    rules = _CLASSIFIER if classifies else _AUTOENCODER
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    unexpected = []
    for key, value in state.items():
        bare = key.removeprefix("module.")
        if not classifies and bare in _UNUSED:
            continue
        matched = ((re.fullmatch(pattern, bare), name) for pattern, name in rules.items())
        target = next((name(match) for match, name in matched if match), None)
        if target is None or target not in own:
            unexpected.append(key)
        else:
            found[target] = value
    missing = [key for key in own if key not in found]
    if missing or unexpected:
        raise ValueError(
            f"state: not of this model; missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(unexpected) or 'none'}"
        )
    p, c = model.patch_size, model.channels
    for key, value in found.items():
        if classifies and key in _PIXELS:
            value = value.unflatten(-1, (p, p, c)).movedim(-1, -3).flatten(-3)
        elif not classifies and key.startswith("output."):
            value = value.unflatten(0, (p, p, c)).movedim(2, 0).flatten(0, 2)
        elif not classifies and (key == "embed.weight" or key in ("position", "mask_token", "class_token")):
            value = value.flatten(1) if key == "embed.weight" else value.reshape(own[key].shape)
        if value.shape != own[key].shape:
            raise ValueError(f"state: {key} has shape {tuple(value.shape)}, the model's {tuple(own[key].shape)}")
        found[key] = value
    model.load_state_dict(found)
