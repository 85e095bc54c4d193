from .detector import SubspaceDetector, subspace_score
from .foreground import AttentionForeground, NormalityForeground
from .label_votes import LabelVotes, counted_votes, label_votes
from .maps import tail_mean
from .rotations import RandomRotations
from .subspacead import AnomalyResult, SubspaceAD

__all__ = [
    "AnomalyResult",
    "AttentionForeground",
    "LabelVotes",
    "NormalityForeground",
    "RandomRotations",
    "SubspaceAD",
    "SubspaceDetector",
    "counted_votes",
    "label_votes",
    "subspace_score",
    "tail_mean",
]
