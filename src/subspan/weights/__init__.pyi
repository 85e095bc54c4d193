from .concrete_merging import ConcreteMasks, ConcreteMerging
from .merged_module import MergedModule
from .merging import average, dare, iso_c, iso_cts, magnitude_of_share, task_arithmetic, ties, tsv_merge

__all__ = [
    "ConcreteMasks",
    "ConcreteMerging",
    "MergedModule",
    "average",
    "dare",
    "iso_c",
    "iso_cts",
    "magnitude_of_share",
    "task_arithmetic",
    "ties",
    "tsv_merge",
]
