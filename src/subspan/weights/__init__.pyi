from .budgets import allocate, dictionary_sizes
from .concrete_merging import ConcreteMasks, ConcreteMerging
from .cospadi import CoSpaDi, LayerReport
from .factorising import Factorisation, error_curve, factorise
from .merged_module import MergedModule
from .merging import average, dare, iso_c, iso_cts, magnitude_of_share, task_arithmetic, ties, tsv_merge
from .rounding import round_to_bits

__all__ = [
    "CoSpaDi",
    "ConcreteMasks",
    "ConcreteMerging",
    "Factorisation",
    "LayerReport",
    "MergedModule",
    "allocate",
    "average",
    "dare",
    "dictionary_sizes",
    "error_curve",
    "factorise",
    "iso_c",
    "iso_cts",
    "magnitude_of_share",
    "round_to_bits",
    "task_arithmetic",
    "ties",
    "tsv_merge",
]
