"""Maps between representation spaces: one modality onto another, one encoder onto another."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from subspan.align.comparators import C3, BlockwiseCovariance, MeanShift
from subspan.align.modality import ModalityMap, ProjectedAffine
from subspan.align.modality_gap import ModalityGap, cosine_divergence, mixing_rate
from subspan.align.realign import ReAlign
from subspan.align.space_map import SpaceMap
from subspan.align.stationary_simplex import (
    BalancedBatches,
    CompatibleCE,
    HOCLoss,
    Rehearsal,
    SimplexClassifier,
    make_stationary,
)

if TYPE_CHECKING:
    from subspan.align.revision import ReVision, RevisionCollator
    from subspan.align.stationary_module import StationaryModule

__all__ = [
    "BalancedBatches",
    "BlockwiseCovariance",
    "C3",
    "CompatibleCE",
    "HOCLoss",
    "MeanShift",
    "ModalityGap",
    "ModalityMap",
    "ProjectedAffine",
    "ReAlign",
    "ReVision",
    "Rehearsal",
    "RevisionCollator",
    "SimplexClassifier",
    "SpaceMap",
    "StationaryModule",
    "cosine_divergence",
    "make_stationary",
    "mixing_rate",
]


# Lightning modules; Lightning (extra: train) is imported when the first of them is asked for.
_LAZY = {"ReVision": "revision", "RevisionCollator": "revision", "StationaryModule": "stationary_module"}


def __getattr__(name: str) -> Any:
    """The Lightning modules of the room."""
    if name in _LAZY:
        return getattr(import_module(f"subspan.align.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
