"""The same model before it was trained: what is in its states without any learning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layers import find_blocks


def random_blocks(model: nn.Module, *, random_state: int = 0) -> nn.Module:
    """A model of the same configuration whose blocks are as before training; all outside of them is the model's.

    Embeddings are thus the trained ones: what a probe reads from the states beyond its score here, the blocks learnt.

    Parameters
    ----------
    model
        Of transformers; it is left as it is.
    random_state
        Seed of the weights.

    Returns
    -------
    Module in evaluation mode, on the model's device and in its type.

    Raises
    ------
    ValueError
        For a model without a configuration, and one in which the blocks are not found (see `find_blocks`).

    References
    ----------
    The control of Hernández López et al. (ASE 2022), arXiv 2206.11719.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from subspan.models import random_blocks
    >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    >>> model = BertModel(BertConfig(**sizes))
    >>> other = random_blocks(model, random_state=1)
    >>> words = (each.embeddings.word_embeddings.weight for each in (model, other))
    >>> torch.equal(*words), torch.equal(*(each.encoder.layer[0].output.dense.weight for each in (model, other)))
    (True, False)
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model: one of transformers is needed, which has a configuration; got {type(model).__name__}")
    blocks = f"{find_blocks(model)}."
    kind: Any = type(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_state)
        fresh: nn.Module = kind(config)
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith(blocks)}
    fresh.load_state_dict(kept, strict=False)
    some = next(model.parameters())
    return fresh.to(device=some.device, dtype=some.dtype).eval()
