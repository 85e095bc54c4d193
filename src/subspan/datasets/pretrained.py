"""The models of installed packages, loaded without a network."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspan.base import require

from .cache import entry_folder, whole_folder
from .packages import model_path, weight_package


def load_model(name: str) -> nn.Module:
    """A packaged model in evaluation mode, float32, on the CPU.

    Parameters
    ----------
    name
        One of `WEIGHT_PACKAGES`: a vision network, or a language model or sentence encoder of transformers.

    Returns
    -------
    Module; of transformers the model alone.

    Raises
    ------
    ModuleNotFoundError
        Where the weights are not installed, with the command that does it.

    Examples
    --------
    >>> from subspan.datasets import load_model
    >>> model = load_model("efficientnet-lite0")  # doctest: +SKIP
    """
    package = weight_package(name)
    if package.extra == "vision":
        return _load_efficientnet(name)
    return (load_sentence_encoder(name) if package.extra == "text" else load_language_model(name))[0]


def load_sentence_encoder(name: str = "minilm") -> tuple[Any, Any]:
    """A packaged sentence encoder of transformers and its tokenizer, ready for `subspan.models.SentenceEncoder`.

    Parameters
    ----------
    name
        One of `WEIGHT_PACKAGES`.

    Returns
    -------
    (model, tokenizer)

    Raises
    ------
    ValueError
        For a model that is no sentence encoder.
    ModuleNotFoundError
        Where the weights are not installed, with the command that does it.

    Examples
    --------
    >>> from subspan.datasets import load_sentence_encoder
    >>> from subspan.models import SentenceEncoder
    >>> encoder = SentenceEncoder(*load_sentence_encoder("minilm"))  # doctest: +SKIP
    """
    if weight_package(name).extra != "text":
        raise ValueError(f"model: {name} is not a sentence encoder")
    folder = str(model_path(name).parent)
    transformers = require("transformers", extra="text")
    with without_progress_bars(transformers):
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_language_model(
    name: str | os.PathLike[str] = "smollm2",
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    cache: bool = True,
) -> tuple[Any, Any]:
    """A packaged causal language model of transformers and its tokenizer, with ordinary, trainable, saveable weights.

    The package holds 4-bit weights whose conversion takes about 12 s. A converted float32 copy (0.5 GB) is kept in the
    cache folder, where several processes may ask for it at once.

    Parameters
    ----------
    name
        One of `WEIGHT_PACKAGES`, or a GGUF file.
    dtype
        Of the weights.
    attn_implementation
        As in transformers; "eager" is needed to see attention weights.
    cache
        False: convert each time.

    Returns
    -------
    (model, tokenizer)

    Raises
    ------
    ValueError
        For a model that is no language model, and a file that is not there.
    ModuleNotFoundError
        Where the weights are not installed, with the command that does it.

    Examples
    --------
    >>> from subspan.datasets import load_language_model
    >>> model, tokenizer = load_language_model("smollm2", attn_implementation="eager")  # doctest: +SKIP
    """
    weights, label = _language_weights(name)
    transformers = require("transformers", extra="llm")
    if not cache:
        with _bars_only_on_terminal():
            model, tokenizer = _converted_language_model(weights, transformers)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model.to(dtype).eval(), tokenizer
    folder = entry_folder("models", f"{label}-{weights.stat().st_size}")
    with whole_folder(folder) as unfinished, _bars_only_on_terminal():
        if unfinished is not None:
            model, tokenizer = _converted_language_model(weights, transformers)
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            del model
    options = {"local_files_only": True, "dtype": dtype, "attn_implementation": attn_implementation}
    with without_progress_bars(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _language_weights(name: str | os.PathLike[str]) -> tuple[Path, str]:
    """The GGUF file, and what a converted copy is called."""
    if (given := Path(name)).suffix == ".gguf":
        if not given.is_file():
            raise ValueError(f"name: there is no file {str(given)!r}")
        return given, given.stem
    package = weight_package(str(name))
    if package.extra != "llm":
        raise ValueError(f"model: {name} is not a language model")
    return model_path(package.name), f"{package.name}-{package.version}"


def _converted_language_model(weights: Path, transformers: Any) -> tuple[Any, Any]:
    """The GGUF model as a plain one: a copy without the quantisation mark, which forbids saving and training."""
    require("gguf", extra="llm")
    require("accelerate", extra="llm")
    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name, "local_files_only": True}
    marked = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = type(marked.config).from_dict(marked.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(marked)(config)
    model.load_state_dict(marked.state_dict())
    model.tie_weights()
    return model, transformers.AutoTokenizer.from_pretrained(**source)


def _bars_only_on_terminal() -> contextlib.AbstractContextManager[Any]:
    """The long conversion's bars have no switch: shown on a terminal, elsewhere swallowed with the rest of stderr."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


@contextlib.contextmanager
def without_progress_bars(transformers: Any) -> Iterator[None]:
    """Transformers without its bars for the block."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _load_efficientnet(name: str) -> nn.Module:
    weights = model_path(name)
    network = require("efficientnet_lite_pytorch", extra="vision").EfficientNet.from_name(name)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network._conv_stem.register_forward_pre_hook(_channels_last)
    return network.eval()


def _channels_last(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Images in a layout that later layers keep, on which convolutions are half as fast again on the CPU."""
    images = inputs[0]
    return (images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images), *inputs[1:]
