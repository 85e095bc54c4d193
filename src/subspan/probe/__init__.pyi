from .ast_probe import ASTProbe, Epoch, LayerScore
from .atom_groups import AtomGroup, AtomGroups
from .audit_evidence import AuditReport, Change, Reading, Selectivity
from .behaviours import ChoiceAccuracy, RefusalRate, TargetLikelihood
from .capture_curves import CaptureCurve, capture_curve
from .circuit_reading import CircuitReading
from .circuit_reports import (
    EncodeReport,
    MergeReport,
    RetrievalReport,
    encode_report,
    label_assignment,
    merge_report,
    position_bias,
    retrieval_report,
)
from .code_parsing import ParsedCode, code_tree, code_trees
from .convergent_learning import ConvergentLearning
from .few_shot import CUTS, FewShotBatch, FewShotExample, FewShotPrompt, draw_examples
from .icl_circuit import Ablation, Effect, ICLCircuit, correct
from .ising import EBIC, IsingGraph
from .linear_readings import Target, target_of
from .manifold_diagnostics import Diagnostics, TuningCurves, manifold_diagnostics, tuning_curves
from .probe_sweeps import RankScore, rank_sweep, transfer
from .property_probe import ErasedReading, LayerReading, PropertyProbe, RankReading, property_subspace
from .rate_profile import LayerRate, rate_profile
from .retrieval_subspaces import ClassCentroids, retrieval_subspace, task_subspace
from .sae_manifolds import GroupMatch, ManifoldCapture
from .sae_training import TopKSAE, sparse_codes
from .safety_subspaces import SubspaceAudit
from .structural import ProbeReading, StructuralProbe, pairwise_rank_loss
from .syntax_trees import (
    Constituent,
    SyntaxTree,
    TreeScore,
    TreeTuple,
    label_recall,
    permuted_trees,
    right_branching,
    tree_score,
    tree_to_tuple,
    tuple_to_tree,
)
from .tree_states import TokenStates, token_states
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
from .updates_in_subspace import UpdatesInSubspace, updates_in_subspace

__all__ = [
    "ASTProbe",
    "Ablation",
    "AtomGroup",
    "AtomGroups",
    "AuditReport",
    "CUTS",
    "CaptureCurve",
    "Change",
    "ChoiceAccuracy",
    "CircuitReading",
    "ClassCentroids",
    "Constituent",
    "ConvergentLearning",
    "Diagnostics",
    "EBIC",
    "Effect",
    "EncodeReport",
    "Epoch",
    "ErasedReading",
    "Estimate",
    "FewShotBatch",
    "FewShotExample",
    "FewShotPrompt",
    "GroupMatch",
    "HeldUpdate",
    "ICLCircuit",
    "IsingGraph",
    "LayerRate",
    "LayerReading",
    "LayerScore",
    "ManifoldCapture",
    "Matching",
    "MergeReport",
    "Overlap",
    "PairedUpdates",
    "ParsedCode",
    "ProbeReading",
    "ProjectedUpdate",
    "PropertyProbe",
    "RankReading",
    "RankScore",
    "Reading",
    "RefusalRate",
    "RetrievalReport",
    "Selectivity",
    "SparsePrediction",
    "StructuralProbe",
    "SubspaceAudit",
    "SyntaxTree",
    "Target",
    "TargetLikelihood",
    "TokenStates",
    "TopKSAE",
    "TreeScore",
    "TreeTuple",
    "TuningCurves",
    "UnitGroup",
    "UpdateComparison",
    "UpdatesInSubspace",
    "activation_overlap",
    "capture_curve",
    "code_tree",
    "code_trees",
    "compare_updates",
    "correct",
    "draw_examples",
    "encode_report",
    "label_assignment",
    "label_recall",
    "layer_moments",
    "manifold_diagnostics",
    "mean_agreement",
    "merge_report",
    "pairwise_rank_loss",
    "permuted_trees",
    "position_bias",
    "projected_update",
    "property_subspace",
    "rank_sweep",
    "rate_profile",
    "retrieval_report",
    "retrieval_subspace",
    "right_branching",
    "sparse_codes",
    "subspace_overlaps",
    "target_of",
    "task_subspace",
    "token_states",
    "transfer",
    "tree_score",
    "tree_to_tuple",
    "tuning_curves",
    "tuple_to_tree",
    "updates_in_subspace",
    "weight_subspaces",
]
