"""What each layer of a transformer does to the coding rate and the sparsity of its tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.modules import evaluation
from subspan.geometry import coding_rate
from subspan.models import Capture, layer_names
from subspan.models.layers import Layers
from subspan.nn import CRATELayer


class LayerRate(NamedTuple):
    """Of one layer, means over sequences.

    Attributes
    ----------
    layer
        Its name.
    compression
        R^c of its heads' unit tokens (nats).
    zeros
        Share of zeros it puts out; None where nothing sparse was named.
    stability
        η σ_max(D)² of a CRATE layer, below 2 where its steps converge; else None.
    """

    layer: str
    compression: float
    zeros: float | None = None
    stability: float | None = None


def rate_profile(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Layers | None = None,
    *,
    heads: int | None = None,
    fused: bool = False,
    sparse: Layers | None = None,
    drop_tokens: int = 0,
    epsilon: float = 0.1,
) -> list[LayerRate]:
    """R^c and sparsity, layer by layer: Σ over heads of ½ logdet(I + p/(n ε²) W'W) of the tokens W at unit length.

    A token of length 0 stays 0, with a warning.

    Parameters
    ----------
    model
        A network with CRATE layers, or any transformer.
    batches
        As for `models.capture`; padding ("attention_mask") is left out.
    layers
        None: the CRATE layers of the model; W = LN(z) U_k, and the zeros of their outputs. Of other transformers: the
        modules that put out the values (b, n, heads · p).
    heads
        Their number, where `layers` is given.
    fused
        The modules put out query, key and value side by side; the last third is taken.
    sparse
        As many modules as layers, those whose zeros are counted.
    drop_tokens
        Tokens at the front that do not count (a class token does, as published).
    epsilon
        Precision ε; 0.1, as published.

    Returns
    -------
    list of LayerRate

    Raises
    ------
    ValueError
        For no batch, layers without `heads`, or a width that they do not divide.

    References
    ----------
    Yu et al. (2023), arXiv 2311.13110.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import rate_profile
    >>> (found,) = rate_profile(torch.nn.Sequential(torch.nn.Linear(4, 6)), [torch.randn(2, 7, 4)], "0", heads=2)
    >>> found.layer, found.compression > 0, found.zeros
    ('0', True, None)
    """
    if drop_tokens < 0:
        raise ValueError(f"drop_tokens: a count of 0 or more, got {drop_tokens}")
    own: dict[str, CRATELayer] = {}
    if layers is None:
        own = {name: part for name, part in model.named_modules() if isinstance(part, CRATELayer)}
        if not own:
            raise ValueError(f"layers: {type(model).__name__} has no CRATE layers; name those with the heads' values")
        sites, outputs = [f"{name}.compress_norm" if name else "compress_norm" for name in own], list(own)
        shown = list(own)
    else:
        if heads is None or heads < 1:
            raise ValueError(f"heads: their number is needed to cut the layers' outputs, got {heads}")
        sites = shown = layer_names(model, layers)
        outputs = [] if sparse is None else layer_names(model, sparse)
        if outputs and len(outputs) != len(sites):
            raise ValueError(f"sparse: expected {len(sites)} modules, one a layer, got {len(outputs)}")
    rates, zeros = torch.zeros(len(sites), dtype=torch.float64), torch.zeros(len(sites), dtype=torch.float64)
    count, silent = 0, False
    with torch.no_grad(), evaluation(model), Capture(model, [*dict.fromkeys([*sites, *outputs])]) as states:
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            states.run(batch, early_exit=False)
            size = 0
            for index, (site, name) in enumerate(zip(sites, shown)):
                values = states.by_sample(site)
                if name in own:
                    w = own[name].compress.coordinates(values)
                else:
                    w = _cut(values, name, heads or 1, fused)
                kept = _kept(w, mask, drop_tokens)
                w = w.float() * kept[:, None, :, None]
                length = torch.linalg.vector_norm(w, dim=-1)
                silent |= bool(((length == 0) & kept[:, None]).any())
                # Left-out rows are zero; the others are scaled so that the rate's 1/n counts the kept ones.
                scale = (w.shape[-2] / kept.sum(-1).clamp_min(1)).sqrt()[:, None, None, None]
                rates[index] += float(coding_rate(F.normalize(w, dim=-1) * scale, epsilon=epsilon).double().sum())
                if outputs:
                    put_out = states.by_sample(outputs[index])
                    share = (put_out == 0).float().mean(-1)
                    zeros[index] += float(((share * kept).sum(-1) / kept.sum(-1).clamp_min(1)).double().sum())
                size = len(values)
            count += size
    if not count:
        raise ValueError("batches: at least one batch is needed")
    if silent:
        warnings.warn("some tokens have length 0 in a head; they were left at 0", stacklevel=2)
    return [
        LayerRate(
            name,
            float(rates[index]) / count,
            float(zeros[index]) / count if outputs else None,
            own[name].sparsify.stability if name in own else None,
        )
        for index, name in enumerate(shown)
    ]


def _cut(values: Tensor, name: str, heads: int, fused: bool) -> Float[Tensor, "b k n p"]:
    parts = heads * (3 if fused else 1)
    if values.ndim != 3 or values.shape[-1] % parts:
        raise ValueError(f"layers: {name!r} puts out {tuple(values.shape)}, not (b, n, w) with w divided by {parts}")
    if fused:
        values = values.chunk(3, -1)[2]
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def _kept(w: Tensor, mask: Any, drop_tokens: int) -> Bool[Tensor, "b n"]:
    kept = torch.ones(w.shape[0], w.shape[2], dtype=torch.bool, device=w.device)
    if mask is not None:
        kept &= mask.to(w.device) != 0
    return kept & (kept.cumsum(1) > drop_tokens)
