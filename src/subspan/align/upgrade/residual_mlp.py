"""The small network on top of a linear map between embedding spaces, trained through Lightning (extra: train)."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import require
from subspan.geometry import AffineMap
from subspan.nn.training import quiet_trainer
from subspan.solvers import nearest

if TYPE_CHECKING:
    from lightning import LightningModule
else:
    LightningModule = require("lightning", extra="train").LightningModule

_HIDDEN = 256
_LARGEST_BATCH = 256
_EPOCHS = 30
_PATIENCE = 4


class ResidualMLP(LightningModule):
    """y ≈ A(x) + W₂ GELU(W₁ x + b₁) + b₂ with the affine map A fixed; W₂ begins at zero, so training begins at A.

    The loss is the squared error relative to the variance of y. `validation` (x, y): rows whose recall@k stops the
    training; the network with the best recall is kept, A itself if none is better.
    """

    matrix: Tensor
    offset: Tensor

    def __init__(
        self,
        affine: AffineMap,
        *,
        spread: float,
        validation: tuple[Tensor, Tensor],
        gallery: Float[Tensor, "m d_y"],
        k: int,
        metric: str,
        target: str,
        hidden: int = _HIDDEN,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        d_out, d_in = affine.matrix.shape
        self.register_buffer("matrix", affine.matrix.float())
        bias = affine.matrix.new_zeros(d_out) if affine.bias is None else affine.bias
        self.register_buffer("offset", bias.float())
        self.first, self.second = nn.Linear(d_in, hidden), nn.Linear(hidden, d_out)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)
        self.spread = spread
        self.learning_rate = learning_rate
        self._x, self._y = validation
        self._gallery, self._k, self._metric, self._target = gallery, k, metric, target
        self._truth = nearest(self._y, gallery, k, metric=metric)[1]

    def forward(self, x: Float[Tensor, "n d_x"]) -> Float[Tensor, "n d_y"]:
        """Mapped rows."""
        return F.linear(x, self.matrix, self.offset) + self.second(F.gelu(self.first(x)))

    def training_step(self, batch: Any, batch_index: int = 0) -> Tensor:
        """Mean squared error over the variance of y."""
        x, y = batch
        return (self(x) - y).square().sum(-1).mean() / self.spread

    def validation_step(self, batch: Any, batch_index: int = 0) -> None:
        """Recall of the held-out rows."""
        found = nearest(self(self._x), self._gallery, self._k, metric=self._metric)[1]
        truth = self._truth[:, :1] if self._target == "pair" else self._truth
        recall = (found.unsqueeze(1) == truth.unsqueeze(2)).any(-1).float().mean()
        self.log("recall", recall, batch_size=1)

    def configure_optimizers(self) -> Any:
        """AdamW."""
        learnt = [*self.first.parameters(), *self.second.parameters()]
        return torch.optim.AdamW(learnt, lr=self.learning_rate, weight_decay=1e-2)


def train_residual(
    affine: AffineMap,
    x: Float[Tensor, "n d_x"],
    y: Float[Tensor, "n d_y"],
    *,
    k: int = 10,
    metric: str = "cosine",
    target: str = "neighbours",
    seed: int = 0,
    epochs: int = _EPOCHS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train on 85 % of the rows, stop by the recall of the rest; weights of the network's two layers."""
    callbacks: Any = require("lightning.pytorch.callbacks", extra="train")
    x, y = x.float(), y.float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        held, kept = order[: len(x) * 15 // 100], order[len(x) * 15 // 100 :]
        model = ResidualMLP(
            affine,
            spread=float(y.var(0).sum()),
            validation=(x[held], y[held]),
            gallery=y,
            k=min(k, len(y)),
            metric=metric,
            target=target,
        )
        train: Any = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x[kept], y[kept]),
            # Small samples get small batches, or an epoch would be a handful of steps.
            min(_LARGEST_BATCH, max(16, len(kept) // 32)),
            shuffle=True,
            drop_last=True,
        )
        once: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1)))
        with tempfile.TemporaryDirectory() as folder:
            best = callbacks.ModelCheckpoint(folder, monitor="recall", mode="max", save_weights_only=True)
            stop = callbacks.EarlyStopping("recall", mode="max", patience=_PATIENCE)
            options: Any = {"callbacks": [best, stop], "enable_checkpointing": True, "num_sanity_val_steps": 0}
            with quiet_trainer(max_epochs=epochs, **options) as trainer:
                before = trainer.validate(model, once, verbose=False)[0]["recall"]
                trainer.fit(model, train, once)
            state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
            if best.best_model_score is not None and float(best.best_model_score) <= before:
                state |= {name: torch.zeros_like(state[name]) for name in ("second.weight", "second.bias")}
    names = ("first.weight", "first.bias", "second.weight", "second.bias")
    first, first_bias, second, second_bias = (state[name].double() for name in names)
    return first, first_bias, second, second_bias
