from .contrast import contrast_spectrum
from .cross_moments import CrossMoments
from .grouped_moments import GroupedMoments
from .joint_moments import JointMoments
from .moments import Moments
from .sampling import UniformSample
from .sketch import CovarianceSketch
from .streams import batches, fit_moments, is_dask, is_one_shot, is_stream

__all__ = [
    "CovarianceSketch",
    "CrossMoments",
    "GroupedMoments",
    "JointMoments",
    "Moments",
    "UniformSample",
    "batches",
    "contrast_spectrum",
    "fit_moments",
    "is_dask",
    "is_one_shot",
    "is_stream",
]
