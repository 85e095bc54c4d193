"""Changing what a model represents or decides, by changing subspaces of its representations."""

from .eigenshield import (
    EigenShield,
    NoSpikesError,
    PairedMoments,
    RobustSpikes,
    SpikeFilter,
    alignment_score,
    conformal_quantile,
    energy_score,
    spectral_score,
)
from .latents import displacement_mixing, displacements, latent_directions, orthogonalize_projections, path_length
from .perturbations import gaussian_blur, jpeg, pgd, random_noise, typos
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
    "EigenShield",
    "NoSpikesError",
    "PairedMoments",
    "PrototypeShift",
    "RobustSpikes",
    "STSClassifier",
    "SpectralSteering",
    "SpikeFilter",
    "SteeringReport",
    "alignment_score",
    "conformal_quantile",
    "displacement_mixing",
    "displacements",
    "energy_score",
    "gaussian_blur",
    "jpeg",
    "latent_directions",
    "marginal_entropy",
    "orthogonalize_projections",
    "path_length",
    "pgd",
    "random_noise",
    "select_confident",
    "spectral_score",
    "typos",
    "zero_shot_prototypes",
]
