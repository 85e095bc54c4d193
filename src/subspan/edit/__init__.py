"""Changing what a model represents or decides, by changing subspaces of its representations."""

from .sts import (
    ENSEMBLE_TEMPLATES,
    SINGLE_TEMPLATE,
    ConfidentAverage,
    PrototypeShift,
    SpectralSteering,
    SteeringReport,
    STSClassifier,
    marginal_entropy,
    select_confident,
    zero_shot_prototypes,
)

__all__ = [
    "ENSEMBLE_TEMPLATES",
    "SINGLE_TEMPLATE",
    "ConfidentAverage",
    "PrototypeShift",
    "STSClassifier",
    "SpectralSteering",
    "SteeringReport",
    "marginal_entropy",
    "select_confident",
    "zero_shot_prototypes",
]
