"""Grassmann mixing as a transformers language model: `Trainer`, `generate` and its files (extra: llm)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subspan.base import require
from subspan.nn import GrassmannLanguageModel, GrassmannMixing, MixingState
from subspan.nn.grassmann_mixing import OFFSETS

if TYPE_CHECKING:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        DynamicCache,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
else:
    _transformers = require("transformers", extra="llm")
    AutoConfig, AutoModelForCausalLM = _transformers.AutoConfig, _transformers.AutoModelForCausalLM
    DynamicCache, GenerationMixin = _transformers.DynamicCache, _transformers.GenerationMixin
    PreTrainedConfig, PreTrainedModel = _transformers.PreTrainedConfig, _transformers.PreTrainedModel
    CausalLMOutputWithPast = _transformers.modeling_outputs.CausalLMOutputWithPast

# transformers is changing the name of the cache, in calls and in outputs.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class CausalGrassmannConfig(PreTrainedConfig):
    """Sizes of a `CausalGrassmannForCausalLM`; by default the paper's six-layer model.

    Parameters
    ----------
    vocab_size, hidden_size, num_hidden_layers
        Tokens of the vocabulary, width, layers.
    rank, normalize, epsilon, output_projection
        Of `GrassmannMixing`.
    offsets
        Those of every layer, or one list a layer.
    max_position_embeddings
        The longest sequence.
    dropout
        Share of states that are dropped in training.
    pad_token_id, bos_token_id, eos_token_id
        Of the tokenizer, or None.
    **kwargs
        Of transformers' `PreTrainedConfig`.

    Raises
    ------
    ValueError
        For another number of lists of offsets than layers.

    References
    ----------
    Zhang Chong (2025), arXiv 2512.19428.

    Examples
    --------
    >>> from subspan.represent import CausalGrassmannConfig
    >>> CausalGrassmannConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, rank=4).num_hidden_layers
    2
    """

    model_type = "causal-grassmann"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 256,
        num_hidden_layers: int = 6,
        rank: int = 32,
        offsets: Sequence[int] | Sequence[Sequence[int]] = OFFSETS,
        max_position_embeddings: int = 128,
        dropout: float = 0.1,
        normalize: bool = True,
        epsilon: float = 1e-3,
        output_projection: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{**kwargs, "tie_word_embeddings": True})
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.rank = rank
        nested = [each for each in offsets if isinstance(each, list | tuple)]
        if nested and not len(nested) == len(offsets) == num_hidden_layers:
            raise ValueError(f"offsets: expected one list for each of {num_hidden_layers} layers, got {offsets}")
        lists: Any = nested or [offsets] * num_hidden_layers
        self.offsets: list[list[int]] = [list(each) for each in lists]
        self.max_position_embeddings = max_position_embeddings
        self.dropout = dropout
        self.normalize = normalize
        self.epsilon = epsilon
        self.output_projection = output_projection
        # What transformers' cache is to keep of each layer: the states that the largest offset reaches, and the next.
        self.layer_types = ["sliding_attention"] * num_hidden_layers
        self.sliding_window = 1 + max((each for layer in self.offsets for each in layer), default=0)


class CausalGrassmannForCausalLM(PreTrainedModel, GenerationMixin):
    """`GrassmannLanguageModel` for transformers: `Trainer`, `generate`, `from_pretrained`, `AutoModelForCausalLM`.

    Weights start as those of the torch model. The embedding is the output head. Decoding keeps the reduced states that
    the offsets reach in transformers' own `DynamicCache`, as keys of a sliding window with values of width 0.

    Parameters
    ----------
    config
        A `CausalGrassmannConfig`.

    References
    ----------
    Zhang Chong (2025), arXiv 2512.19428.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import CausalGrassmannConfig, CausalGrassmannForCausalLM
    >>> config = CausalGrassmannConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, rank=4)
    >>> model = CausalGrassmannForCausalLM(config).eval()
    >>> tuple(model(torch.arange(6)[None]).logits.shape)
    (1, 6, 50)
    """

    config_class = CausalGrassmannConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["GrassmannBlock"]

    def __init__(self, config: CausalGrassmannConfig) -> None:
        super().__init__(config)
        mixing = [
            GrassmannMixing(
                config.hidden_size,
                config.rank,
                offsets,
                normalize=config.normalize,
                epsilon=config.epsilon,
                output_projection=config.output_projection,
            )
            for offsets in config.offsets
        ]
        self.model = GrassmannLanguageModel(
            config.vocab_size,
            mixing,
            d_model=config.hidden_size,
            context=config.max_position_embeddings,
            dropout=config.dropout,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As the torch model begins; weights read from a file are left alone by transformers' guard of nn.init."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, GrassmannMixing):
            # Not in the file, and transformers builds a model that it reads without any values.
            pairs: Any = module.pairs
            pairs.copy_(torch.triu_indices(module.rank, module.rank, 1))

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.token

    def set_input_embeddings(self, value: Any) -> None:
        """Put another token embedding in its place, which is the output head too."""
        self.model.token = value

    def forward(
        self,
        input_ids: Int[Tensor, "n L"],
        attention_mask: Any = None,
        labels: Int[Tensor, "n L"] | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """CausalLMOutputWithPast: logits (n, L, vocabulary) and, with labels (n, L), the loss; -100 is left out.

        attention_mask (n, what the cache has seen + L), zero for padding. cache, or past_key_values in older releases:
        a `DynamicCache`; one is made for use_cache=True. logits_to_keep: of the last so many tokens, 0 for all.
        Raises ValueError for another mask or cache, and beyond max_position_embeddings.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"cache: a DynamicCache is needed, got {type(cache).__name__}")
        seen, length = (0 if cache is None else cache.get_seq_length()), input_ids.shape[1]
        mask = _checked_mask(attention_mask, (len(input_ids), seen + length), input_ids.device)
        states: Tensor = self.model.embed(input_ids, mask)
        blocks: Any = self.model.blocks
        for index, block in enumerate(blocks):
            past = None if cache is None else _remembered(cache, index, block.mixing.reduce(states), mask)
            states = block(states, mask[:, seen:], past)
        logits = self.model.logits(states[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        found: dict[str, Any] = {"loss": loss, "logits": logits, _CACHE: cache}
        output = CausalLMOutputWithPast(**found)
        return output.to_tuple() if return_dict is False else output


def _checked_mask(given: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    if given is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if tuple(given.shape) != shape:
        raise ValueError(f"attention_mask: expected shape {shape}, got {tuple(given.shape)}")
    return given != 0


def _remembered(cache: Any, layer: int, z: Float[Tensor, "n L r"], mask: Tensor) -> MixingState:
    """The reduced states that a layer's cache has from before; those of these tokens are added to it."""
    keys, _ = cache.update(z.unsqueeze(1), z.new_zeros(len(z), 1, z.shape[1], 0), layer)
    before = keys[:, 0, : keys.shape[2] - z.shape[1]]
    known = mask[:, : mask.shape[1] - z.shape[1]]
    return MixingState(before, known[:, known.shape[1] - before.shape[1] :])


AutoConfig.register(CausalGrassmannConfig.model_type, CausalGrassmannConfig, exist_ok=True)
AutoModelForCausalLM.register(CausalGrassmannConfig, CausalGrassmannForCausalLM, exist_ok=True)
