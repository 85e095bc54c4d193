"""Optional dependencies, each named by the extra that brings it."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or raise an ImportError that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise ImportError(
            f"{missing!r} is needed here and is not installed; it comes with: pip install 'subspan[{extra}]'"
        ) from error
