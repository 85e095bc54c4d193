"""Shorter embeddings from arrays and from models: cut, then scale to unit length again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from subspan.base import as_tensor, check_finite, like
from subspan.geometry import prefix


def truncate(model_or_array: Any, m: int, *, normalize: bool = True) -> Any:
    """The first m coordinates of rows, or a model that gives only these.

    Parameters
    ----------
    model_or_array
        An array or tensor (…, d), numpy or torch as given; a torch module with an output (…, d); or an object with
        `encode`, such as a sentence encoder.
    m
        Coordinates that are kept.
    normalize
        Scale what is left to unit length.

    Returns
    -------
    Rows (…, m) in the kind of the input; of a model a `Truncated`.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import truncate
    >>> truncate(torch.tensor([[0.0, 2.0, 5.0, 1.0]]), 2).tolist()
    [[0.0, 1.0]]
    >>> tuple(truncate(torch.nn.Linear(3, 8), 2)(torch.randn(5, 3)).shape)
    (5, 2)
    """
    if isinstance(model_or_array, nn.Module) or hasattr(model_or_array, "encode"):
        return Truncated(model_or_array, m, normalize=normalize)
    rows = check_finite(as_tensor(model_or_array, "model_or_array"), "model_or_array")
    result = prefix(rows, m, normalize=normalize)
    return like(result.clone() if not normalize else result, model_or_array)


class Truncated(nn.Module):
    """A model whose embeddings are cut to m coordinates; everything else is the model's own.

    Parameters
    ----------
    model, m, normalize
        As in `truncate`.

    Raises
    ------
    ValueError
        For m < 1.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import Truncated
    >>> short = Truncated(torch.nn.Linear(3, 8), 2)(torch.randn(5, 3))
    >>> torch.allclose(short.norm(dim=1), torch.ones(5))
    True
    """

    def __init__(self, model: Any, m: int, *, normalize: bool = True) -> None:
        super().__init__()
        if m < 1:
            raise ValueError(f"m: must be at least 1, got {m}")
        self.model = model
        self.m = m
        self.normalize = normalize

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The model's output, cut; of an output with `pooler_output` or `last_hidden_state`, that entry."""
        output = self.model(*arguments, **options)
        for name in ("pooler_output", "last_hidden_state"):
            found = getattr(output, name, None)
            if isinstance(found, Tensor):
                output = found
                break
        if not isinstance(output, Tensor):
            raise TypeError(f"model: its output is {type(output).__name__}, a tensor of embeddings is needed")
        return prefix(output, self.m, normalize=self.normalize)

    def encode(self, items: Iterable[Any], *arguments: Any, **options: Any) -> Any:
        """The model's `encode`, cut."""
        return truncate(self.model.encode(items, *arguments, **options), self.m, normalize=self.normalize)

    def iterate(self, items: Iterable[Any], *arguments: Any, **options: Any) -> Iterator[np.ndarray]:
        """The model's `iterate`, cut block by block."""
        for block in self.model.iterate(items, *arguments, **options):
            yield truncate(block, self.m, normalize=self.normalize)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"m={self.m}, normalize={self.normalize}"
