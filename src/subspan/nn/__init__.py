"""Neural building blocks: layers, heads and losses as plain torch modules and functions."""

from subspan.nn.contrastive import ContrastiveLoss, info_nce, multi_positive_info_nce
from subspan.nn.flow_transformer import FlowTransformer
from subspan.nn.matching import cosine_matching_loss
from subspan.nn.orthogonal import OrthogonalLinear
from subspan.nn.spatial import PatchProjector, SpatialNorm, resize_tokens

__all__ = [
    "ContrastiveLoss",
    "FlowTransformer",
    "OrthogonalLinear",
    "PatchProjector",
    "SpatialNorm",
    "cosine_matching_loss",
    "info_nce",
    "multi_positive_info_nce",
    "resize_tokens",
]
