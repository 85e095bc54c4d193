"""Finding what does not belong: anomalies in rows and in images."""

from subspan.detect.foreground import AttentionForeground, NormalityForeground
from subspan.detect.label_votes import LabelVotes, counted_votes, label_votes
from subspan.detect.maps import tail_mean
from subspan.detect.metrics import aupro, auroc
from subspan.detect.rotations import RandomRotations
from subspan.detect.subspacead import AnomalyResult, SubspaceAD, SubspaceDetector, subspace_score

__all__ = [
    "AnomalyResult",
    "AttentionForeground",
    "LabelVotes",
    "NormalityForeground",
    "RandomRotations",
    "SubspaceAD",
    "SubspaceDetector",
    "aupro",
    "auroc",
    "counted_votes",
    "label_votes",
    "subspace_score",
    "tail_mean",
]
