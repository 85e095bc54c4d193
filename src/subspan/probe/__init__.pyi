from .audit_evidence import AuditReport, Change, Reading, Selectivity
from .behaviours import ChoiceAccuracy, RefusalRate, TargetLikelihood
from .convergent_learning import ConvergentLearning
from .rate_profile import LayerRate, rate_profile
from .safety_subspaces import SubspaceAudit
from .unit_matches import Matching, SparsePrediction, UnitGroup, layer_moments, mean_agreement
from .update_geometry import (
    Overlap,
    ProjectedUpdate,
    activation_overlap,
    projected_update,
    subspace_overlaps,
    weight_subspaces,
)

__all__ = [
    "AuditReport",
    "Change",
    "ChoiceAccuracy",
    "ConvergentLearning",
    "LayerRate",
    "Matching",
    "Overlap",
    "ProjectedUpdate",
    "Reading",
    "RefusalRate",
    "Selectivity",
    "SparsePrediction",
    "SubspaceAudit",
    "TargetLikelihood",
    "UnitGroup",
    "activation_overlap",
    "layer_moments",
    "mean_agreement",
    "projected_update",
    "rate_profile",
    "subspace_overlaps",
    "weight_subspaces",
]
