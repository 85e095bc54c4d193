"""Numerical work that several systems share."""

from .neighbours import knn_overlap, nearest, recall_at_k
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
    "average_accuracy",
    "average_compatibility",
    "backfill_curve",
    "common_prefix",
    "compatibility_matrix",
    "knn_overlap",
    "nearest",
    "recall_at_k",
    "retrieval_scores",
    "template_gallery",
]
