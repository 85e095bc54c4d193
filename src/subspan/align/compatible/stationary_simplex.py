"""Stationary representations: models that change for years against a classifier that never does (Biondi et al., 2024).

`SimplexClassifier` is that classifier; here are a model's conversion to it and the memory of earlier tasks. Training
over tasks and replacements is `subspan.align.StationaryModule`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Sampler, Subset

from subspan.nn import CompatibleCE, HOCLoss, SimplexClassifier

__all__ = [
    "BalancedBatches",
    "CompatibleCE",
    "HOCLoss",
    "Rehearsal",
    "SimplexClassifier",
    "make_stationary",
]


def make_stationary(
    model: nn.Module,
    layer: str,
    num_classes: int,
    *,
    preallocated: int = 1024,
    index: str = "front",
) -> SimplexClassifier:
    """Put a `SimplexClassifier` in the place of a model's last linear layer, in place, and return it.

    Parameters
    ----------
    model
        Changed in place.
    layer
        Dotted name of the layer, such as "fc" or "classifier.1".
    num_classes, preallocated, index
        See `SimplexClassifier`.

    Returns
    -------
    SimplexClassifier

    Raises
    ------
    ValueError
        Where the layer is missing or not linear.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import make_stationary
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> head = make_stationary(model, "2", 3, preallocated=16)
    >>> model[2] is head
    True
    """
    parent_name, _, name = layer.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        old = getattr(parent, name)
    except AttributeError:
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(f"layer: the model has no {layer!r}; its linear layers are {linear}") from None
    if not isinstance(old, nn.Linear):
        raise ValueError(f"layer: {layer!r} is {type(old).__name__}, a linear layer is needed")
    head = SimplexClassifier(num_classes, old.in_features, preallocated=preallocated, index=index)
    setattr(parent, name, head.to(old.weight.device, old.weight.dtype))
    return head


class Rehearsal:
    """A random memory of items of every class seen; items stay in the data sets that they came from.

    The same seed keeps the same items on every process.

    Parameters
    ----------
    per_class
        Items kept of every class.
    random_state
        Of the draws.

    Raises
    ------
    ValueError
        For per_class < 1.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import Rehearsal
    >>> data = torch.utils.data.TensorDataset(torch.arange(10))
    >>> memory = Rehearsal(2)
    >>> memory.remember(data, [0] * 5 + [1] * 5)
    >>> len(memory.joined(data))  # ten items and two of each class
    14
    """

    def __init__(self, per_class: int = 20, *, random_state: int = 0) -> None:
        if per_class < 1:
            raise ValueError(f"per_class: must be at least 1, got {per_class}")
        self.per_class = per_class
        self.generator = torch.Generator().manual_seed(random_state)
        self.parts: list[Subset[Any]] = []
        self.classes: set[int] = set()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def remember(self, data: Dataset[Any], labels: Any) -> None:
        """Draw items of the classes of `labels`, one a row of `data`, that are not in the memory yet."""
        classes = torch.as_tensor(labels)
        chosen = []
        for label in classes.unique().tolist():
            if label in self.classes:
                continue
            rows = (classes == label).nonzero()[:, 0]
            order = torch.randperm(len(rows), generator=self.generator)
            chosen += rows[order[: self.per_class]].tolist()
            self.classes.add(label)
        if chosen:
            self.parts.append(Subset(data, chosen))

    def joined(self, data: Dataset[Any]) -> ConcatDataset[Any]:
        """`data`, then the memory."""
        return ConcatDataset([data, *self.parts])


class BalancedBatches(Sampler[list[int]]):
    """Batches of row numbers, half new rows [0, n_new) and half memory [n_new, n_new + n_memory).

    An epoch is one pass over the new rows; the memory is drawn with repetition where it is smaller. Without a memory
    all rows are new. In a torch.distributed group every process takes its share of the batches, the same number each
    (Lightning's Trainer needs use_distributed_sampler=False).

    Parameters
    ----------
    n_new, n_memory
        Numbers of rows.
    batch_size
        At least 2.
    random_state
        Of the draws.

    Raises
    ------
    ValueError
        For n_new < 1, n_memory < 0 or batch_size < 2.

    Examples
    --------
    >>> from subspan.align import BalancedBatches
    >>> batches = list(BalancedBatches(8, 3, batch_size=4))
    >>> [sum(row >= 8 for row in batch) for batch in batches]  # rows of the memory
    [2, 2, 2, 2]
    """

    def __init__(self, n_new: int, n_memory: int, batch_size: int = 128, *, random_state: int = 0) -> None:
        if n_new < 1 or n_memory < 0:
            raise ValueError(f"n_new, n_memory: expected at least 1 and 0, got {n_new} and {n_memory}")
        if batch_size < 2:
            raise ValueError(f"batch_size: must be at least 2, got {batch_size}")
        self.n_new, self.n_memory = n_new, n_memory
        self.batch_size = batch_size
        self.random_state = random_state
        self.epoch = 0

    @property
    def _new_per_batch(self) -> int:
        return self.batch_size - self.batch_size // 2 if self.n_memory else self.batch_size

    def __len__(self) -> int:
        return -(-self.n_new // (self._new_per_batch * _process()[1]))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.random_state + self.epoch)
        self.epoch += 1
        remembered = self._memory(generator)
        batches = []
        for rows in torch.randperm(self.n_new, generator=generator).split(self._new_per_batch):
            old = [next(remembered) for _ in range(len(rows))] if self.n_memory else []
            batches.append([*rows.tolist(), *old])
        rank, world = _process()
        for step in range(len(self)):
            # Where the batches do not divide evenly, the first ones come twice.
            yield batches[(step * world + rank) % len(batches)]

    def _memory(self, generator: torch.Generator) -> Iterator[int]:
        while self.n_memory:
            yield from (torch.randperm(self.n_memory, generator=generator) + self.n_new).tolist()


def _process() -> tuple[int, int]:
    """Number of this process and of all."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
