"""Numerical work that several systems share."""

from .assignment import assign
from .graph_filters import (
    FilteredOperator,
    PolynomialFilter,
    as_adjacency,
    geometric_weights,
    smooth,
    symmetric_normalized,
    transition_matrix,
)
from .jacobian import JacobianSubspace, jacobian_rank, jacobian_subspace
from .low_rank import MatrixOperator, Operator, orthogonal_iteration, orthonormal_columns, randomized_svd
from .neighbours import knn_overlap, largest_product, nearest, nearest_code, neighbour_purity, recall_at_k
from .partitions import (
    attribute_modularity,
    clustering_accuracy,
    conductance,
    connectivity,
    feature_detection_error,
    modularity,
    pairwise_f1,
)
from .point_clouds import chamfer_distances
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
from .rounding import ROUNDINGS, round_embedding
from .sinkhorn import doubly_stochastic, transport_plan

__all__ = [
    "ROUNDINGS",
    "BackfillCurve",
    "FilteredOperator",
    "MatrixOperator",
    "Operator",
    "PolynomialFilter",
    "JacobianSubspace",
    "RetrievalScores",
    "as_adjacency",
    "assign",
    "attribute_modularity",
    "average_accuracy",
    "average_compatibility",
    "backfill_curve",
    "chamfer_distances",
    "clustering_accuracy",
    "common_prefix",
    "compatibility_matrix",
    "conductance",
    "connectivity",
    "doubly_stochastic",
    "feature_detection_error",
    "geometric_weights",
    "jacobian_rank",
    "jacobian_subspace",
    "knn_overlap",
    "largest_product",
    "modularity",
    "nearest",
    "nearest_code",
    "neighbour_purity",
    "orthogonal_iteration",
    "orthonormal_columns",
    "pairwise_f1",
    "prefix_retrieval_scores",
    "randomized_svd",
    "recall_at_k",
    "retrieval_scores",
    "round_embedding",
    "smooth",
    "symmetric_normalized",
    "template_gallery",
    "transition_matrix",
    "transport_plan",
]
