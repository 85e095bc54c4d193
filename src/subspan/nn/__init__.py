"""Neural building blocks: layers, heads and losses as plain torch modules and functions."""

from subspan.nn.contrastive import ContrastiveLoss, info_nce, multi_positive_info_nce
from subspan.nn.orthogonal import OrthogonalLinear

__all__ = ["ContrastiveLoss", "OrthogonalLinear", "info_nce", "multi_positive_info_nce"]
