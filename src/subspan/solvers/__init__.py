"""Numerical work that several systems share."""

from .neighbours import knn_overlap, nearest, recall_at_k

__all__ = ["knn_overlap", "nearest", "recall_at_k"]
