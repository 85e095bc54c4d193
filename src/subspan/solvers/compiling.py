"""How the loops of this room are compiled by numba (extra `fast`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as machine code, kept for the next process where a folder can be written to."""
    # Sums may be reordered, as vectors need; NaN and infinities keep their meaning.
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:
        # No folder to keep the compiled code in.
        return njit(function, **options)
