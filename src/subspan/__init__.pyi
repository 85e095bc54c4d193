from . import (
    align,
    base,
    cluster,
    datasets,
    detect,
    dynamics,
    edit,
    geometry,
    measures,
    models,
    nn,
    probe,
    report,
    represent,
    reproduce,
    select,
    solvers,
    statistics,
    weights,
    wireless,
)
from .geometry.affine import AffineMap
from .geometry.angles import principal_angles
from .geometry.closed_forms import procrustes
from .geometry.subspace import Subspace
from .measures.kernel_alignment import kernel_cka
from .statistics.moments import Moments
from .statistics.streams import fit_moments

__version__: str

__all__ = [
    "AffineMap",
    "Moments",
    "Subspace",
    "align",
    "base",
    "cluster",
    "datasets",
    "detect",
    "dynamics",
    "edit",
    "fit_moments",
    "geometry",
    "kernel_cka",
    "measures",
    "models",
    "nn",
    "principal_angles",
    "probe",
    "procrustes",
    "report",
    "represent",
    "reproduce",
    "select",
    "solvers",
    "statistics",
    "weights",
    "wireless",
]
