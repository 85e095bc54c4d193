from .affine import AffineMap, LowRankMap
from .angles import expected_overlap, principal_angles, principal_vectors, subspace_distance, subspace_overlap
from .canonical import CanonicalCorrelation, cca, linear_cka
from .closed_forms import gaussian_transport, procrustes, ridge, translation
from .coordinates import Blocks, CoordinateSubspace, SoftSubspace
from .covariance import inverse_sqrt, oas_shrinkage, shrink_covariance, whitening
from .prefixes import (
    blocks_between,
    halving_sizes,
    prefix,
    prefix_similarities,
    prefix_sizes,
    prefix_squared_norms,
    smallest_sufficient,
)
from .rank import EffectiveRank, Elbow, EnergyRank, FixedRank, GavishDonoho, MarchenkoPastur, RankRule, rank_rule
from .spectra import (
    coding_rate,
    compressed_coding_rate,
    compression_gradient,
    compression_rate,
    effective_rank,
    explained_ratio,
    participation_ratio,
    power_law_exponent,
    rate_reduction,
    von_neumann_entropy,
)
from .subspace import Subspace

__all__ = [
    "AffineMap",
    "Blocks",
    "CanonicalCorrelation",
    "CoordinateSubspace",
    "EffectiveRank",
    "Elbow",
    "EnergyRank",
    "FixedRank",
    "GavishDonoho",
    "LowRankMap",
    "MarchenkoPastur",
    "RankRule",
    "SoftSubspace",
    "Subspace",
    "blocks_between",
    "cca",
    "coding_rate",
    "compressed_coding_rate",
    "compression_gradient",
    "compression_rate",
    "effective_rank",
    "expected_overlap",
    "explained_ratio",
    "gaussian_transport",
    "halving_sizes",
    "inverse_sqrt",
    "linear_cka",
    "oas_shrinkage",
    "participation_ratio",
    "power_law_exponent",
    "prefix",
    "prefix_similarities",
    "prefix_sizes",
    "prefix_squared_norms",
    "principal_angles",
    "principal_vectors",
    "procrustes",
    "rank_rule",
    "rate_reduction",
    "ridge",
    "shrink_covariance",
    "smallest_sufficient",
    "subspace_distance",
    "subspace_overlap",
    "translation",
    "von_neumann_entropy",
    "whitening",
]
