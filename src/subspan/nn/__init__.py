"""Neural building blocks: layers, heads and losses as plain torch modules and functions."""

from subspan.nn.contrastive import ContrastiveLoss, info_nce, multi_positive_info_nce
from subspan.nn.flow_transformer import FlowTransformer
from subspan.nn.gcr import GrassmannHead
from subspan.nn.influence import influence_loss
from subspan.nn.lambda_orthogonality import (
    LambdaOrthogonality,
    limit_orthogonality_defect,
    orthogonality_defect,
    register_lambda_orthogonality,
)
from subspan.nn.matching import cosine_matching_loss
from subspan.nn.matryoshka import (
    MatryoshkaAdapter,
    MatryoshkaLinear,
    MatryoshkaLogitLoss,
    MatryoshkaLoss,
    nesting_weights,
)
from subspan.nn.neural_collapse import NeuralCollapse, neural_collapse
from subspan.nn.orthogonal import OrthogonalLinear, register_orthonormal
from subspan.nn.riemannian import GrassmannParameter, RiemannianSGD, WithRiemannian, with_riemannian
from subspan.nn.simplex import (
    CompatibleCE,
    HOCLoss,
    SimplexClassifier,
    active_subspace,
    simplex_logits,
    simplex_vertices,
)
from subspan.nn.spatial import PatchProjector, SpatialNorm, resize_tokens

__all__ = [
    "CompatibleCE",
    "ContrastiveLoss",
    "FlowTransformer",
    "GrassmannHead",
    "GrassmannParameter",
    "HOCLoss",
    "LambdaOrthogonality",
    "MatryoshkaAdapter",
    "MatryoshkaLinear",
    "MatryoshkaLogitLoss",
    "MatryoshkaLoss",
    "NeuralCollapse",
    "OrthogonalLinear",
    "PatchProjector",
    "RiemannianSGD",
    "SimplexClassifier",
    "SpatialNorm",
    "WithRiemannian",
    "active_subspace",
    "cosine_matching_loss",
    "influence_loss",
    "info_nce",
    "limit_orthogonality_defect",
    "multi_positive_info_nce",
    "nesting_weights",
    "neural_collapse",
    "orthogonality_defect",
    "register_lambda_orthogonality",
    "register_orthonormal",
    "resize_tokens",
    "simplex_logits",
    "simplex_vertices",
    "with_riemannian",
]
