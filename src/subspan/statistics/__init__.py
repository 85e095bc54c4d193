"""Sufficient statistics that merge: moments, sketches, and rows streamed from anywhere."""

from .moments import GroupedMoments, JointMoments, Moments
from .sketch import CovarianceSketch
from .streams import batches, fit_moments, is_dask, is_one_shot, is_stream

__all__ = [
    "CovarianceSketch",
    "GroupedMoments",
    "JointMoments",
    "Moments",
    "batches",
    "fit_moments",
    "is_dask",
    "is_one_shot",
    "is_stream",
]
