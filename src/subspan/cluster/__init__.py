"""Cluster rows, images and nodes of graphs by the subspaces that they lie in."""

from .ensc import ElasticNetSubspaceClustering
from .ksubspaces import KSubspaces
from .lrr import LowRankRepresentation
from .lsr import LeastSquaresRepresentation
from .omp import OMPSubspaceClustering
from .s2cag import S2CAG
from .self_expressive import SelfExpressiveClustering
from .ssc import SparseSubspaceClustering
from .tsc import ThresholdingSubspaceClustering

__all__ = [
    "S2CAG",
    "ElasticNetSubspaceClustering",
    "KSubspaces",
    "LeastSquaresRepresentation",
    "LowRankRepresentation",
    "OMPSubspaceClustering",
    "SelfExpressiveClustering",
    "SparseSubspaceClustering",
    "ThresholdingSubspaceClustering",
]
