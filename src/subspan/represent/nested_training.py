"""Training of nested adapters by an `Objective`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from subspan.nn import MatryoshkaLinear, MatryoshkaLogitLoss, MatryoshkaLoss, info_nce

if TYPE_CHECKING:
    from subspan.nn import Objective

_OBJECTIVES = ("labels", "pairs", "similarity")


def similarity_loss(z: Float[Tensor, "n m"], cosines: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Mean squared error of the cosines between rows of z, the diagonal left out."""
    error = (F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).mT - cosines).square()
    return (error.sum() - error.diagonal().sum()) / (len(z) * (len(z) - 1))


class NestedTraining(torch.nn.Module):
    """An adapter (any module with rows in and nested coordinates out) and its nested objective.

    `Trainer.fit(module.objective(…), batches)` trains (extra: train).

    Parameters
    ----------
    adapter
        Rows (n, d) → coordinates (n, max(dims)).
    objective
        "labels", batches (x, class numbers), one head a prefix (`heads`); "pairs", batches (x, paired x), symmetric
        InfoNCE; "similarity", batches (x,), every prefix keeps the cosines of x.
    dims
        Sizes of the prefixes.
    weights
        None for equal ones, "inverse" or one number a size.
    num_classes
        Of "labels".
    efficient
        Heads share a weight (MRL-E).
    temperature
        Of "pairs".
    dims_per_step
        Sizes drawn for each step; None for all.

    Raises
    ------
    ValueError
        For another objective, or a temperature that is not positive.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import NestedTraining
    >>> module = NestedTraining(torch.nn.Identity(), "similarity", dims=[4])
    >>> bool(module.training_loss([torch.randn(8, 4)]).abs() < 1e-6)  # all coordinates keep all cosines
    True
    """

    def __init__(
        self,
        adapter: torch.nn.Module,
        objective: str,
        *,
        dims: Sequence[int],
        weights: str | Sequence[float] | None = None,
        num_classes: int = 0,
        efficient: bool = False,
        temperature: float = 0.05,
        dims_per_step: int | None = None,
    ) -> None:
        super().__init__()
        if objective not in _OBJECTIVES:
            raise ValueError(f"objective: expected one of {_OBJECTIVES}, got {objective!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.adapter: Any = adapter
        self.kind = objective
        self.temperature = temperature
        self.heads: Any = None
        options: Any = {"weights": weights, "normalize": True, "dims_per_step": dims_per_step}
        if objective == "labels":
            self.heads = MatryoshkaLinear(dims, num_classes, efficient=efficient)
            self.nested_loss: Any = MatryoshkaLogitLoss(dims, weights=weights)
        elif objective == "pairs":
            self.nested_loss = MatryoshkaLoss(self._contrast, dims, embeddings=(0, 1), **options)
        else:
            self.nested_loss = MatryoshkaLoss(similarity_loss, dims, embeddings=(0,), **options)

    def _contrast(self, x: Tensor, y: Tensor) -> Tensor:
        return info_nce(x, y, temperature=self.temperature, symmetric=True)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
        """Nested coordinates."""
        return self.adapter(x)

    def training_loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """The nested loss of one batch."""
        z = self.adapter(batch[0])
        if self.kind == "labels":
            return self.nested_loss(self.heads(z), batch[1])
        if self.kind == "pairs":
            return self.nested_loss(z, self.adapter(batch[1]))
        rows = F.normalize(batch[0], dim=-1)
        return self.nested_loss(z, rows @ rows.mT)

    def objective(self, *, learning_rate: float = 3e-3, weight_decay: float = 1e-4) -> Objective:
        """For a Trainer (extra: train): AdamW; the learning rate falls to zero along a cosine."""
        from subspan.nn import Objective

        options = {"learning_rate": learning_rate, "weight_decay": weight_decay, "schedule": "cosine"}
        return Objective(self, NestedTraining.training_loss, **options)
