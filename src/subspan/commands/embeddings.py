"""What a report describes: rows of numbers, with what is known about each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, in [0, 1]."""

_BLOCK_BYTES = 32 << 20
_BATCH_ROWS = 4096


def silent(message: str, fraction: float) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Embeddings:
    """Rows (n, d), in memory or memory-mapped, and their labels, texts, images and ids where there are any.

    name: as in a heading. argument, label_argument: what the command line calls the rows and the labels. reading,
    pairing: the options that say which columns hold the rows, and which their ids. source: where the rows come from,
    in a sentence. stored_dtype: where it is not that of `rows`.
    dropped: rows with NaN or infinity that were left out on request.
    """

    rows: Float[np.ndarray, "n d"]
    name: str
    argument: str = ""
    source: str = ""
    labels: Shaped[np.ndarray, " m"] | None = None
    label_name: str = "label"
    label_argument: str = ""
    reading: tuple[str, ...] = ()
    pairing: tuple[str, ...] = ()
    texts: Sequence[str] | None = None
    images: Sequence[Any] | None = None
    ids: Sequence[str] | None = None
    dropped: int = 0
    stored_dtype: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("labels", "texts", "images", "ids"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.rows):
                raise ValueError(f"{name}: {len(value)} entries for {len(self.rows)} rows of {self.name}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        """Number of columns."""
        return int(self.rows.shape[1])

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, Float[np.ndarray, "m d"]]]:
        """(index of its first row, copy as float32 or float64) of consecutive blocks of `size` rows, or of 32 MB."""
        size = size or max(1, _BLOCK_BYTES // (self.dim * 4))
        for start in range(0, len(self.rows), size):
            yield start, working_precision(self.rows[start : start + size])

    def batches(self, chosen: Bool[np.ndarray, " n"] | None = None) -> Iterator[Float[Tensor, "m d"]]:
        """The rows, or those of a mask, as tensors; two embeddings of the same rows give batches of the same sizes."""
        for start, block in self.blocks(_BATCH_ROWS):
            yield torch.from_numpy(block if chosen is None else block[chosen[start : start + len(block)]])

    def take(self, index: Shaped[np.ndarray, " m"]) -> Float[np.ndarray, "m d"]:
        """Chosen rows as float32 or float64, read in the order in which they lie in the file."""
        order = np.argsort(index, kind="stable")
        rows = np.empty((len(index), self.dim), dtype=working_precision(self.rows[:0]).dtype)
        rows[order] = self.rows[np.asarray(index)[order]]
        return rows

    def subset(self, kept: Int[np.ndarray, " m"]) -> Embeddings:
        """The data of some rows alone."""
        places = kept.tolist()

        def chosen(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[row] for row in places]

        return replace(
            self,
            rows=self.take(kept),
            labels=None if self.labels is None else self.labels[kept],
            texts=chosen(self.texts),
            images=chosen(self.images),
            ids=[self.row_name(row) for row in places],
        )

    def row_name(self, index: int) -> str:
        """The id of a row, else its number."""
        return f"row {index}" if self.ids is None else str(self.ids[index])


def working_precision(rows: np.ndarray) -> np.ndarray:
    """A writable copy of the rows in native order, as float64 where they were that, else as float32."""
    return np.array(rows, dtype=np.float64 if rows.dtype.itemsize >= 8 else np.float32, order="C")
