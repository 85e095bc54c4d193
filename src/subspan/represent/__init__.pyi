from .cascade import MatryoshkaCascade
from .causal_grassmann import CausalGrassmannConfig, CausalGrassmannForCausalLM
from .dynamic_subspace_learners import DynamicSubspaceLearners, Separation
from .frame_projections import (
    CrossViewContrast,
    FrameNetwork,
    SeriesFeatures,
    ViewGeometry,
    mapping_loss,
    view_geometry,
)
from .frame_training import FrameViews
from .hydra import ArbitraryPairLoss, NearbyPartners, PairGate, pair_masks, sign_agreement_gate
from .hydra_training import HydraProjector, HydraTraining
from .learner_growth import ClusterAssigner, GrowthController, TaylorImportance
from .margin import MarginLoss, NearestNegativeSampler
from .matryoshka import Matryoshka
from .nested_search import MatryoshkaIndex
from .nested_training import NestedTraining
from .subspace_bank import SubspaceBank
from .subspace_embedding import SubspaceEmbedding, learner_separation
from .truncation import Truncated, truncate
from .xfactors import LatentPosterior, Reconstruction, XFactorsLoss, XFactorsVAE
from .xfactors_training import XFactors

__all__ = [
    "ArbitraryPairLoss",
    "CausalGrassmannConfig",
    "CausalGrassmannForCausalLM",
    "ClusterAssigner",
    "CrossViewContrast",
    "DynamicSubspaceLearners",
    "FrameNetwork",
    "FrameViews",
    "GrowthController",
    "HydraProjector",
    "HydraTraining",
    "LatentPosterior",
    "MarginLoss",
    "Matryoshka",
    "MatryoshkaCascade",
    "MatryoshkaIndex",
    "NearbyPartners",
    "NearestNegativeSampler",
    "NestedTraining",
    "PairGate",
    "Reconstruction",
    "Separation",
    "SeriesFeatures",
    "SubspaceBank",
    "SubspaceEmbedding",
    "TaylorImportance",
    "Truncated",
    "ViewGeometry",
    "XFactors",
    "XFactorsLoss",
    "XFactorsVAE",
    "learner_separation",
    "mapping_loss",
    "pair_masks",
    "sign_agreement_gate",
    "truncate",
    "view_geometry",
]
