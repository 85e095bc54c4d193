"""Maps between representation spaces: one modality onto another, one encoder onto another."""

from typing import TYPE_CHECKING, Any

from subspan.align.adapter import EmbeddingAdapter
from subspan.align.backfill import backfill_order
from subspan.align.comparators import C3, BlockwiseCovariance, MeanShift
from subspan.align.cross_modal import CrossModalReport, cross_modal_report, distance_correlation, relative_coordinates
from subspan.align.irepa import RepresentationAlignment, spatial_structure_of
from subspan.align.modality import ModalityMap, ProjectedAffine
from subspan.align.modality_gap import ModalityGap, cosine_divergence, mixing_rate
from subspan.align.plato_3d_text import SubspaceAligner
from subspan.align.realign import ReAlign
from subspan.align.space_map import SpaceMap
from subspan.align.unpaired import UnpairedReport
from subspan.align.upgrade import UpgradeMap

if TYPE_CHECKING:
    from subspan.align.revision import ReVision, RevisionCollator

__all__ = [
    "C3",
    "BlockwiseCovariance",
    "EmbeddingAdapter",
    "CrossModalReport",
    "MeanShift",
    "ModalityGap",
    "ModalityMap",
    "ProjectedAffine",
    "ReAlign",
    "ReVision",
    "RepresentationAlignment",
    "RevisionCollator",
    "SpaceMap",
    "UnpairedReport",
    "UpgradeMap",
    "backfill_order",
    "SubspaceAligner",
    "cosine_divergence",
    "cross_modal_report",
    "distance_correlation",
    "mixing_rate",
    "relative_coordinates",
    "spatial_structure_of",
]


def __getattr__(name: str) -> Any:
    """ReVision is a Lightning module; Lightning (extra: train) is imported when it is first asked for."""
    if name in ("ReVision", "RevisionCollator"):
        from subspan.align import revision

        return getattr(revision, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
