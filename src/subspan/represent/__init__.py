"""Representations with a structure of their own: nested prefixes, factors, blocks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from subspan.represent.cascade import MatryoshkaCascade
from subspan.represent.matryoshka import Matryoshka
from subspan.represent.nested_search import MatryoshkaIndex
from subspan.represent.truncation import Truncated, truncate

if TYPE_CHECKING:
    from subspan.represent.causal_grassmann import CausalGrassmannConfig, CausalGrassmannForCausalLM
    from subspan.represent.nested_training import NestedTraining

__all__ = [
    "CausalGrassmannConfig",
    "CausalGrassmannForCausalLM",
    "Matryoshka",
    "MatryoshkaCascade",
    "MatryoshkaIndex",
    "NestedTraining",
    "Truncated",
    "truncate",
]


# For transformers (extra: llm) and Lightning (extra: train), which are imported when the first of them is asked for.
_LAZY = {
    "CausalGrassmannConfig": "causal_grassmann",
    "CausalGrassmannForCausalLM": "causal_grassmann",
    "NestedTraining": "nested_training",
}


def __getattr__(name: str) -> Any:
    """The language model and the Lightning module of the room."""
    if name in _LAZY:
        return getattr(import_module(f"subspan.represent.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
