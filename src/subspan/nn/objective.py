"""The one training module: a model, a loss, an optimizer and a schedule, for Lightning's Trainer (extra: train)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from subspan.base import require

from .paired_optimizer import with_riemannian
from .riemannian import GrassmannParameter, RiemannianSGD
from .training import finite_loss

if TYPE_CHECKING:
    from lightning import LightningModule
else:
    LightningModule = require("lightning", extra="train").LightningModule

_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
_SCHEDULES = ("constant", "cosine", "one-cycle")
# What a loss is given by name where it has such a parameter.
_GIVEN = ("step", "batch_index")


class Objective(LightningModule):
    """A model and what is minimised: everything of a training but the batches, for any Lightning Trainer.

    Precision, devices, gradient clipping and accumulation, checkpoints and loggers are the Trainer's; a run resumes
    from its checkpoint. Every term of the loss is logged, and a loss that is not finite ends the run with the number
    of the step.

    Parameters
    ----------
    model
        What is trained: all its parameters that require a gradient.
    loss
        ``loss(model, batch)`` → the loss (a scalar), a dict of terms of which it is the sum, or the loss and a dict of
        terms to log. A module's parameters are trained, and its state saved, with the model's. Parameters named
        ``step`` (optimizer steps taken so far) and ``batch_index`` are given, where the loss has them.
    validation
        As `loss`, for batches of validation, where a dict holds what to log, all of it without a gradient; by default
        the loss itself. Logged as ``val_`` and the name.
    optimizer
        "adamw", "adam", "sgd", or what makes an optimizer of groups of parameters and ``lr``, such as its class.
        `GrassmannParameter`s take geodesic steps beside it.
    learning_rate
        The largest one of the schedule.
    weight_decay
        Of all parameters but planes.
    decay_vectors
        False leaves parameters of one dimension or none (biases, norms) without weight decay.
    groups
        Names of parts of the model → options of their own for the optimizer, such as
        ``{"encoder": {"lr": 1e-5}, "head.bias": {"weight_decay": 0.0}}``; the first name that fits counts.
    manifold_learning_rate
        Of planes; by default `learning_rate`.
    schedule
        "constant"; "cosine", to `final_rate`; "one-cycle", as torch's, momentum left as it is; or a function of the
        optimizer and the number of steps that makes a scheduler. Rates change with every step.
    warmup
        Steps, or the share in [0, 1) of the steps, of a linear rise from nearly nothing ("one-cycle": of its rise).
    final_rate
        Where "cosine" ends, as a share of the learning rate.
    after_step
        ``after_step(model, step)`` once `step` optimizer steps are taken: averages, teachers, a look at the model.
        The training ends where it returns True.
    save_frozen
        False leaves parameters that are not trained out of checkpoints, which are then loaded without them.
    **options
        Of the optimizer: ``betas``, ``momentum``, …

    Attributes
    ----------
    losses
        The mean loss of every epoch, of this process's batches; a list of floats.

    Raises
    ------
    ValueError
        Here for values out of range; in training for a loss that is not finite or of another form.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import Objective
    >>> from subspan.nn.training import quiet_trainer
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = DataLoader(TensorDataset(torch.eye(4), torch.tensor([0, 1, 0, 1])), 4)
    >>> def cross_entropy(model, batch):
    ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> objective = Objective(torch.nn.Linear(4, 2), cross_entropy, learning_rate=0.1, schedule="cosine", warmup=2)
    >>> with quiet_trainer(max_epochs=20) as trainer:
    ...     trainer.fit(objective, data)
    >>> objective.losses[-1] < objective.losses[0]
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        *,
        validation: Callable[..., Any] | None = None,
        optimizer: str | Callable[..., Optimizer] = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        decay_vectors: bool = True,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        manifold_learning_rate: float | None = None,
        schedule: str | Callable[[Optimizer, int], LRScheduler] = "constant",
        warmup: int | float = 0,
        final_rate: float = 0.0,
        after_step: Callable[[Any, int], Any] | None = None,
        save_frozen: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(optimizer, str) and optimizer not in _OPTIMIZERS:
            raise ValueError(f"optimizer: expected one of {tuple(_OPTIMIZERS)} or a callable, got {optimizer!r}")
        if isinstance(schedule, str) and schedule not in _SCHEDULES:
            raise ValueError(f"schedule: expected one of {_SCHEDULES} or a callable, got {schedule!r}")
        for name, value in (("learning_rate", learning_rate), ("manifold_learning_rate", manifold_learning_rate)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: must be positive and finite, got {value}")
        for name, value in (("weight_decay", weight_decay), ("final_rate", final_rate)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: must be 0 or more and finite, got {value}")
        if not warmup >= 0 or (isinstance(warmup, float) and not warmup < 1):
            raise ValueError(f"warmup: must be a number of steps or lie in [0, 1), got {warmup}")
        self.model = model
        self.loss = loss
        self.validation = validation
        self.optimizer, self.learning_rate, self.options = optimizer, learning_rate, options
        self.weight_decay, self.decay_vectors, self.groups = weight_decay, decay_vectors, dict(groups or {})
        self.manifold_learning_rate = manifold_learning_rate
        self.schedule, self.warmup, self.final_rate = schedule, warmup, final_rate
        self.after_step = after_step
        self.save_frozen = save_frozen
        self.strict_loading = save_frozen
        self.losses: list[float] = []
        self._sum, self._count = 0.0, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model says."""
        return self.model(*args, **kwargs)

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Any, batch_index: int = 0) -> Float[Tensor, ""]:
        """The loss of a batch; its terms are logged."""
        total, terms = _parted(self._called(self.loss, batch, batch_index))
        finite_loss(total, self.global_step)
        self.log_dict({**terms, "loss": total.detach()}, prog_bar=True, batch_size=_rows(batch))
        self._sum, self._count = self._sum + float(total.detach()), self._count + 1
        return total

    def validation_step(self, batch: Any, batch_index: int = 0) -> None:
        """The terms of a batch, logged as means over the epoch and over processes."""
        found = self._called(self.validation or self.loss, batch, batch_index)
        if self.validation is None or not isinstance(found, Mapping):
            total, terms = _parted(found)
            found = {**terms, "loss": total}
        named = {f"val_{name}": value for name, value in found.items()}
        self.log_dict(named, prog_bar=True, sync_dist=True, batch_size=_rows(batch))

    def on_train_epoch_end(self) -> None:
        """Keep the mean loss of the epoch."""
        self.losses.append(self._sum / max(1, self._count))
        self._sum, self._count = 0.0, 0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the optimizer, then what follows it."""
        super().optimizer_step(*args, **kwargs)
        # The Trainer counts the step after this.
        if self.after_step is not None and self.after_step(self.model, self.global_step + 1):
            self.trainer.should_stop = True

    def _called(self, loss: Callable[..., Any], batch: Any, batch_index: int) -> Any:
        has = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
        given = {"step": self.global_step, "batch_index": batch_index}
        return loss(self.model, batch, **{name: given[name] for name in _GIVEN if name in has})

    # ------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> Any:
        """The optimizer over `parameter_groups`, with geodesic steps for planes, and the schedule."""
        groups = self.parameter_groups()
        options = {"lr": self.learning_rate, **self.options}
        make = _OPTIMIZERS[self.optimizer] if isinstance(self.optimizer, str) else self.optimizer
        learnt = [parameter for group in groups for parameter in group["params"]]
        planes = [parameter for parameter in learnt if isinstance(parameter, GrassmannParameter)]
        manifold_rate = self.manifold_learning_rate or self.learning_rate
        if planes and len(planes) == len(learnt):
            optimizer: Optimizer = RiemannianSGD(planes, lr=manifold_rate)
        else:
            optimizer = make(groups, **options)
            if planes and not isinstance(optimizer, RiemannianSGD):
                optimizer = with_riemannian(optimizer, manifold_rate)
        if self.schedule == "constant" and not self.warmup:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters that are trained, those of the same options together."""
        found: dict[tuple[str, bool], dict[str, Any]] = {}
        parts = set()
        for name, parameter in self.named_parameters():
            part = next((part for part in self.groups if f"{name}.".startswith(f"model.{part}.")), "")
            parts.add(part)
            if parameter.requires_grad:
                decays = self.decay_vectors or parameter.ndim > 1
                usual = {"params": [], "weight_decay": self.weight_decay if decays else 0.0}
                found.setdefault((part, decays), {**usual, **self.groups.get(part, {})})["params"].append(parameter)
        if missing := sorted(set(self.groups) - parts):
            raise ValueError(f"groups: the model has no parameters under {missing}")
        if not found:
            raise ValueError("model: no parameter requires a gradient; there is nothing to train")
        return list(found.values())

    def _schedule(self, optimizer: Optimizer) -> LRScheduler:
        endless = self.schedule == "constant" and isinstance(self.warmup, int)
        planned = 1 if endless else self.trainer.estimated_stepping_batches
        if math.isinf(planned):
            raise ValueError("schedule: needs to know how long the run is; give the Trainer max_steps or max_epochs")
        steps = max(1, int(planned))
        if callable(self.schedule):
            return self.schedule(optimizer, steps)
        start = self.warmup if isinstance(self.warmup, int) else round(self.warmup * steps)
        if self.schedule == "one-cycle":
            rates = [group["lr"] for group in optimizer.param_groups]
            share = self.warmup if isinstance(self.warmup, float) else start / steps
            # A rise of less than two steps has no first rate.
            steps = max(steps, 2)
            share = min(max(share, 2 / steps), 1.0)
            return OneCycleLR(optimizer, rates, total_steps=steps, pct_start=share, cycle_momentum=False)

        def rate(step: int) -> float:
            if step < start:
                return (step + 1) / (start + 1)
            if self.schedule == "constant":
                return 1.0
            along = min(1.0, (step - start) / max(1, steps - start))
            return self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * along)) / 2

        return LambdaLR(optimizer, rate)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the losses of past epochs; leave frozen parameters out where they are not to be saved."""
        checkpoint["losses"] = list(self.losses)
        if not self.save_frozen:
            frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the losses of past epochs."""
        self.losses = list(checkpoint["losses"])


def _parted(found: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a loss returned, as the loss and its terms without a gradient."""
    if isinstance(found, Mapping) and found:
        total, terms = torch.stack([torch.as_tensor(term) for term in found.values()]).sum(), found
    elif isinstance(found, tuple) and len(found) == 2:
        total, terms = found
    else:
        total, terms = found, {}
    if not isinstance(total, Tensor) or total.ndim or not isinstance(terms, Mapping):
        shape = f"a tensor of shape {tuple(total.shape)}" if isinstance(total, Tensor) else repr(type(found))
        raise ValueError(f"loss: must return a scalar, a dict of scalars, or a scalar and a dict of them, got {shape}")
    return total, {name: torch.as_tensor(term).detach() for name, term in terms.items()}


def _rows(batch: Any) -> int:
    """Rows of the first tensor of a batch."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    return next((_rows(part) for part in parts if isinstance(part, Tensor | Mapping | tuple | list)), 1)
