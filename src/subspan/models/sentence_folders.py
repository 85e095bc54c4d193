"""What a folder of sentence-transformers says beside its weights: pooling, length, prompts, and layers on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.reading import parse_json, quoted, read_json, reading, regular_file

from .capture import pool_states

TokenPool = Literal["mean", "last", "first", "max", "sqrt-mean", "weighted-mean"]

# In the order in which several are joined.
_POOLS: dict[str, TokenPool] = {
    "cls_token": "first",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "sqrt-mean",
    "weightedmean_tokens": "weighted-mean",
    "lasttoken": "last",
}
_ACTIVATIONS = {kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU)}
_TRANSFORMER_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


class _Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


@dataclass(frozen=True)
class SentenceFolder:
    """Where the transformer lies, and how its token states become a sentence's vector.

    pools: joined in this order. max_length: None where the folder does not say. head: layers on the pooled vector.
    prompts: texts that are put before others, by name; prompt: the one that is, where none is asked for. skip_prompt:
    whether its tokens are left out of the pooling.
    """

    transformer: Path
    pools: tuple[TokenPool, ...] = ("mean",)
    max_length: int | None = None
    lower_case: bool = False
    normalize: bool = True
    head: nn.Sequential = field(default_factory=nn.Sequential)
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    skip_prompt: bool = False


def read_sentence_folder(folder: Path) -> SentenceFolder | None:
    """What modules.json and the files that it names say; None for a folder of transformers alone.

    Raises ValueError, by name, for modules and settings that are not carried out here.
    """
    index = folder / "modules.json"
    if not index.is_file():
        return None
    with reading(index, "model"):
        modules = parse_json(regular_file(index).read_bytes(), f"model: {str(index)!r}")
        steps = [(str(module["type"]), folder / str(module["path"])) for module in modules]
    kinds = [kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind for kind, _ in steps]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise ValueError(
            f"model: {str(index)!r} starts with the modules {', '.join(kinds[:2]) or 'none'}; "
            "Transformer and Pooling are needed"
        )
    transformer = steps[0][1]
    said = next((file for name in _TRANSFORMER_SETTINGS if (file := transformer / name).is_file()), None)
    settings = {} if said is None else read_json(said)
    task = settings.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise ValueError(f"model: {str(said)!r} asks for the task {quoted(task)}; only feature-extraction is read")
    pooling = read_json(steps[1][1] / "config.json")
    layers = [_layer(kind, path, index) for kind, (_, path) in zip(kinds[2:], steps[2:])]
    normalize = bool(layers) and isinstance(layers[-1], _Normalize)
    texts = folder / "config_sentence_transformers.json"
    words = read_json(texts) if texts.is_file() else {}
    prompts = {str(name): str(text) for name, text in (words.get("prompts") or {}).items()}
    prompt = words.get("default_prompt_name")
    if prompt is not None and prompt not in prompts:
        raise ValueError(f"model: {str(texts)!r} has no prompt {quoted(prompt)}, which it takes by default")
    length = settings.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(f"model: {str(said)!r} has the max_seq_length {quoted(length)}; a whole number is needed")
    return SentenceFolder(
        transformer,
        _pools(pooling, steps[1][1] / "config.json"),
        length,
        bool(settings.get("do_lower_case", False)),
        normalize,
        nn.Sequential(*layers[: len(layers) - normalize]),
        prompts,
        prompt,
        skip_prompt=pooling.get("include_prompt", True) is False,
    )


def pool_tokens(states: Tensor, mask: Tensor, pool: TokenPool) -> Tensor:
    """(b, d) of token states (b, t, d), of those that the mask selects.

    "max": the largest of each column; "sqrt-mean": the sum over the root of the count; "weighted-mean": by place.
    """
    if pool in ("mean", "last", "first"):
        return pool_states(states, mask, pool=pool)
    states = states.float()
    selected = mask.bool()[..., None]
    if pool == "max":
        return states.masked_fill(~selected, -torch.inf).amax(1)
    weights = mask.cumsum(1)[..., None] if pool == "weighted-mean" else torch.ones_like(mask)[..., None]
    weights = (weights * selected).to(states.dtype)
    total = weights.sum(1)
    return (states.masked_fill(~selected, 0) * weights).sum(1) / (total.sqrt() if pool == "sqrt-mean" else total)


def _pools(config: dict[str, Any], source: Path) -> tuple[TokenPool, ...]:
    """The ways of pooling that a Pooling module asks for."""
    named = config.get("pooling_mode")
    if named is not None:
        names = [named] if isinstance(named, str) else list(named)
        asked = [f"{name}_tokens" if f"{name}_tokens" in _POOLS else f"{name}_token" if name == "cls" else name
                 for name in names]  # fmt: skip
    else:
        flags = {"pooling_mode_mean_tokens": True, **config}
        asked = [name.removeprefix("pooling_mode_") for name, on in flags.items()
                 if name.startswith("pooling_mode_") and on]  # fmt: skip
    unknown = [name for name in asked if name not in _POOLS]
    if unknown or not asked:
        raise ValueError(
            f"model: {str(source)!r} asks for the pooling {', '.join(map(quoted, unknown)) or 'none'}; known are "
            f"{', '.join(_POOLS)}"
        )
    return tuple(pool for name, pool in _POOLS.items() if name in asked)


def _layer(kind: str, path: Path, index: Path) -> nn.Module:
    """One module after the pooling."""
    if kind == "Normalize":
        return _Normalize()
    if kind == "Dropout":
        return nn.Identity()
    if kind not in ("Dense", "LayerNorm"):
        raise ValueError(
            f"model: {str(index)!r} has the module {quoted(kind)}; only Dense, LayerNorm, Dropout and Normalize are "
            "carried out after the pooling"
        )
    config = read_json(path / "config.json")
    with reading(path, "model"):
        weights = path / "model.safetensors"
        stored: dict[str, Tensor] = (
            load_file(weights)
            if weights.is_file()
            else torch.load(regular_file(path / "pytorch_model.bin"), map_location="cpu", weights_only=True)
        )
        if kind == "LayerNorm":
            layer: nn.Module = nn.LayerNorm(int(config["dimension"]))
            layer.load_state_dict({name.removeprefix("norm."): value for name, value in stored.items()})
            return layer.eval()
        places = {config.get(f"module_{end}_name") or "sentence_embedding" for end in ("input", "output")}
        activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        name = activation.rpartition(".")[2]
        if places != {"sentence_embedding"} or name not in _ACTIVATIONS:
            asked = activation if name not in _ACTIVATIONS else f"a layer on {', '.join(sorted(places))}"
            raise ValueError(f"model: {str(path)!r} asks for {quoted(asked)}; known are {', '.join(_ACTIVATIONS)}, "
                             "on the sentence_embedding")  # fmt: skip
        linear = nn.Linear(int(config["in_features"]), int(config["out_features"]), bias=bool(config.get("bias", True)))
        linear.load_state_dict({name.removeprefix("linear."): value for name, value in stored.items()})
        return nn.Sequential(linear, _ACTIVATIONS[name]()).eval()
