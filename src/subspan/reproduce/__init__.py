"""One protocol a system: real data, baselines, the paper's claim, and a bar that can fail."""

from .protocol import Check, Outcome, Progress, System, Table
from .runner import SYSTEMS, find, listing, recorded, run

__all__ = ["SYSTEMS", "Check", "Outcome", "Progress", "System", "Table", "find", "listing", "recorded", "run"]
