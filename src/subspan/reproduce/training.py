"""How a protocol trains a network: an `Objective` and Lightning's Trainer, the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from subspan.base import save_arrays, saved_object
from subspan.base.saved import set_state
from subspan.datasets import fingerprint
from subspan.datasets.cache import entry_folder, whole_folder
from subspan.nn.training import quiet_trainer

Model = TypeVar("Model", bound=nn.Module)


def kept(model: Model, kind: str, key: Any, train: Callable[[], object]) -> Model:
    """The model with the weights that `train` gives it, from the cache folder where it was trained before.

    kind: name of the folder, and of the sort of file. key: all that the weights depend on, the model as it starts with
    it. The model comes back in evaluation mode and frozen.
    """
    path = entry_folder(kind, fingerprint(key)) / "model.safetensors"
    with whole_folder(path.parent) as unfinished:
        if unfinished is not None:
            train()
            save_arrays(unfinished / path.name, kind, model.state_dict())
    with saved_object(path, kind, {"*": Shaped[Tensor, "..."]}) as (state, _):
        set_state(model, state)
    return model.eval().requires_grad_(False)


def shuffled(*columns: Tensor, batch_size: int, seed: int) -> DataLoader[Any]:
    """Batches (tuples) of the rows of tensors, in an order that follows the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(*columns), batch_size, shuffle=True, generator=generator)


def one_cycle(rise: float = 0.3) -> Callable[[Any, int], OneCycleLR]:
    """One cycle of rate and momentum; `rise`: share of the steps in which the rate grows."""

    def schedule(optimizer: Any, steps: int) -> OneCycleLR:
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, rates, total_steps=steps, pct_start=rise)

    return schedule


def cosine(optimizer: Any, steps: int) -> CosineAnnealingLR:
    """The rate falls to 0 along half a cosine."""
    return CosineAnnealingLR(optimizer, steps)


def train(
    model: Model,
    loss: Callable[[Any, Any], Any],
    batches: Iterable[Any],
    *,
    learning_rate: float,
    epochs: int | None = 1,
    steps: int = -1,
    optimizer: str = "adam",
    clip: float | None = None,
    collate: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Model:
    """Train the parameters of a network that require gradients, and return it in evaluation mode.

    Parameters
    ----------
    loss : callable
        Of the model and a batch.
    batches : DataLoader or iterable
        Of other than a DataLoader, every item is a whole batch, in its order, or becomes one by `collate`.
    epochs, steps : int
        Passes over the batches; steps, where given, ends the training (with epochs=None that alone).
    clip : float, optional
        Largest norm of the gradient.
    **options
        Of `subspan.nn.Objective`: weight_decay, betas, schedule (`one_cycle(rise)`, `cosine`), after_step, …
    """
    from subspan.nn.objective import Objective

    if not isinstance(batches, DataLoader):
        whole: Any = list(batches)
        batches = DataLoader(whole, batch_size=None, collate_fn=collate)
    objective = Objective(model, loss, optimizer=optimizer, learning_rate=learning_rate, **options)
    with quiet_trainer(max_epochs=epochs, max_steps=steps, gradient_clip_val=clip) as trainer:
        trainer.fit(objective, batches)
    return model.eval()
