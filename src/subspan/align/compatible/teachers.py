"""What a compatible model learns from: features of frozen teachers, their class means, and both beside the inputs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from subspan.base import as_tensor, check_finite, check_matrix, normalize_rows
from subspan.base.files import atomic_write, new_array
from subspan.statistics import GroupedMoments

_BLOCK = 8192
_UNIT_TOLERANCE = 1e-3
# A unit row twice, in half precision and batches of other sizes, is nearer than this.
_KEPT_TOLERANCE = 0.05


def old_class_means(
    old: Any, labels: Any, num_classes: int | None = None, *, missing: str = "raise"
) -> Float[Tensor, "c d_old"]:
    """Mean of an old model's unit features in each class, not scaled to one: the rows of the influence loss.

    Parameters
    ----------
    old
        Unit features (n, d_old); read in blocks.
    labels
        Class numbers (n,).
    num_classes
        None: the largest number + 1.
    missing
        A class without a sample raises ValueError ("raise"), or has a row of zeros ("drop"), which leaves it out of
        `influence_loss`.

    Returns
    -------
    Tensor, (classes, d_old).

    Raises
    ------
    ValueError
        For labels that are no class number a row.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import old_class_means
    >>> old_class_means(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), [0, 0, 1]).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    if missing not in ("raise", "drop"):
        raise ValueError(f"missing: expected 'raise' or 'drop', got {missing!r}")
    numbers = as_tensor(labels, "labels", ndim=1, floating=False)
    if numbers.is_floating_point() or len(numbers) != len(old) or not len(numbers):
        raise ValueError(f"labels: expected {len(old)} class numbers, got {tuple(numbers.shape)}, {numbers.dtype}")
    count = int(numbers.max()) + 1 if num_classes is None else num_classes
    if not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
        raise ValueError(f"labels: must lie in 0 … {count - 1}, got {int(numbers.min())} … {int(numbers.max())}")
    moments = GroupedMoments(int(old.shape[1]))
    for start in range(0, len(old), _BLOCK):
        rows = check_matrix(old[start : start + _BLOCK], "old")
        moments.update(normalize_rows(rows.double()), numbers[start : start + _BLOCK])
    means = torch.zeros(count, int(old.shape[1]), dtype=torch.float64)
    means[torch.tensor(moments.groups)] = moments.means.to(means)
    absent = sorted(set(range(count)) - set(moments.groups))
    if absent and missing == "raise":
        raise ValueError(
            f"labels: no sample of class {absent[0]} ({len(absent)} such classes); missing='drop' leaves them out"
        )
    return means.float()


@torch.no_grad()
def teacher_features(
    encoder: Callable[[Any], Tensor], inputs: Any, path: str | os.PathLike[str], *, batch_size: int = 256
) -> np.ndarray:
    """Unit float32 features of a frozen encoder, computed once, kept in a file as a memory map.

    The file is one encoder's on one data set; where it exists it is read, not computed, but for its first and last row,
    which must be what the encoder gives. Written whole or not at all.

    Parameters
    ----------
    encoder
        A batch of inputs → features (b, d).
    inputs
        An array or tensor (n, …), read in batches in order: deterministic views, the same that the student sees.
    path
        The file, .npy.
    batch_size
        Inputs a call of the encoder.

    Returns
    -------
    numpy memory map, (n, d).

    Raises
    ------
    ValueError
        For NaN in the features, or a file of another encoder or of other inputs.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from subspan.align import teacher_features
    >>> features = teacher_features(torch.nn.Linear(4, 3).eval(), torch.randn(10, 4), "teacher.npy")
    >>> features.shape, bool(np.allclose(np.linalg.norm(features, axis=1), 1))
    ((10, 3), True)
    """
    file = Path(path)
    if file.suffix != ".npy":
        raise ValueError(f"path: expected a name that ends in .npy, got {str(path)!r}")

    def features(start: int, stop: int) -> np.ndarray:
        rows = check_finite(encoder(as_tensor(inputs[start:stop], "inputs", floating=False)), "encoder")
        return normalize_rows(rows.float()).cpu().numpy()

    kept = file.is_file()
    if not kept:
        with atomic_write(file) as temporary:
            stored = None
            for start in range(0, len(inputs), batch_size):
                rows = features(start, start + batch_size)
                if stored is None:
                    stored = new_array(temporary, np.float32, (len(inputs), rows.shape[1]))
                stored[start : start + len(rows)] = rows
            if stored is None:
                raise ValueError("inputs: there is none")
            stored.flush()
            del stored
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"path: {str(path)!r} is not a readable .npy file ({error})") from error
    if found.ndim != 2 or len(found) != len(inputs):
        raise ValueError(f"path: {str(path)!r} holds shape {found.shape}, expected {len(inputs)} rows; delete it")
    for row in (0, len(inputs) - 1) if kept else ():
        given = features(row, row + 1)[0]
        if given.shape != found[row].shape or np.linalg.norm(given - found[row]) > _KEPT_TOLERANCE:
            raise ValueError(f"path: {str(path)!r} is of another encoder or of other inputs (row {row}); delete it")
    return found


class TeacherDataset(Dataset):
    """Items (input, class number, old teacher's unit features, new teacher's), for training a compatible model.

    `loader` reads whole batches at once.

    Parameters
    ----------
    inputs
        Array, tensor or sequence of n items.
    labels
        (n,), any sortable ids; the attribute `classes` holds them in the order of the class numbers.
    old, new
        (n, d_old) and (n, d_new), arrays or memory maps; rows that are not of unit length are scaled, with a warning.

    Raises
    ------
    ValueError
        For NaN or unequal numbers of rows.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import TeacherDataset
    >>> unit = lambda d: torch.nn.functional.normalize(torch.randn(4, d), dim=1)
    >>> data = TeacherDataset(torch.randn(4, 3, 8, 8), ["cat", "dog", "cat", "dog"], unit(6), unit(8))
    >>> inputs, numbers, old, new = next(iter(data.loader(4, shuffle=False)))
    >>> numbers.tolist(), tuple(old.shape), tuple(new.shape)
    ([0, 1, 0, 1], (4, 6), (4, 8))
    """

    def __init__(self, inputs: Any, labels: Any, old: Any, new: Any) -> None:
        names = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if names.shape != (len(inputs),):
            raise ValueError(f"labels: expected {len(inputs)} labels, got shape {names.shape}")
        self.inputs = inputs
        self.classes, numbers = np.unique(names, return_inverse=True)
        self.labels: Int[Tensor, " n"] = torch.from_numpy(numbers.astype(np.int64).reshape(-1))
        self.teachers = tuple(_teacher(rows, name, len(inputs)) for rows, name in ((old, "old"), (new, "new")))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Any, Tensor, Tensor, Tensor]:
        old, new = (_read(rows, [index])[0] for rows in self.teachers)
        return self.inputs[index], self.labels[index], old, new

    def __getitems__(self, indices: list[int]) -> tuple[Any, Tensor, Tensor, Tensor]:
        """A whole batch; what a loader asks for."""
        if isinstance(self.inputs, Tensor):
            items = self.inputs[torch.as_tensor(indices)]
        elif isinstance(self.inputs, np.ndarray):
            items = torch.from_numpy(np.array(self.inputs[indices]))
        else:
            items = torch.utils.data.default_collate([self.inputs[index] for index in indices])
        old, new = (_read(rows, indices) for rows in self.teachers)
        return items, self.labels[torch.as_tensor(indices)], old, new

    def loader(self, batch_size: int = 128, *, shuffle: bool = True, **options: Any) -> DataLoader:
        """A loader of this data set; `options` go to `DataLoader`."""
        return DataLoader(self, batch_size, shuffle=shuffle, collate_fn=_as_read, **options)


def _as_read(batch: Any) -> Any:
    return batch


def _read(rows: np.ndarray, indices: list[int]) -> Float[Tensor, "b d"]:
    return normalize_rows(torch.from_numpy(np.array(rows[indices], dtype=np.float32)))


def _teacher(rows: Any, name: str, count: int) -> np.ndarray:
    values = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else np.asanyarray(rows)
    if values.ndim != 2 or len(values) != count:
        raise ValueError(f"{name}: expected {count} rows of features, got shape {values.shape}")
    off = 0.0
    for start in range(0, count, _BLOCK):
        block = check_matrix(values[start : start + _BLOCK], name).float()
        off = max(off, float((torch.linalg.vector_norm(block, dim=1) - 1).abs().max()))
    if off > _UNIT_TOLERANCE:
        warnings.warn(f"{name}: rows are not of unit length (off by up to {off:.2g}); they are scaled", stacklevel=3)
    return values
