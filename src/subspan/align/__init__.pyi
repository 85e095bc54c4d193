from .compatible.bt2 import BasisTransform, BT2Head, BT2Loss
from .compatible.bt2_training import BackwardCompatibleModule
from .compatible.lambda_orthogonality import LambdaOrthogonalAdapter
from .compatible.stationary_module import StationaryModule
from .compatible.stationary_simplex import (
    BalancedBatches,
    CompatibleCE,
    HOCLoss,
    Rehearsal,
    SimplexClassifier,
    make_stationary,
)
from .compatible.teachers import TeacherDataset, old_class_means, teacher_features
from .modality.comparators import C3, BlockwiseCovariance, MeanShift
from .modality.modality_gap import ModalityGap, cosine_divergence, mixing_rate
from .modality.modality_map import ModalityMap, ProjectedAffine
from .modality.realign import ReAlign
from .modality.revision import ReVision, RevisionCollator
from .spaces.cross_modal import CrossModalReport, cross_modal_report, distance_correlation, relative_coordinates
from .spaces.irepa import RepresentationAlignment, spatial_structure_of
from .spaces.plato_3d_text import SubspaceAligner
from .spaces.space_map import SpaceMap
from .upgrade.adapter import EmbeddingAdapter
from .upgrade.backfill import backfill_order
from .upgrade.unpaired import UnpairedReport
from .upgrade.upgrade import UpgradeMap

__all__ = [
    "CompatibleCE",
    "HOCLoss",
    "SimplexClassifier",
    "BT2Head",
    "BT2Loss",
    "BackwardCompatibleModule",
    "BalancedBatches",
    "BasisTransform",
    "BlockwiseCovariance",
    "C3",
    "CrossModalReport",
    "EmbeddingAdapter",
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
