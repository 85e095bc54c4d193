"""Sufficient statistics that merge: moments, sketches, and rows streamed from anywhere."""

from .jackknife import jackknife
from .kernel_alignment import gram_matrix, kernel_cka, local_kernel_cka
from .moments import GroupedMoments, JointMoments, Moments
from .mutual_information import mutual_information
from .sampling import UniformSample
from .sketch import CovarianceSketch
from .streams import batches, fit_moments, is_dask, is_one_shot, is_stream

__all__ = [
    "CovarianceSketch",
    "GroupedMoments",
    "JointMoments",
    "Moments",
    "UniformSample",
    "batches",
    "fit_moments",
    "gram_matrix",
    "is_dask",
    "is_one_shot",
    "is_stream",
    "jackknife",
    "kernel_cka",
    "local_kernel_cka",
    "mutual_information",
]
