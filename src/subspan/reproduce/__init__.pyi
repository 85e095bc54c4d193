from .protocol import Check, Outcome, Progress, System, Table
from .runner import SYSTEMS, find, listing, recorded, run

__all__ = ["Check", "Outcome", "Progress", "SYSTEMS", "System", "Table", "find", "listing", "recorded", "run"]
