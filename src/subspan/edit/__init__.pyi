from .confident_views import marginal_entropy, select_confident
from .decoupling import Refresh, SubspaceDecoupling
from .eigenshield import EigenShield
from .latents import displacement_mixing, displacements, latent_directions, orthogonalize_projections, path_length
from .leace import leace
from .perturbations import gaussian_blur, jpeg, pgd, random_noise, typos
from .prototypes import (
    ENSEMBLE_TEMPLATES,
    SINGLE_TEMPLATE,
    ConfidentAverage,
    PrototypeShift,
    SteeringReport,
    zero_shot_prototypes,
)
from .resrl import ResidualCredit, entropy_mask, head_interference, length_scaled_reward, quantile_gate
from .spike_scores import PairedMoments, alignment_score, conformal_quantile, energy_score, spectral_score
from .spikes import NoSpikesError, RobustSpikes, SpikeFilter
from .sts import SpectralSteering, STSClassifier
from .variational_probe import VariationalLinear, VariationalProbe, dominant_subspace

__all__ = [
    "ConfidentAverage",
    "ENSEMBLE_TEMPLATES",
    "EigenShield",
    "NoSpikesError",
    "PairedMoments",
    "PrototypeShift",
    "Refresh",
    "ResidualCredit",
    "RobustSpikes",
    "SINGLE_TEMPLATE",
    "STSClassifier",
    "SpectralSteering",
    "SpikeFilter",
    "SteeringReport",
    "SubspaceDecoupling",
    "VariationalLinear",
    "VariationalProbe",
    "alignment_score",
    "conformal_quantile",
    "displacement_mixing",
    "displacements",
    "dominant_subspace",
    "energy_score",
    "entropy_mask",
    "gaussian_blur",
    "head_interference",
    "jpeg",
    "latent_directions",
    "leace",
    "length_scaled_reward",
    "marginal_entropy",
    "orthogonalize_projections",
    "path_length",
    "pgd",
    "quantile_gate",
    "random_noise",
    "select_confident",
    "spectral_score",
    "typos",
    "zero_shot_prototypes",
]
