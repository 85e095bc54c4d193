"""Sparse autoencoders of others: any three callables, and folders in sae-lens' format, which need nothing of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base import check_matrix
from subspan.base.reading import read_json
from subspan.models import StoredWeights

from .sparse_autoencoder import CONFIG, WEIGHTS

# Parameters that an architecture of sae-lens has beyond W_enc, W_dec and b_dec.
_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
_NORMALIZATIONS = ("none", "constant_norm_rescale", "layer_norm", "expected_average_only_in")
_LAYER_NORM = 1e-5


@runtime_checkable
class SAE(Protocol):
    """What is asked of a sparse autoencoder: codes of rows, rows of codes, and the direction of each atom.

    Attributes
    ----------
    decoder
        (c, d) atoms, of any length.

    Examples
    --------
    >>> from subspan.nn import SAE, SparseAutoencoder
    >>> def count(sae: SAE) -> int:
    ...     return len(sae.decoder)
    >>> count(SparseAutoencoder(8, 32, 4))
    32
    """

    @property
    def decoder(self) -> Tensor:
        """Atoms (c, d)."""
        ...

    def encode(self, x: Tensor, /) -> Tensor:
        """Codes (n, c) of rows (n, d)."""
        ...

    def decode(self, codes: Tensor, /) -> Tensor:
        """Rows (n, d) that codes (n, c) stand for."""
        ...


@dataclass(frozen=True, eq=False)
class SAEAdapter:
    """A sparse autoencoder of any library by the three things that are needed of it.

    Parameters
    ----------
    encode
        Of rows (n, d): codes (n, c).
    decode
        Of codes (n, c): rows (n, d).
    decoder
        (c, d) the direction of each atom.

    Raises
    ------
    ValueError
        For a decoder that is no finite matrix.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SAEAdapter
    >>> atoms = torch.cat([torch.eye(2), -torch.eye(2)])
    >>> sae = SAEAdapter(lambda x: (x @ atoms.T).relu(), lambda z: z @ atoms, atoms)
    >>> sae.decode(sae.encode(torch.tensor([[3.0, -2.0]]))).tolist()
    [[3.0, -2.0]]
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    decoder: Float[Tensor, "c d"]

    def __post_init__(self) -> None:
        check_matrix(self.decoder, "decoder")


class PublishedSAE(nn.Module):
    """A frozen sparse autoencoder as sae-lens saves it; `load_sae` makes it.

    Where rows are normalised one by one (`normalization`), atoms belong to rows so prepared: `prepare` gives them,
    `decode` gives rows of that kind, and calling the module puts their own size back.

    Parameters
    ----------
    weights
        W_enc (d, c), W_dec (c, d), b_dec (d,) and what the architecture has beside them.
    config
        Of cfg.json: architecture, k, apply_b_dec_to_input, normalize_activations, rescale_acts_by_decoder_norm.

    Attributes
    ----------
    decoder
        (c, d) atoms.

    Raises
    ------
    ValueError
        For an unknown architecture or normalisation, and weights that are missing or do not fit.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import PublishedSAE
    >>> weights = {"W_enc": torch.eye(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2), "b_enc": -torch.ones(2)}
    >>> PublishedSAE(weights, {"architecture": "standard"}).encode(torch.tensor([[3.0, 0.5]])).tolist()
    [[2.0, 0.0]]
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        super().__init__()
        self.architecture = str(config.get("architecture", "standard"))
        if self.architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(f"architecture: {self.architecture!r} is not one of {known}; use SAEAdapter for it")
        self.normalization = str(config.get("normalize_activations") or "none")
        if self.normalization not in _NORMALIZATIONS:
            raise ValueError(f"normalize_activations: expected one of {_NORMALIZATIONS}, got {self.normalization!r}")
        self.k = config.get("k")
        if self.architecture == "topk" and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"k: a topk autoencoder needs a number of 1 or more, got {self.k!r}")
        self.centred = bool(config.get("apply_b_dec_to_input", True))
        self.by_norm = bool(config.get("rescale_acts_by_decoder_norm", False))
        wanted = ("W_enc", "W_dec", "b_dec", *_ARCHITECTURES[self.architecture])
        if missing := [name for name in wanted if name not in weights]:
            raise ValueError(f"weights: {', '.join(missing)} missing for the architecture {self.architecture!r}")
        c, d = check_matrix(weights["W_dec"], "W_dec").shape
        shapes = {"W_enc": (d, c), "W_dec": (c, d), "b_dec": (d,)}
        for name in wanted:
            value, shape = weights[name].float(), shapes.get(name, (c,))
            if tuple(value.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name}: contains NaN or infinity")
            self.register_buffer(name, value)

    @property
    def decoder(self) -> Float[Tensor, "c d"]:
        """Atoms (c, d)."""
        return self.W_dec

    def prepare(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Rows as they are coded and rebuilt: each at length √d, or with mean 0 and variance 1, or as they are."""
        return self._normalized(x)[0]

    def encode(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Codes of rows. Raises ValueError for NaN and another width."""
        rows = self.prepare(x) - (self.b_dec if self.centred else 0)
        products = rows @ self.W_enc
        if self.architecture == "gated":
            gates = products + self.get_buffer("b_gate") > 0
            return gates * (products * self.get_buffer("r_mag").exp() + self.get_buffer("b_mag")).relu()
        products = products + self.get_buffer("b_enc")
        if self.architecture == "jumprelu":
            return products.relu() * (products > self.get_buffer("threshold"))
        if self.architecture == "standard":
            return products.relu()
        products = products * self._lengths() if self.by_norm else products
        values, places = products.topk(min(int(self.k or 1), products.shape[1]), dim=1)
        return torch.zeros_like(products).scatter_(1, places, values.relu())

    def decode(self, codes: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        """Rows, prepared ones where rows are normalised."""
        codes = codes / self._lengths() if self.by_norm and self.architecture == "topk" else codes
        return codes @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Rows rebuilt from their codes, in their own units."""
        _, center, scale = self._normalized(x)
        return self.decode(self.encode(x)) * scale + center

    def _lengths(self) -> Tensor:
        return torch.linalg.vector_norm(self.W_dec, dim=1)

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        rows = check_matrix(x, "x", columns=self.W_dec.shape[1]).to(self.W_dec)
        if self.normalization == "constant_norm_rescale":
            scale = rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5
            return rows / scale, 0.0, scale
        if self.normalization == "layer_norm":
            center = rows.mean(1, keepdim=True)
            scale = rows.std(1, keepdim=True)
            return (rows - center) / (scale + _LAYER_NORM), center, scale
        return rows, 0.0, 1.0


def load_sae(folder: str | os.PathLike[str], *, input_scale: float | None = None) -> PublishedSAE:
    """A sparse autoencoder from a folder that sae-lens (or `SparseAutoencoder.save`) wrote, without pickle.

    Parameters
    ----------
    folder
        With cfg.json and sae_weights.safetensors; configurations of older versions are understood.
    input_scale
        What rows are multiplied by, of an autoencoder with normalize_activations="expected_average_only_in", which
        does not keep it in its folder: √d over the mean length of the rows it was trained on.

    Returns
    -------
    PublishedSAE

    Raises
    ------
    ValueError
        For a folder without these files, transcoders and other architectures, shapes that do not fit the configuration,
        and a scale that is needed and not given.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SparseAutoencoder, load_sae
    >>> sae = SparseAutoencoder(8, 32, 4)
    >>> sae.save("sae")
    >>> x = torch.randn(5, 8)
    >>> torch.allclose(load_sae("sae").encode(x), sae.encode(x), atol=1e-5)
    True
    """
    source = Path(folder)
    if not (source / WEIGHTS).is_file() or not (source / CONFIG).is_file():
        others = sorted(path.name for path in source.glob("*")) if source.is_dir() else []
        pickled = [name for name in others if name.endswith((".pt", ".pth", ".bin", ".pkl", ".npz"))]
        found = f"{', '.join(pickled)} could run code, or needs its own reader" if pickled else f"it holds {others[:8]}"
        raise ValueError(f"folder: {CONFIG} and {WEIGHTS} are needed in {str(source)!r}; {found}")
    config = _modern(read_json(source / CONFIG, "folder"))
    stored = StoredWeights(source / WEIGHTS)
    weights = {name: stored[name].float() for name in stored}
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in weights:  # of the codes, kept beside the weights by older versions
            weights["W_dec"] = weights["W_dec"] * weights.pop(name).unsqueeze(1)
    if config.get("normalize_activations") == "expected_average_only_in":
        if input_scale is None or not input_scale > 0:
            raise ValueError(
                "input_scale: this autoencoder was trained on rows times a number that is not in its folder; give it "
                f"(√d over their mean length), got {input_scale}"
            )
        weights |= {"W_enc": weights["W_enc"] * input_scale}
        weights |= {name: weights[name] / input_scale for name in ("W_dec", "b_dec")}
    elif input_scale is not None:
        raise ValueError(f"input_scale: {config.get('normalize_activations')!r} rows need none, got {input_scale}")
    sae = PublishedSAE(weights, config)
    for name, size in (("d_in", sae.decoder.shape[1]), ("d_sae", len(sae.decoder))):
        if config.get(name, size) != size:
            raise ValueError(f"{name}: {CONFIG} says {config[name]!r}, the weights have {size}")
    return sae


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of an older version in the words of the present one."""
    found = {{"activation_fn_str": "activation_fn"}.get(name, name): value for name, value in config.items()}
    if isinstance(found.get("normalize_activations"), bool):
        found["normalize_activations"] = "expected_average_only_in" if found["normalize_activations"] else "none"
    options = found.get("activation_fn_kwargs")
    if found.get("activation_fn") == "topk" and isinstance(options, dict) and "k" in options:
        found |= {"architecture": "topk", "k": options["k"]}
    return found
