"""The small network on top of a linear map between embedding spaces, trained by an `Objective` (extra: train)."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import require
from subspan.geometry import AffineMap
from subspan.nn import Objective
from subspan.nn.training import quiet_trainer
from subspan.solvers import nearest

_HIDDEN = 256
_LARGEST_BATCH = 256
_EPOCHS = 30
_PATIENCE = 4


class ResidualMLP(nn.Module):
    """y ≈ A(x) + W₂ GELU(W₁ x + b₁) + b₂ with the affine map A fixed; W₂ begins at zero, so training begins at A."""

    matrix: Tensor
    offset: Tensor

    def __init__(self, affine: AffineMap, hidden: int = _HIDDEN) -> None:
        super().__init__()
        d_out, d_in = affine.matrix.shape
        self.register_buffer("matrix", affine.matrix.float())
        bias = affine.matrix.new_zeros(d_out) if affine.bias is None else affine.bias
        self.register_buffer("offset", bias.float())
        self.first, self.second = nn.Linear(d_in, hidden), nn.Linear(hidden, d_out)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Float[Tensor, "n d_x"]) -> Float[Tensor, "n d_y"]:
        """Mapped rows."""
        return F.linear(x, self.matrix, self.offset) + self.second(F.gelu(self.first(x)))


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
    """Train on 85 % of the rows by the squared error over the variance of y; weights of the network's two layers.

    Recall@k of the other rows stops the training; the network with the best is kept, A itself if none is better.
    """
    callbacks: Any = require("lightning.pytorch.callbacks", extra="train")
    x, y = x.float(), y.float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        held, kept = order[: len(x) * 15 // 100], order[len(x) * 15 // 100 :]
        spread, k = float(y.var(0).sum()), min(k, len(y))
        truth = nearest(y[held], y, k, metric=metric)[1]
        wanted = truth[:, :1] if target == "pair" else truth

        def loss(model: ResidualMLP, batch: Any) -> Tensor:
            return (model(batch[0]) - batch[1]).square().sum(-1).mean() / spread

        def recall(model: ResidualMLP, batch: Any) -> dict[str, Tensor]:
            found = nearest(model(x[held]), y, k, metric=metric)[1]
            return {"recall": (found.unsqueeze(1) == wanted.unsqueeze(2)).any(-1).float().mean()}

        model = Objective(ResidualMLP(affine), loss, validation=recall, learning_rate=1e-3, weight_decay=1e-2)
        train: Any = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x[kept], y[kept]),
            # Small samples get small batches, or an epoch would be a handful of steps.
            min(_LARGEST_BATCH, max(16, len(kept) // 32)),
            shuffle=True,
            drop_last=True,
        )
        once: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1)))
        with tempfile.TemporaryDirectory() as folder:
            best = callbacks.ModelCheckpoint(folder, monitor="val_recall", mode="max", save_weights_only=True)
            stop = callbacks.EarlyStopping("val_recall", mode="max", patience=_PATIENCE)
            options: Any = {"callbacks": [best, stop], "enable_checkpointing": True, "num_sanity_val_steps": 0}
            with quiet_trainer(max_epochs=epochs, **options) as trainer:
                before = trainer.validate(model, once, verbose=False)[0]["val_recall"]
                trainer.fit(model, train, once)
            state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
            if best.best_model_score is not None and float(best.best_model_score) <= before:
                state |= {name: torch.zeros_like(state[name]) for name in ("model.second.weight", "model.second.bias")}
    names = ("model.first.weight", "model.first.bias", "model.second.weight", "model.second.bias")
    first, first_bias, second, second_bias = (state[name].double() for name in names)
    return first, first_bias, second, second_bias
