from .convergent_learning import ConvergentLearning
from .rate_profile import LayerRate, rate_profile
from .unit_matches import Matching, SparsePrediction, UnitGroup, layer_moments, mean_agreement

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
