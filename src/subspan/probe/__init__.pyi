from .convergent_learning import (
    ConvergentLearning,
    Matching,
    SparsePrediction,
    UnitGroup,
    layer_moments,
    mean_agreement,
)
from .rate_profile import LayerRate, rate_profile

__all__ = [
    "ConvergentLearning",
    "LayerRate",
    "Matching",
    "SparsePrediction",
    "UnitGroup",
    "layer_moments",
    "mean_agreement",
    "rate_profile",
]
