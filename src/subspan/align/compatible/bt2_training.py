"""Training an embedding that stays compatible with an older one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import save_arrays, saved_object
from subspan.base.modules import evaluation
from subspan.base.saved import set_state

if TYPE_CHECKING:
    from subspan.nn import Objective

_SPACES = ("full", "compatible")


class BackwardCompatibleModule(nn.Module):
    """Backbone and compatible head, trained against cached teachers; afterwards `encode` gives either space.

    Batches are those of `TeacherDataset`; `Trainer.fit(module.objective(), dataset.loader(…))` trains (extra: train).

    Parameters
    ----------
    backbone
        Inputs → pooled features.
    head
        Pooled features → an output with `full` and `compatible`, such as `BT2Head`.
    loss
        (output, labels, old, new) → total and a dict of terms, such as `BT2Loss`.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import BackwardCompatibleModule, BT2Head, BT2Loss
    >>> head, loss = BT2Head(16, 8, 6, k=2, num_classes=3), BT2Loss(torch.randn(3, 6))
    >>> module = BackwardCompatibleModule(torch.nn.Linear(4, 16), head, loss)
    >>> tuple(module.encode(torch.randn(5, 4), "compatible").shape)
    (5, 6)
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head, self.loss = backbone, head, loss

    def training_loss(self, batch: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss of one batch (inputs, class numbers, old features, new features), and its terms."""
        inputs, labels, old, new = batch
        return self.loss(self.head(self.backbone(inputs)), labels, old, new)

    def objective(
        self, *, learning_rate: float = 1e-3, weight_decay: float = 2**-15, warmup: float = 0.05
    ) -> Objective:
        """For a Trainer (extra: train): Adam (weight_decay is an L2 term, as published), a warm-up, a cosine to zero.

        warmup: share of the steps. Raises ValueError for values out of range.
        """
        from subspan.nn import Objective

        return Objective(
            self,
            BackwardCompatibleModule.training_loss,
            optimizer="adam",
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule="cosine",
            warmup=float(warmup),
        )

    @torch.no_grad()
    def encode(self, inputs: Any, space: str = "full") -> Float[Tensor, "n d"]:
        """Vectors of inputs: "full" for new galleries (inner product), "compatible", of unit length, for old ones."""
        if space not in _SPACES:
            raise ValueError(f"space: expected one of {_SPACES}, got {space!r}")
        with evaluation(self):
            out = self.head(self.backbone(inputs))
        return out.full if space == "full" else F.normalize(out.compatible, dim=-1)

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Write backbone and head to a safetensors file, whole or not at all."""
        save_arrays(path, "backward-compatible", self._encoder().state_dict())

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Read what `save_weights` wrote. Raises ValueError when it is another file or does not fit."""
        with saved_object(path, "backward-compatible", {"*": Shaped[Tensor, "..."]}) as (arrays, _):
            set_state(self._encoder(), arrays)

    def _encoder(self) -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})
