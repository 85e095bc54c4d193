from . import materials
from .protocol import Check, Outcome, Progress, System, Table
from .runner import SYSTEMS, find, listing, recorded, run
from .training import cosine, kept, one_cycle, shuffled, train
from .trials import Column, Trials, spread

__all__ = [
    "SYSTEMS",
    "Check",
    "Column",
    "Outcome",
    "Progress",
    "System",
    "Table",
    "Trials",
    "cosine",
    "find",
    "kept",
    "listing",
    "materials",
    "one_cycle",
    "recorded",
    "run",
    "shuffled",
    "spread",
    "train",
]
