from .assignment import assign
from .eigenspaces import leading_eigenspace
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
from .neighbours import largest_product, nearest, nearest_code
from .point_clouds import chamfer_distances
from .rounding import ROUNDINGS, round_embedding
from .sinkhorn import doubly_stochastic, transport_plan
from .sparse_coding import SparseCodes, coding_error, ksvd_step, mod_step, omp, procrustes_step, simultaneous_omp, top_s

__all__ = [
    "FilteredOperator",
    "JacobianSubspace",
    "MatrixOperator",
    "Operator",
    "PolynomialFilter",
    "ROUNDINGS",
    "SparseCodes",
    "as_adjacency",
    "assign",
    "chamfer_distances",
    "coding_error",
    "doubly_stochastic",
    "geometric_weights",
    "jacobian_rank",
    "jacobian_subspace",
    "ksvd_step",
    "largest_product",
    "leading_eigenspace",
    "mod_step",
    "nearest",
    "nearest_code",
    "omp",
    "orthogonal_iteration",
    "orthonormal_columns",
    "procrustes_step",
    "randomized_svd",
    "round_embedding",
    "simultaneous_omp",
    "smooth",
    "symmetric_normalized",
    "top_s",
    "transition_matrix",
    "transport_plan",
]
