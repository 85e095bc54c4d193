"""Where the figures of a command come from: its seed, its time, the versions that it ran with."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any


def origin(started: float, seed: int, *packages: str) -> dict[str, Any]:
    """What every page says of itself; `started` is of `time.perf_counter`, `packages` are named beside subspan."""
    return {
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 2),
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {name: version(name) for name in ("subspan", *packages)},
    }
