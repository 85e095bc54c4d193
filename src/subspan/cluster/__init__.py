"""Cluster rows, images and nodes of graphs by the subspaces that they lie in."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .deep import DeepSubspaceClustering, DSCNetClustering
from .diffusion import LowRankMixtureDiffusion
from .ensc import ElasticNetSubspaceClustering
from .ksubspaces import KSubspaces
from .lrr import LowRankRepresentation
from .lsr import LeastSquaresRepresentation
from .mlc import ManifoldLinearizingClustering, linearization
from .omp import OMPSubspaceClustering
from .s2cag import S2CAG
from .self_expressive import SelfExpressiveClustering
from .ssc import SparseSubspaceClustering
from .tsc import ThresholdingSubspaceClustering

if TYPE_CHECKING:
    from .mlc_training import ManifoldLinearizingModule

__all__ = [
    "S2CAG",
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
    "SelfExpressiveClustering",
    "SparseSubspaceClustering",
    "ThresholdingSubspaceClustering",
    "linearization",
]


def __getattr__(name: str) -> Any:
    """The Lightning module of the room, imported when it is asked for."""
    if name == "ManifoldLinearizingModule":
        return import_module("subspan.cluster.mlc_training").ManifoldLinearizingModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
