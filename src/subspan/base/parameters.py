"""Parameters of estimators, declared once: by the types of a dataclass's fields, against which `fit` checks them.

`n_clusters: Count = 8`, `metric: Literal["cosine", "inner"] = "cosine"`, `rate: Positive | None = None`. What a type
cannot say is a function in `Annotated`, which raises ValueError itself.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from typing import Annotated, Any, Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Numbers from `least`, or above `above`, to `most`, or below `below`; never NaN."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: Any) -> bool:
        strict = (self.above == -math.inf or value > self.above) and (self.below == math.inf or value < self.below)
        return bool(strict and self.least <= value <= self.most)

    def __str__(self) -> str:
        low, high = max(self.least, self.above), min(self.most, self.below)
        if low > -math.inf and high < math.inf:
            return f"in {'(' if self.above == low else '['}{low:g}, {high:g}{')' if self.below == high else ']'}"
        return f"{'>' if self.above == low else '>='} {low:g}" if low > -math.inf else f"<= {high:g}"


Count = Annotated[int, Bounds(least=1)]
Whole = Annotated[int, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
NonNegative = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, most=1)]
Seed = int | np.random.RandomState | None
"""What scikit-learn's `check_random_state` takes."""


def check_parameters(estimator: Any) -> None:
    """Raise ValueError for the first field whose value is not of its type, saying what would be right."""
    for name, kind in _declared(type(estimator)).items():
        check_value(name, getattr(estimator, name), kind)


def check_value(name: str, value: Any, kind: Any) -> None:
    """The same for one value, such as an argument of a method."""
    if not _is(value, kind):
        raise ValueError(f"{name}: expected {_words(kind)}, got {value!r}")


@functools.cache
def _declared(cls: type) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            kinds |= inspect.get_annotations(base, eval_str=True)
    return {field.name: kinds[field.name] for field in dataclasses.fields(cls)}


def _is(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _is(value, inner[0]) and all(_keeps(value, rule) for rule in inner[1:])
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and bool(value == one) for one in inner)
    if kind in (bool, int, float):
        wanted = {bool: bool | np.bool_, int: numbers.Integral, float: numbers.Real}[kind]
        return isinstance(value, wanted) and (kind is bool or not isinstance(value, bool)) and bool(value == value)
    if origin is collections.abc.Sequence:
        listed = hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str)
        # Entries of tensors are tensors, until they are listed.
        entries: Any = getattr(value, "tolist", lambda: value)() if listed else ()
        return listed and all(_is(one, inner[0]) for one in entries)
    if kind is Any:
        return True
    return callable(value) if origin is collections.abc.Callable else isinstance(value, origin or kind)


def _keeps(value: Any, rule: Any) -> bool:
    if isinstance(rule, Bounds):
        return value in rule
    rule(value)
    return True


def _words(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        bounds = [str(rule) for rule in inner[1:] if isinstance(rule, Bounds)]
        return " ".join([_words(inner[0]), *bounds])
    if origin in (typing.Union, types.UnionType, Literal):
        parts = [_words(one) if origin is not Literal else repr(one) for one in inner]
        return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
    if origin is collections.abc.Sequence:
        return f"a sequence, each {_words(inner[0])}"
    plain = {int: "an integer", float: "a number", bool: "True or False", str: "a name", types.NoneType: "None"}
    return plain.get(kind) or ("a function" if callable(kind) and origin else f"a {(origin or kind).__name__}")
