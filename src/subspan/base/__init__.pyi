from .arrays import as_tensor, check_finite, check_matrix, like, normalize_rows
from .extras import require
from .progress import Progress, silent
from .rows import FiniteCheck, Table
from .saved import save_arrays, saved_object
from .tables import read_table

__all__ = [
    "FiniteCheck",
    "Progress",
    "Table",
    "as_tensor",
    "check_finite",
    "check_matrix",
    "like",
    "normalize_rows",
    "read_table",
    "require",
    "save_arrays",
    "saved_object",
    "silent",
]
