from .confident_views import marginal_entropy, select_confident
from .decoupling import Refresh, SubspaceDecoupling
from .displacement import Displacement, lld
from .eigenshield import EigenShield
from .erasing import erase_subspace, steer_subspace
from .group_policy import Rollouts, clipped_policy_loss, credit_by, group_advantages
from .latents import displacement_mixing, displacements, latent_directions, orthogonalize_projections, path_length
from .leace import erase_differences, leace
from .low_rank_starts import importance_factors, squared_gradients, zero_factors
from .perturbations import gaussian_blur, jpeg, pgd, random_noise, typos
from .prototypes import (
    ENSEMBLE_TEMPLATES,
    SINGLE_TEMPLATE,
    ConfidentAverage,
    PrototypeShift,
    SteeringReport,
    zero_shot_prototypes,
)
from .reglu import (
    LayerPlan,
    Leakage,
    SubspaceOrthogonalityLoss,
    collect_output_moments,
    contrast_subspace,
    net_leakage,
    random_subspaces,
    reglu_plan,
)
from .resrl import ResidualCredit, length_scaled_reward, quantile_gate
from .spike_scores import PairedMoments, alignment_score, conformal_quantile, energy_score, spectral_score
from .spikes import NoSpikesError, RobustSpikes, SpikeFilter
from .sts import SpectralSteering, STSClassifier
from .token_credit import entropy_mask, head_interference, hidden_reward_weights, reinforce_advantages
from .unlearner import Answers, Unlearner, UnlearningStep
from .unlearning_checks import answer_log_likelihood, answer_scores, question_prompt, relearned
from .unlearning_data import PairedExamples, answer_examples
from .variational_probe import VariationalLinear, VariationalProbe, dominant_subspace
from .variety_report import VarietyReading, variety_report
from .variety_tuning import decouple_finetune

__all__ = [
    "Answers",
    "ConfidentAverage",
    "Displacement",
    "ENSEMBLE_TEMPLATES",
    "EigenShield",
    "LayerPlan",
    "Leakage",
    "NoSpikesError",
    "PairedExamples",
    "PairedMoments",
    "PrototypeShift",
    "Refresh",
    "ResidualCredit",
    "RobustSpikes",
    "Rollouts",
    "SINGLE_TEMPLATE",
    "STSClassifier",
    "SpectralSteering",
    "SpikeFilter",
    "SteeringReport",
    "SubspaceDecoupling",
    "SubspaceOrthogonalityLoss",
    "Unlearner",
    "UnlearningStep",
    "VariationalLinear",
    "VariationalProbe",
    "VarietyReading",
    "alignment_score",
    "answer_examples",
    "answer_log_likelihood",
    "answer_scores",
    "clipped_policy_loss",
    "collect_output_moments",
    "conformal_quantile",
    "contrast_subspace",
    "credit_by",
    "decouple_finetune",
    "displacement_mixing",
    "displacements",
    "dominant_subspace",
    "energy_score",
    "entropy_mask",
    "erase_differences",
    "erase_subspace",
    "gaussian_blur",
    "group_advantages",
    "head_interference",
    "hidden_reward_weights",
    "importance_factors",
    "jpeg",
    "latent_directions",
    "leace",
    "length_scaled_reward",
    "lld",
    "marginal_entropy",
    "net_leakage",
    "orthogonalize_projections",
    "path_length",
    "pgd",
    "quantile_gate",
    "question_prompt",
    "random_noise",
    "random_subspaces",
    "reglu_plan",
    "reinforce_advantages",
    "relearned",
    "select_confident",
    "spectral_score",
    "squared_gradients",
    "steer_subspace",
    "typos",
    "variety_report",
    "zero_factors",
    "zero_shot_prototypes",
]
