"""Neural building blocks: layers, heads and losses as plain torch modules and functions."""

from subspan.nn.autoencoders import ConvAutoencoder, LinearAutoencoder, SameConv2d, SameConvTranspose2d
from subspan.nn.butterfly import Butterfly, ButterflyFactors, butterfly_factorize, butterfly_multiply
from subspan.nn.contrastive import ContrastiveLoss, info_nce, multi_positive_info_nce
from subspan.nn.crate import ISTA, CRATEDecoderLayer, CRATELayer, SubspaceSelfAttention
from subspan.nn.crate_models import CRATE, CRATEAutoencoder, CRATELanguageModel, load_published
from subspan.nn.flow_transformer import FlowTransformer
from subspan.nn.gcr import GrassmannHead
from subspan.nn.grassmann_mixing import GrassmannBlock, GrassmannLanguageModel, GrassmannMixing, MixingState
from subspan.nn.grassmann_pair_head import GrassmannPairHead
from subspan.nn.householder_projector import HouseholderFrame, HouseholderProjector
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
from subspan.nn.replacement import Site, Surgery, multiply_adds, replace
from subspan.nn.riemannian import GrassmannModule, GrassmannParameter, RiemannianSGD, WithRiemannian, with_riemannian
from subspan.nn.self_expression import SelfExpression, SubspaceStructured
from subspan.nn.simplex import (
    CompatibleCE,
    HOCLoss,
    SimplexClassifier,
    active_subspace,
    simplex_logits,
    simplex_vertices,
)
from subspan.nn.simvq import CodeUsage, GroupedSimVQ, Quantized, ResidualSimVQ, SimVQ, code_usage
from subspan.nn.spatial import PatchProjector, SpatialNorm, resize_tokens
from subspan.nn.ulsam import SubspaceAttention, attention_entropy, shape_preserving_blocks

__all__ = [
    "CRATE",
    "ISTA",
    "Butterfly",
    "ButterflyFactors",
    "CRATEAutoencoder",
    "CRATEDecoderLayer",
    "CRATELanguageModel",
    "CRATELayer",
    "CodeUsage",
    "CompatibleCE",
    "ContrastiveLoss",
    "ConvAutoencoder",
    "FlowTransformer",
    "GrassmannBlock",
    "GrassmannHead",
    "GrassmannLanguageModel",
    "GrassmannMixing",
    "GrassmannModule",
    "GrassmannPairHead",
    "GrassmannParameter",
    "GroupedSimVQ",
    "HOCLoss",
    "HouseholderFrame",
    "HouseholderProjector",
    "LambdaOrthogonality",
    "LinearAutoencoder",
    "MatryoshkaAdapter",
    "MatryoshkaLinear",
    "MatryoshkaLogitLoss",
    "MatryoshkaLoss",
    "MixingState",
    "NeuralCollapse",
    "OrthogonalLinear",
    "PatchProjector",
    "Quantized",
    "ResidualSimVQ",
    "RiemannianSGD",
    "SameConv2d",
    "SameConvTranspose2d",
    "SelfExpression",
    "SimVQ",
    "SimplexClassifier",
    "Site",
    "SpatialNorm",
    "SubspaceAttention",
    "SubspaceSelfAttention",
    "SubspaceStructured",
    "Surgery",
    "WithRiemannian",
    "active_subspace",
    "attention_entropy",
    "butterfly_factorize",
    "butterfly_multiply",
    "code_usage",
    "cosine_matching_loss",
    "influence_loss",
    "info_nce",
    "limit_orthogonality_defect",
    "load_published",
    "multi_positive_info_nce",
    "multiply_adds",
    "nesting_weights",
    "neural_collapse",
    "orthogonality_defect",
    "register_lambda_orthogonality",
    "register_orthonormal",
    "replace",
    "resize_tokens",
    "shape_preserving_blocks",
    "simplex_logits",
    "simplex_vertices",
    "with_riemannian",
]
