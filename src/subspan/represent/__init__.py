"""Representations with a structure of their own: nested prefixes, factors, blocks."""

from typing import TYPE_CHECKING, Any

from subspan.represent.cascade import MatryoshkaCascade
from subspan.represent.matryoshka import Matryoshka
from subspan.represent.nested_search import MatryoshkaIndex
from subspan.represent.truncation import Truncated, truncate

if TYPE_CHECKING:
    from subspan.represent.nested_training import NestedTraining

__all__ = [
    "Matryoshka",
    "MatryoshkaCascade",
    "MatryoshkaIndex",
    "NestedTraining",
    "Truncated",
    "truncate",
]


def __getattr__(name: str) -> Any:
    """NestedTraining is a Lightning module; Lightning (extra: train) is imported when it is first asked for."""
    if name == "NestedTraining":
        from subspan.represent.nested_training import NestedTraining

        return NestedTraining
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
