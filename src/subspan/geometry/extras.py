"""Optional dependencies, each named by the extra that brings it."""

from ..base.extras import require

__all__ = ["require"]
