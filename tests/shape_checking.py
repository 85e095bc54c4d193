"""The run-time type checker of the tests: each call of the library is checked against its annotated shapes and dtypes.

jaxtyping's import hook decorates every function. Its own decorator prepares each of them at import, then binds and
checks the arguments twice at every call, which was more than half of what the tests did: this one prepares a function
when it is first called, and checks once.
"""

from __future__ import annotations

import builtins
import functools
import re
import types
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

# An int is accepted where a float is annotated, as type checkers do.
check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
# Within one call the names of dimensions mean the same size.
_ONE_CALL = jaxtyping.jaxtyped("context")


def install() -> None:
    """Check the functions and dataclasses of every module of `subspan` that is imported from here on."""
    own = jaxtyping.jaxtyped
    jaxtyping.jaxtyped = lambda *given, **options: own(*given, **options) if given else _checked
    jaxtyping.install_import_hook("subspan", "shape_checking.check")


def _checked(thing: Any) -> Any:
    if isinstance(thing, type):
        if is_dataclass(thing) and "__init__" in vars(thing) and not getattr(thing, "__no_type_check__", False):
            thing.__init__ = _checked(thing.__init__)
        return thing
    # A function inside another is made anew at each call, and preparing its check costs more than what it does.
    if "<locals>" in thing.__qualname__ or not thing.__annotations__:
        return thing
    hints = {name: hint if _is_known(hint, thing.__globals__) else Any for name, hint in thing.__annotations__.items()}
    inner: Callable[..., Any] | None = None

    @functools.wraps(thing)
    def outer(*args: Any, **kwargs: Any) -> Any:
        nonlocal inner
        if torch.compiler.is_compiling():
            return thing(*args, **kwargs)
        if inner is None:
            inner = check(_with_types(thing, hints))
        with _ONE_CALL:
            return inner(*args, **kwargs)

    return outer


def _is_known(hint: Any, names: dict[str, Any]) -> bool:
    """Whether all names of an annotation are defined above it, so that it is a type and not a promise of one."""
    words = re.findall(r"(?<![.\w])[A-Za-z_]\w*", re.sub(r"\"[^\"]*\"|'[^']*'", "", str(hint)))
    return not isinstance(hint, str) or all(word in names or hasattr(builtins, word) for word in words)


def _with_types(thing: Any, hints: dict[str, Any]) -> Any:
    """The same function with annotations that are types."""
    again = types.FunctionType(thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__, thing.__closure__)
    functools.update_wrapper(again, thing)
    del again.__wrapped__
    again.__kwdefaults__ = thing.__kwdefaults__
    again.__annotations__ = hints
    again.__annotations__ = get_type_hints(again, include_extras=True)
    return again
