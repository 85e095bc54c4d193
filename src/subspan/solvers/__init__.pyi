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
from .neighbours import largest_product, nearest, nearest_code
from .point_clouds import chamfer_distances
from .rounding import ROUNDINGS, round_embedding
from .sinkhorn import doubly_stochastic, transport_plan

__all__ = [
    "FilteredOperator",
    "JacobianSubspace",
    "MatrixOperator",
    "Operator",
    "PolynomialFilter",
    "ROUNDINGS",
    "as_adjacency",
    "assign",
    "chamfer_distances",
    "doubly_stochastic",
    "geometric_weights",
    "jacobian_rank",
    "jacobian_subspace",
    "largest_product",
    "nearest",
    "nearest_code",
    "orthogonal_iteration",
    "orthonormal_columns",
    "randomized_svd",
    "round_embedding",
    "smooth",
    "symmetric_normalized",
    "transition_matrix",
    "transport_plan",
]
