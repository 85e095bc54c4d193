from .ast_probe import ASTProbe, Epoch, LayerScore
from .audit_evidence import AuditReport, Change, Reading, Selectivity
from .behaviours import ChoiceAccuracy, RefusalRate, TargetLikelihood
from .code_parsing import ParsedCode, code_tree, code_trees
from .convergent_learning import ConvergentLearning
from .probe_sweeps import RankScore, rank_sweep, transfer
from .rate_profile import LayerRate, rate_profile
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

__all__ = [
    "ASTProbe",
    "AuditReport",
    "Change",
    "ChoiceAccuracy",
    "Constituent",
    "ConvergentLearning",
    "Epoch",
    "Estimate",
    "HeldUpdate",
    "LayerRate",
    "LayerScore",
    "Matching",
    "Overlap",
    "PairedUpdates",
    "ParsedCode",
    "ProbeReading",
    "ProjectedUpdate",
    "RankScore",
    "Reading",
    "RefusalRate",
    "Selectivity",
    "SparsePrediction",
    "StructuralProbe",
    "SubspaceAudit",
    "SyntaxTree",
    "TargetLikelihood",
    "TokenStates",
    "TreeScore",
    "TreeTuple",
    "UnitGroup",
    "UpdateComparison",
    "activation_overlap",
    "code_tree",
    "code_trees",
    "compare_updates",
    "label_recall",
    "layer_moments",
    "mean_agreement",
    "pairwise_rank_loss",
    "permuted_trees",
    "projected_update",
    "rank_sweep",
    "rate_profile",
    "right_branching",
    "subspace_overlaps",
    "token_states",
    "transfer",
    "tree_score",
    "tree_to_tuple",
    "tuple_to_tree",
    "weight_subspaces",
]
