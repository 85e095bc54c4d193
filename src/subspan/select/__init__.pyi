from .leverage import LeverageSelector, inclusion_probabilities, rank_rows, select_rows
from .retention import RetentionCurve, reconstruction_error, retention, retention_curve
from .scalselect import ScalSelect

__all__ = [
    "LeverageSelector",
    "RetentionCurve",
    "ScalSelect",
    "inclusion_probabilities",
    "rank_rows",
    "reconstruction_error",
    "retention",
    "retention_curve",
    "select_rows",
]
