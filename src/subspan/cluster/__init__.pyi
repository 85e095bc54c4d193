from .deep import DeepSubspaceClustering, DSCNetClustering
from .diffusion import LowRankMixtureDiffusion
from .ensc import ElasticNetSubspaceClustering
from .ksubspaces import KSubspaces
from .lrr import LowRankRepresentation
from .lsr import LeastSquaresRepresentation
from .mlc import ManifoldLinearizingClustering, linearization
from .mlc_training import ManifoldLinearizingModule
from .omp import OMPSubspaceClustering
from .s2cag import S2CAG
from .self_expressive import SelfExpressiveClustering
from .ssc import SparseSubspaceClustering
from .tsc import ThresholdingSubspaceClustering

__all__ = [
    "DSCNetClustering",
    "DeepSubspaceClustering",
    "ElasticNetSubspaceClustering",
    "KSubspaces",
    "LeastSquaresRepresentation",
    "LowRankMixtureDiffusion",
    "LowRankRepresentation",
    "ManifoldLinearizingClustering",
    "ManifoldLinearizingModule",
    "OMPSubspaceClustering",
    "S2CAG",
    "SelfExpressiveClustering",
    "SparseSubspaceClustering",
    "ThresholdingSubspaceClustering",
    "linearization",
]
