"""What is inside a network: where something is represented, and whether two networks represent it alike."""

from .convergent_learning import (
    ConvergentLearning,
    Matching,
    SparsePrediction,
    UnitGroup,
    layer_moments,
    mean_agreement,
)

__all__ = ["ConvergentLearning", "Matching", "SparsePrediction", "UnitGroup", "layer_moments", "mean_agreement"]
