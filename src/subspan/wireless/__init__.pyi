from .codebooks import (
    BeamChoice,
    beam_energies,
    channel_covariance,
    channel_subspaces,
    port_selection,
    type1_beam,
    type2_subspace,
)
from .feedback import FeedbackCost, feedback_cost, spectral_efficiency
from .fingerprints import fingerprint_keys, mirrored, probing_beams, reported, rsrp
from .sifo import SiFo
from .sifo_network import CaptureLoss, InContextSubspaceRegressor, Memory

__all__ = [
    "BeamChoice",
    "CaptureLoss",
    "FeedbackCost",
    "InContextSubspaceRegressor",
    "Memory",
    "SiFo",
    "beam_energies",
    "channel_covariance",
    "channel_subspaces",
    "feedback_cost",
    "fingerprint_keys",
    "mirrored",
    "port_selection",
    "probing_beams",
    "reported",
    "rsrp",
    "spectral_efficiency",
    "type1_beam",
    "type2_subspace",
]
