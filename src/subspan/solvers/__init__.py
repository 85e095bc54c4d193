"""Numerical work that several systems share."""

from .assignment import assign
from .neighbours import knn_overlap, nearest, neighbour_purity, recall_at_k
from .point_clouds import chamfer_distances
from .retrieval import (
    BackfillCurve,
    RetrievalScores,
    average_accuracy,
    average_compatibility,
    backfill_curve,
    common_prefix,
    compatibility_matrix,
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
    "chamfer_distances",
    "common_prefix",
    "compatibility_matrix",
    "knn_overlap",
    "nearest",
    "neighbour_purity",
    "recall_at_k",
    "retrieval_scores",
    "template_gallery",
]
