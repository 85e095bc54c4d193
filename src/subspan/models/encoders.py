"""One vector a text or an image, from a frozen encoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import require
from subspan.base.modules import evaluation

from .capture import call_model, iterate_representations, to_device_of
from .layers import first_tensor
from .preprocessing import ImagePreprocessing
from .sentence_folders import SentenceFolder, TokenPool, pool_tokens, read_sentence_folder

SentencePool = TokenPool | Literal["projection"]
_POOLS = (*get_args(TokenPool), "projection")
_LAYER_POOLS = ("mean", "last", "first")
_BATCHES_SORTED_TOGETHER = 16


class SentenceEncoder:
    """Texts → sentence embeddings: masked pooling of the last hidden states, then L2 normalisation.

    What a folder of sentence-transformers says of pooling, length, prompts, layers and normalisation holds where it is
    not given here. Elsewhere it is the mean, 256 tokens, and unit length. `encode` gives all rows, `iterate` a stream.

    Parameters
    ----------
    model
        A transformers encoder, or the folder it is saved in.
    tokenizer
        Needed beside a loaded model; of a folder it is read from there.
    max_length
        In tokens.
    pool
        "mean", "last", "first", "max", "sqrt-mean" (the sum over the root of the count) or "weighted-mean" (by place)
        over the tokens of the text, or several of them joined; "projection" for the text tower of a model with
        `get_text_features` (CLIP and kin).
    layer
        Take this layer's output (see `layer_names`) and stop there, without the folder's own layers.
    normalize
        Scale to unit length.
    prompt
        Name of a prompt of the folder, for every text.
    device
        To move the model to.

    Raises
    ------
    ValueError
        For values that do not fit together, and, by name, for what a folder asks for and is not carried out.

    Examples
    --------
    >>> from subspan.datasets import load_sentence_encoder
    >>> from subspan.models import SentenceEncoder
    >>> encoder = SentenceEncoder(*load_sentence_encoder("minilm"))  # doctest: +SKIP
    >>> encoder.encode(["A cat sat.", "A dog ran."]).shape  # doctest: +SKIP
    (2, 384)
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        pool: SentencePool | Sequence[TokenPool] | None = None,
        layer: str | int | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("tokenizer: needed beside a loaded model")
            said = SentenceFolder(Path())
            self.model: Any = model
            self.tokenizer = tokenizer
        else:
            said = read_sentence_folder(Path(model))
            transformer = Path(model) if said is None else said.transformer
            self.model, self.tokenizer = _saved_encoder(transformer, tokenizer)
            if said is not None and said.max_length is None:
                own = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
                max_length = max_length or min(own, self.tokenizer.model_max_length)
            said = said or SentenceFolder(transformer)
        pools: tuple[Any, ...] = said.pools if pool is None else (pool,) if isinstance(pool, str) else tuple(pool)
        unknown = [name for name in pools if name not in _POOLS or (name == "projection" and len(pools) > 1)]
        if unknown or not pools:
            raise ValueError(f"pool: one of {', '.join(_POOLS)}, or several but the last, got {pool!r}")
        if pools == ("projection",) and layer is not None:
            raise ValueError("layer: a projection is taken from the whole model, not from a layer")
        if layer is not None and not (len(pools) == 1 and set(pools) <= set(_LAYER_POOLS)):
            raise ValueError(f"pool: of a layer one of {', '.join(_LAYER_POOLS)}, got {', '.join(pools)}")
        self.head = said.head
        if device is not None:
            self.model.to(device)
            self.head.to(device)
        self.max_length = max_length or said.max_length or 256
        self.pool: Any = pools[0] if len(pools) == 1 else pools
        self.layer = layer
        self.normalize = said.normalize if normalize is None else normalize
        self.prompts = dict(said.prompts)
        self.prompt = said.prompt
        if prompt is not None:
            self._prefix(prompt)
            self.prompt = prompt
        self._said = said

    def encode(
        self, texts: Iterable[str], batch_size: int = 64, *, prompt: str | None = None, progress: bool = False
    ) -> Float[np.ndarray, "n d"]:
        """Embeddings, one row a text in the order given. TypeError for an entry that is no str, ValueError for none.

        prompt: the name of one of `prompts`, or "" for none; where None, `self.prompt`.
        """
        return _stacked(self.iterate(texts, batch_size, prompt=prompt), texts, "texts", progress)

    def iterate(
        self, texts: Iterable[str], batch_size: int = 64, *, prompt: str | None = None
    ) -> Iterator[Float[np.ndarray, "b d"]]:
        """The same as a stream of blocks. Texts of similar length share a batch, so that little is spent on padding."""
        prefix = self._prefix(self.prompt if prompt is None else prompt)
        for start, block in _blocks(texts, batch_size * _BATCHES_SORTED_TOGETHER, "texts"):
            for offset, text in enumerate(block):
                if not isinstance(text, str):
                    raise TypeError(f"texts: entry {start + offset} is {type(text).__name__}, a str is needed")
            order = sorted(range(len(block)), key=lambda index: -len(block[index]))
            rows = [
                self._embed([block[index] for index in order[first : first + batch_size]], prefix)
                for first in range(0, len(block), batch_size)
            ]
            sorted_rows = torch.cat(rows).cpu()
            restored = torch.empty_like(sorted_rows)
            restored[torch.as_tensor(order)] = sorted_rows
            yield restored.numpy()

    def _prefix(self, prompt: str | None) -> str:
        """What the prompt of this name puts before a text."""
        if not prompt:
            return ""
        if prompt not in self.prompts:
            raise ValueError(f"prompt: one of {', '.join(self.prompts) or 'none (the model has none)'}, got {prompt!r}")
        return self.prompts[prompt]

    def _embed(self, texts: list[str], prefix: str) -> Tensor:
        given = [prefix + text for text in texts] if prefix else texts
        if self._said.lower_case:
            given = [text.lower() for text in given]
        batch = dict(
            self.tokenizer(given, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        )
        if self.pool == "projection":
            with torch.no_grad(), evaluation(self.model):
                vectors = _pooled_output(self.model.get_text_features(**to_device_of(self.model, batch)))
        elif self.layer is not None:
            vectors = next(iterate_representations(self.model, [batch], self.layer, pool=self.pool))
        else:
            with torch.no_grad(), evaluation(self.model):
                batch = to_device_of(self.model, batch)
                output = self.model(**batch)
                states = getattr(output, "last_hidden_state", None)
                states = first_tensor(output) if states is None else states
                vectors = self._pooled(states, self._pooling_mask(batch["attention_mask"], prefix))
        vectors = vectors.float()
        if self.layer is None:
            with torch.no_grad():
                vectors = self.head(vectors)
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        pools: tuple[Any, ...] = (self.pool,) if isinstance(self.pool, str) else self.pool
        return torch.cat([pool_tokens(states, mask, pool) for pool in pools], dim=-1)

    def _pooling_mask(self, mask: Tensor, prefix: str) -> Tensor:
        """The tokens that are pooled: all of a text, without the prompt where the folder leaves it out."""
        if not (prefix and self._said.skip_prompt):
            return mask
        tokens = self.tokenizer(prefix)["input_ids"]
        count = len(tokens) - (tokens[-1] in self.tokenizer.all_special_ids)
        return mask * (mask.cumsum(1) > count)


class ImageEncoder:
    """Images → one vector each, from a frozen vision network; `encode` gives all rows, `iterate` a stream.

    Parameters
    ----------
    model
        Any torch module.
    preprocessing
        An `ImagePreprocessing`, or any function image → tensor (3, h, w).
    layer
        Whose output is taken, averaged over positions or patches (see `layer_names`; the pass stops there). None: the
        image tower's projection where the model has `get_image_features` (CLIP and kin), else the model's pooled
        output.
    drop_tokens
        Leading tokens that are no patches.
    normalize
        Scale to unit length.
    forward
        `forward(model, batch)`, how to call the model otherwise; it gives (b, d) where `layer` is None.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from subspan.models import ImageEncoder, ImagePreprocessing
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    >>> encoder = ImageEncoder(model, ImagePreprocessing(4))
    >>> encoder.encode([np.zeros((8, 8), np.uint8)] * 3).shape
    (3, 5)
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: ImagePreprocessing | Callable[[Any], Tensor],
        *,
        layer: str | int | None = None,
        drop_tokens: int = 0,
        normalize: bool = False,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        self.model: Any = model
        self.preprocessing = preprocessing
        self.layer = layer
        self.drop_tokens = drop_tokens
        self.normalize = normalize
        self.forward = forward

    def encode(
        self, images: Iterable[Any], batch_size: int = 32, *, progress: bool = False
    ) -> Float[np.ndarray, "n d"]:
        """Vectors, one row an image in the order given. Raises ValueError for no images."""
        return _stacked(self.iterate(images, batch_size), images, "images", progress)

    def iterate(self, images: Iterable[Any], batch_size: int = 32) -> Iterator[Float[np.ndarray, "b d"]]:
        """The same as a stream of blocks."""
        for _, block in _blocks(images, batch_size, "images"):
            batch = torch.stack([self.preprocessing(image) for image in block])
            vectors = self._embed(batch).float()
            yield (F.normalize(vectors, dim=-1) if self.normalize else vectors).cpu().numpy()

    def _embed(self, batch: Tensor) -> Tensor:
        if self.layer is not None:
            layer, drop = self.layer, self.drop_tokens
            return next(iterate_representations(self.model, [batch], layer, drop_tokens=drop, forward=self.forward))
        with torch.no_grad(), evaluation(self.model):
            batch = to_device_of(self.model, batch)
            if self.forward is None and hasattr(self.model, "get_image_features"):
                return _pooled_output(self.model.get_image_features(pixel_values=batch))
            vectors = _pooled_output((self.forward or call_model)(self.model, batch))
        if vectors.ndim != 2:
            raise ValueError(f"layer: the model gives {tuple(vectors.shape)}, not one vector an image; name a layer")
        return vectors


def _saved_encoder(folder: Path, tokenizer: Any) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder that transformers saved."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {str(folder)!r} holds no saved transformers model (no config.json)")
    transformers = require("transformers", extra="text")
    # Said, so that code in the folder is refused and never asked about.
    options = {"local_files_only": True, "trust_remote_code": False}
    model = transformers.AutoModel.from_pretrained(str(folder), dtype=torch.float32, **options)
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    return model, tokenizer or transformers.AutoTokenizer.from_pretrained(str(folder), **options)


def _pooled_output(output: Any) -> Tensor:
    """(b, d) from what a tower returns: a tensor, or a transformers output's pooled entry."""
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        value = output.get(name) if isinstance(output, dict) else None
        if isinstance(value, Tensor):
            return value.flatten(1)
    return first_tensor(output)


def _blocks(items: Iterable[Any], size: int, name: str) -> Iterator[tuple[int, list[Any]]]:
    """(index of its first entry, entries) of successive blocks."""
    if isinstance(items, str | bytes):
        raise TypeError(f"{name}: an iterable of entries is needed, got a single {type(items).__name__}")
    if size < 1:
        raise ValueError(f"batch_size: at least 1, got {size}")
    stream = iter(items)
    for start in range(0, 1 << 62, size):
        block = list(islice(stream, size))
        if not block:
            return
        yield start, block


def _stacked(blocks: Iterator[np.ndarray], items: Any, name: str, progress: bool) -> np.ndarray:
    first = next(blocks, None)
    if first is None:
        raise ValueError(f"{name}: at least one entry is needed, got none")
    total = -(-len(items) // len(first)) if hasattr(items, "__len__") else None
    every = chain([first], blocks)
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    shown = track(every, f"encoding {name}", total=total, console=console, transient=True, disable=hidden)
    return np.concatenate(list(shown))
