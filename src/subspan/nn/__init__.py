"""Neural building blocks: layers, heads and losses as plain torch modules and functions."""

from subspan.nn.contrastive import ContrastiveLoss, info_nce, multi_positive_info_nce
from subspan.nn.matryoshka import (
    MatryoshkaAdapter,
    MatryoshkaLinear,
    MatryoshkaLogitLoss,
    MatryoshkaLoss,
    nesting_weights,
)
from subspan.nn.neural_collapse import NeuralCollapse, neural_collapse
from subspan.nn.orthogonal import OrthogonalLinear
from subspan.nn.simplex import (
    CompatibleCE,
    HOCLoss,
    SimplexClassifier,
    active_subspace,
    simplex_logits,
    simplex_vertices,
)

__all__ = [
    "CompatibleCE",
    "ContrastiveLoss",
    "HOCLoss",
    "MatryoshkaAdapter",
    "MatryoshkaLinear",
    "MatryoshkaLogitLoss",
    "MatryoshkaLoss",
    "NeuralCollapse",
    "OrthogonalLinear",
    "SimplexClassifier",
    "active_subspace",
    "info_nce",
    "multi_positive_info_nce",
    "nesting_weights",
    "neural_collapse",
    "simplex_logits",
    "simplex_vertices",
]
