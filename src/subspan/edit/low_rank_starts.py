"""Factors that low-rank updates start from, beside ReGLU's: zero, confined, and weighed by importance."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.modules import evaluation
from subspan.geometry import Subspace
from subspan.models.capture import to_device_of
from subspan.models.layers import is_conv1d, linear_weight

from .unlearning_data import IGNORED

Factors = tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]
_FLOOR = 1e-5


def zero_factors(
    weight: Float[Tensor, "d_out d_in"],
    rank: int,
    *,
    outside: Subspace | None = None,
    generator: torch.Generator | None = None,
) -> Factors:
    """A (r, d_in) drawn at random and B (d_out, r) of zeros: the usual start of LoRA.

    Parameters
    ----------
    weight
        (d_out, d_in) of the layer.
    rank
        r.
    outside
        Subspace of the inputs that the rows of A are kept out of; None: of none. Updates whose A stays there change
        nothing for inputs in it.
    generator
        Of the draw.

    Returns
    -------
    (A, B)

    Raises
    ------
    ValueError
        Where fewer than r directions are outside.

    References
    ----------
    LoRA (arXiv 2106.09685); outside of what retained inputs span: NSRU (arXiv 2606.10989).

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import zero_factors
    >>> from subspan.geometry import Subspace
    >>> space = Subspace.span(torch.eye(6)[:, :2])
    >>> down, up = zero_factors(torch.randn(4, 6), 3, outside=space)
    >>> bool(down[:, :2].abs().max() < 1e-6), bool(up.any())
    (True, False)
    """
    d_out, d_in = weight.shape
    room = d_in - (0 if outside is None else outside.dim)
    if rank > room:
        raise ValueError(f"rank: {rank} is more than the {room} input directions outside of the subspace")
    down = torch.empty(rank, d_in)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    down = down.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return (down if outside is None else outside.to(down).residual(down)), down.new_zeros(d_out, rank)


def importance_factors(
    weight: Float[Tensor, "d_out d_in"],
    forget: Float[Tensor, "d_out d_in"],
    retain: Float[Tensor, "d_out d_in"],
    rank: int,
    *,
    scale: float = 1.0,
) -> Factors:
    """FILA: the low-rank part of a weight that matters to what is to be forgotten and not to the rest.

    With the root of the row sums of forget / retain as weights of the rows, the nearest matrix of rank r to the weighed
    weight, the weights taken off again, and divided by the scale of the update.

    Parameters
    ----------
    weight
        (d_out, d_in).
    forget, retain
        Mean squared gradients (d_out, d_in), as of `squared_gradients`.
    rank
        r.
    scale
        Of the update that starts here.

    Returns
    -------
    (A, B)

    References
    ----------
    Cha et al. (ICLR 2025), arXiv 2408.06621.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import importance_factors
    >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> down, up = importance_factors(weight, weight**2, torch.ones(3, 3), 1)
    >>> (up @ down).diagonal().round(decimals=3)
    tensor([3., 0., 0.])
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank: between 1 and {min(weight.shape)}, got {rank}")
    rows = (forget / (_FLOOR + retain)).sum(1).sqrt().to(wide).unsqueeze(-1)
    u, s, vh = torch.linalg.svd(rows * wide, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root / (rows + _FLOOR)


def squared_gradients(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], names: Sequence[str]
) -> dict[str, Float[Tensor, "d_out d_in"]]:
    """Mean squared gradient of the loss on answers by the weights of linear layers, batches weighed by their tokens.

    Parameters
    ----------
    model
        A causal model of transformers, or one that takes input_ids and attention_mask and gives logits (b, t, v).
    batches
        With input_ids, attention_mask and labels, -100 where a token does not count.
    names
        Of the layers; the same entries of two calls can be compared.

    Returns
    -------
    dict
        Name → (d_out, d_in); the model is left as it was.

    Raises
    ------
    ValueError
        Where there is no batch.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import squared_gradients
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))
    >>> model.forward = lambda input_ids, attention_mask: torch.nn.Sequential.forward(model, input_ids)
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    >>> squared_gradients(model, [batch], ["1"])["1"].shape
    torch.Size([5, 4])
    """
    layers = {name: model.get_submodule(name) for name in names}
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items() if linear_weight(layer)}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    tokens = 0
    try:
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad(), evaluation(model):
            for batch in batches:
                rows, labels, _ = answer_logits(model, batch)
                gradients = torch.autograd.grad(F.cross_entropy(rows, labels), list(weights.values()))
                for name, gradient in zip(weights, gradients):
                    total[name] += len(labels) * gradient.float().square()
                tokens += len(labels)
    finally:
        for parameter, before in trained.items():
            parameter.requires_grad_(before)
    if not tokens:
        raise ValueError("batches: at least one is needed")
    return {
        name: (value.mT if is_conv1d(layers[name]) else value).div(tokens).contiguous() for name, value in total.items()
    }


def answer_logits(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "n v"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Of the tokens that count: logits (n, v) in float32, labels (n,), and which text (n,) each is of.

    A model that takes `logits_to_keep`, as those of transformers do, is asked for the positions of answers alone: of a
    small model the head is most of the work.
    """
    found = to_device_of(model, dict(batch))
    labels = found["labels"][:, 1:]
    counted = labels != IGNORED
    places = counted.any(0).nonzero().flatten()
    inputs = {name: found[name] for name in ("input_ids", "attention_mask")}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given = model(**inputs, logits_to_keep=places)
        logits = getattr(given, "logits", given)
    else:
        given = model(**inputs)
        logits = getattr(given, "logits", given)[:, :-1][:, places]
    counted, labels = counted[:, places].to(logits.device), labels[:, places].to(logits.device)
    return logits[counted].float(), labels[counted], torch.nonzero(counted)[:, 0]
