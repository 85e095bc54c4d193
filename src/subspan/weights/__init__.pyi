from .concrete_merging import ConcreteMasks, ConcreteMerging
from .factorising import Factorisation, dense_weight, dictionary_sizes, factorise, round_to_bits
from .merged_module import MergedModule
from .merging import average, dare, iso_c, iso_cts, magnitude_of_share, task_arithmetic, ties, tsv_merge

__all__ = [
    "ConcreteMasks",
    "ConcreteMerging",
    "Factorisation",
    "MergedModule",
    "average",
    "dare",
    "dense_weight",
    "dictionary_sizes",
    "factorise",
    "iso_c",
    "iso_cts",
    "magnitude_of_share",
    "round_to_bits",
    "task_arithmetic",
    "ties",
    "tsv_merge",
]
