"""Optional dependencies, each named by the extra that brings it."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or raise an ImportError that names the extra which installs it.

    Parameters
    ----------
    module
        Dotted name.
    extra
        Of the package.

    Returns
    -------
    The module.

    Examples
    --------
    >>> from subspan.base import require
    >>> require("no_such_module", extra="fast")
    Traceback (most recent call last):
    ImportError: 'no_such_module' is needed here and is not installed; it comes with: pip install 'subspan[fast]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise ImportError(
            f"{missing!r} is needed here and is not installed; it comes with: pip install 'subspan[{extra}]'"
        ) from error
