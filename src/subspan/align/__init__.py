"""Maps between representation spaces: one modality onto another, one encoder onto another."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from subspan.align.adapter import EmbeddingAdapter
from subspan.align.backfill import backfill_order
from subspan.align.bt2 import (
    BasisTransform,
    BT2Head,
    BT2Loss,
    TeacherDataset,
    old_class_means,
    teacher_features,
)
from subspan.align.comparators import C3, BlockwiseCovariance, MeanShift
from subspan.align.cross_modal import CrossModalReport, cross_modal_report, distance_correlation, relative_coordinates
from subspan.align.irepa import RepresentationAlignment, spatial_structure_of
from subspan.align.lambda_orthogonality import LambdaOrthogonalAdapter
from subspan.align.modality import ModalityMap, ProjectedAffine
from subspan.align.modality_gap import ModalityGap, cosine_divergence, mixing_rate
from subspan.align.plato_3d_text import SubspaceAligner
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
from subspan.align.unpaired import UnpairedReport
from subspan.align.upgrade import UpgradeMap

if TYPE_CHECKING:
    from subspan.align.bt2_training import BackwardCompatibleModule
    from subspan.align.revision import ReVision, RevisionCollator
    from subspan.align.stationary_module import StationaryModule

__all__ = [
    "C3",
    "BT2Head",
    "BT2Loss",
    "BackwardCompatibleModule",
    "BalancedBatches",
    "BasisTransform",
    "BlockwiseCovariance",
    "CompatibleCE",
    "CrossModalReport",
    "EmbeddingAdapter",
    "HOCLoss",
    "LambdaOrthogonalAdapter",
    "MeanShift",
    "ModalityGap",
    "ModalityMap",
    "ProjectedAffine",
    "ReAlign",
    "ReVision",
    "Rehearsal",
    "RepresentationAlignment",
    "RevisionCollator",
    "SimplexClassifier",
    "SpaceMap",
    "StationaryModule",
    "SubspaceAligner",
    "TeacherDataset",
    "UnpairedReport",
    "UpgradeMap",
    "backfill_order",
    "cosine_divergence",
    "cross_modal_report",
    "distance_correlation",
    "make_stationary",
    "mixing_rate",
    "old_class_means",
    "relative_coordinates",
    "spatial_structure_of",
    "teacher_features",
]

# Lightning modules; Lightning (extra: train) is imported when the first of them is asked for.
_LAZY = {
    "BackwardCompatibleModule": "bt2_training",
    "ReVision": "revision",
    "RevisionCollator": "revision",
    "StationaryModule": "stationary_module",
}


def __getattr__(name: str) -> Any:
    """The Lightning modules of the room."""
    if name in _LAZY:
        return getattr(import_module(f"subspan.align.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
