"""Numerical work that several systems share."""

from .assignment import assign
from .neighbours import knn_overlap, nearest, nearest_code, neighbour_purity, recall_at_k
from .point_clouds import chamfer_distances
from .prefixes import (
    blocks_between,
    halving_sizes,
    prefix,
    prefix_similarities,
    prefix_sizes,
    prefix_squared_norms,
    smallest_sufficient,
)
from .retrieval import (
    BackfillCurve,
    RetrievalScores,
    average_accuracy,
    average_compatibility,
    backfill_curve,
    common_prefix,
    compatibility_matrix,
    prefix_retrieval_scores,
    retrieval_scores,
    template_gallery,
)

__all__ = [
    "BackfillCurve",
    "RetrievalScores",
    "assign",
    "average_accuracy",
    "average_compatibility",
    "backfill_curve",
    "blocks_between",
    "chamfer_distances",
    "common_prefix",
    "compatibility_matrix",
    "halving_sizes",
    "knn_overlap",
    "nearest",
    "nearest_code",
    "neighbour_purity",
    "prefix",
    "prefix_retrieval_scores",
    "prefix_similarities",
    "prefix_sizes",
    "prefix_squared_norms",
    "recall_at_k",
    "retrieval_scores",
    "smallest_sufficient",
    "template_gallery",
]
