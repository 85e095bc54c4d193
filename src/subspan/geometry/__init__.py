"""What a subspace is, and how one is estimated: the ground floor of the library."""

from .angles import expected_overlap, principal_angles, principal_vectors, subspace_distance, subspace_overlap
from .arrays import as_tensor, check_finite, check_matrix, like, normalize_rows
from .maps import (
    AffineMap,
    CanonicalCorrelation,
    cca,
    gaussian_transport,
    inverse_sqrt,
    linear_cka,
    oas_shrinkage,
    procrustes,
    ridge,
    shrink_covariance,
    whitening,
)
from .rank import (
    EffectiveRank,
    Elbow,
    EnergyRank,
    FixedRank,
    GavishDonoho,
    MarchenkoPastur,
    RankRule,
    rank_rule,
)
from .spatial import gram_agreement, spatial_structure
from .spectra import (
    coding_rate,
    effective_rank,
    explained_ratio,
    participation_ratio,
    power_law_exponent,
    von_neumann_entropy,
)
from .subspace import Subspace

__all__ = [
    "AffineMap",
    "CanonicalCorrelation",
    "EffectiveRank",
    "Elbow",
    "EnergyRank",
    "FixedRank",
    "GavishDonoho",
    "MarchenkoPastur",
    "RankRule",
    "Subspace",
    "as_tensor",
    "cca",
    "check_finite",
    "check_matrix",
    "coding_rate",
    "effective_rank",
    "expected_overlap",
    "explained_ratio",
    "gaussian_transport",
    "gram_agreement",
    "inverse_sqrt",
    "like",
    "linear_cka",
    "normalize_rows",
    "oas_shrinkage",
    "participation_ratio",
    "power_law_exponent",
    "principal_angles",
    "principal_vectors",
    "procrustes",
    "rank_rule",
    "ridge",
    "shrink_covariance",
    "spatial_structure",
    "subspace_distance",
    "subspace_overlap",
    "von_neumann_entropy",
    "whitening",
]
