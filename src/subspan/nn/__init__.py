"""Neural building blocks: layers, heads and losses as plain torch modules and functions."""

from subspan.nn.contrastive import ContrastiveLoss, info_nce, multi_positive_info_nce
from subspan.nn.flow_transformer import FlowTransformer
from subspan.nn.influence import influence_loss
from subspan.nn.lambda_orthogonality import (
    LambdaOrthogonality,
    limit_orthogonality_defect,
    orthogonality_defect,
    register_lambda_orthogonality,
)
from subspan.nn.matching import cosine_matching_loss
from subspan.nn.orthogonal import OrthogonalLinear
from subspan.nn.spatial import PatchProjector, SpatialNorm, resize_tokens

__all__ = [
    "ContrastiveLoss",
    "FlowTransformer",
    "LambdaOrthogonality",
    "OrthogonalLinear",
    "PatchProjector",
    "SpatialNorm",
    "cosine_matching_loss",
    "influence_loss",
    "info_nce",
    "limit_orthogonality_defect",
    "multi_positive_info_nce",
    "orthogonality_defect",
    "register_lambda_orthogonality",
    "resize_tokens",
]
