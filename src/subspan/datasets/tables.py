"""Tables of embeddings in files; the reader stands on the ground floor, as streams of rows need it too."""

from subspan.base import FiniteCheck, Table, read_table
from subspan.base.array_files import ArrayRows
from subspan.base.rows import Rows

__all__ = ["ArrayRows", "FiniteCheck", "Rows", "Table", "read_table"]
