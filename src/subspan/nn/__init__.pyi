from .attention_pool import AttentionPool2d
from .autoencoders import ConvAutoencoder, LinearAutoencoder, SameConv2d, SameConvTranspose2d
from .blocks import MLP, ConvBlock, ResidualConvBlock
from .butterfly import Butterfly
from .butterfly_factors import ButterflyFactors, butterfly_factorize
from .butterfly_products import butterfly_multiply
from .contrastive import ContrastiveLoss, info_nce, multi_positive_info_nce, nt_xent
from .crate import ISTA, CRATEDecoderLayer, CRATELayer, SubspaceSelfAttention
from .crate_models import CRATE, CRATEAutoencoder, CRATELanguageModel, load_published
from .flow_transformer import FlowTransformer
from .forgetting import InverseHingeLoss, npo_loss, simnpo_loss
from .gated_cosine import gated_cosine
from .gates import ConcreteGate, StochasticGate, TopKGate, straight_through
from .gcr import GrassmannHead
from .grassmann_mixing import GrassmannBlock, GrassmannLanguageModel, GrassmannMixing, MixingState
from .grassmann_pair_head import GrassmannPairHead
from .householder_projector import HouseholderFrame, HouseholderProjector
from .image_coders import ConvDecoder, ConvEncoder
from .influence import influence_loss
from .lambda_orthogonality import (
    LambdaOrthogonality,
    limit_orthogonality_defect,
    orthogonality_defect,
    register_lambda_orthogonality,
)
from .matching import cosine_matching_loss
from .matryoshka import MatryoshkaAdapter, MatryoshkaLinear, MatryoshkaLogitLoss, MatryoshkaLoss, nesting_weights
from .objective import Objective
from .orthogonal import OrthogonalLinear, register_orthonormal
from .paired_optimizer import WithRiemannian, with_riemannian
from .penalties import (
    ProjectionPenalty,
    cross_correlation,
    orthonormality_penalty,
    projection_penalty,
    weight_projection_penalty,
)
from .riemannian import GrassmannModule, GrassmannParameter, RiemannianSGD
from .sae_files import SAE, PublishedSAE, SAEAdapter, load_sae
from .self_expression import SelfExpression, SubspaceStructured
from .series_encoders import LatentMapper, ScalogramEncoder, SeriesEncoder, SpectrumEncoder
from .series_views import FourierView, FrameView, MorletView
from .simplex import CompatibleCE, HOCLoss, SimplexClassifier, active_subspace, simplex_logits, simplex_vertices
from .simvq import CodeUsage, GroupedSimVQ, Quantized, ResidualSimVQ, SimVQ, code_usage
from .sparse_autoencoder import ActiveAtoms, SparseAutoencoder
from .spatial import PatchProjector, SpatialNorm, resize_tokens
from .ulsam import SubspaceAttention, attention_entropy, shape_preserving_blocks

__all__ = [
    "ActiveAtoms",
    "AttentionPool2d",
    "Butterfly",
    "ButterflyFactors",
    "CRATE",
    "CRATEAutoencoder",
    "CRATEDecoderLayer",
    "CRATELanguageModel",
    "CRATELayer",
    "CodeUsage",
    "CompatibleCE",
    "ConcreteGate",
    "ContrastiveLoss",
    "ConvAutoencoder",
    "ConvBlock",
    "ConvDecoder",
    "ConvEncoder",
    "FlowTransformer",
    "FourierView",
    "FrameView",
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
    "ISTA",
    "InverseHingeLoss",
    "LambdaOrthogonality",
    "LatentMapper",
    "LinearAutoencoder",
    "MLP",
    "MatryoshkaAdapter",
    "MatryoshkaLinear",
    "MatryoshkaLogitLoss",
    "MatryoshkaLoss",
    "MixingState",
    "MorletView",
    "Objective",
    "OrthogonalLinear",
    "PatchProjector",
    "ProjectionPenalty",
    "PublishedSAE",
    "Quantized",
    "ResidualConvBlock",
    "ResidualSimVQ",
    "RiemannianSGD",
    "SAE",
    "SAEAdapter",
    "SameConv2d",
    "SameConvTranspose2d",
    "ScalogramEncoder",
    "SelfExpression",
    "SeriesEncoder",
    "SimVQ",
    "SimplexClassifier",
    "SparseAutoencoder",
    "SpatialNorm",
    "SpectrumEncoder",
    "StochasticGate",
    "SubspaceAttention",
    "SubspaceSelfAttention",
    "SubspaceStructured",
    "TopKGate",
    "WithRiemannian",
    "active_subspace",
    "attention_entropy",
    "butterfly_factorize",
    "butterfly_multiply",
    "code_usage",
    "cosine_matching_loss",
    "cross_correlation",
    "gated_cosine",
    "influence_loss",
    "info_nce",
    "limit_orthogonality_defect",
    "load_published",
    "load_sae",
    "multi_positive_info_nce",
    "nesting_weights",
    "npo_loss",
    "nt_xent",
    "orthogonality_defect",
    "orthonormality_penalty",
    "projection_penalty",
    "register_lambda_orthogonality",
    "register_orthonormal",
    "resize_tokens",
    "shape_preserving_blocks",
    "simnpo_loss",
    "simplex_logits",
    "simplex_vertices",
    "straight_through",
    "weight_projection_penalty",
    "with_riemannian",
]
