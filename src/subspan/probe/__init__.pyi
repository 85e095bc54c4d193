from .audit_evidence import AuditReport, Change, Reading, Selectivity
from .behaviours import ChoiceAccuracy, RefusalRate, TargetLikelihood
from .convergent_learning import ConvergentLearning
from .rate_profile import LayerRate, rate_profile
from .safety_subspaces import SubspaceAudit
from .unit_matches import Matching, SparsePrediction, UnitGroup, layer_moments, mean_agreement
from .update_comparison import Estimate, HeldUpdate, PairedUpdates, UpdateComparison, compare_updates
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
    "Estimate",
    "HeldUpdate",
    "LayerRate",
    "Matching",
    "Overlap",
    "PairedUpdates",
    "ProjectedUpdate",
    "Reading",
    "RefusalRate",
    "Selectivity",
    "SparsePrediction",
    "SubspaceAudit",
    "TargetLikelihood",
    "UnitGroup",
    "UpdateComparison",
    "activation_overlap",
    "compare_updates",
    "layer_moments",
    "mean_agreement",
    "projected_update",
    "rate_profile",
    "subspace_overlaps",
    "weight_subspaces",
]
