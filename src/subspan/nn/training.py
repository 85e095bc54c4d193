"""Training inside a fit: rows of a batch, and Lightning's Trainer without files, logs or messages (extra: train)."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from subspan.base import require

_STEPS = 32
_FEWEST = 32
_LOGGERS = ("lightning.pytorch", "lightning.fabric")


def batch_rows(count: int, batch_size: int | None, most: int) -> int:
    """Rows of a batch of `count`: `batch_size`, or `most`, fewer (32 at least) where an epoch would lack 32 steps.

    Few rows in large batches are few steps: what is trained stays where it started.
    """
    return min(count, min(most, max(_FEWEST, count // _STEPS)) if batch_size is None else batch_size)


def finite_loss(loss: Tensor, step: int) -> Tensor:
    """The loss as it is. Raises ValueError, naming the step, where it is NaN or infinite: the weights are lost then."""
    if not bool(loss.detach().isfinite()):
        raise ValueError(
            f"the loss is {float(loss.detach())} at step {step}: lower learning_rate, or look for NaN in the batch"
        )
    return loss


def keep_best(model: nn.Module, monitor: str = "val_loss") -> Any:
    """A callback of Lightning that ends a training with the weights of the epoch of least `monitor`, without files."""
    callbacks = require("lightning.pytorch.callbacks", extra="train")
    best: dict[str, Any] = {"value": float("inf"), "state": None}

    def after(trainer: Any, module: Any) -> None:
        value = float(trainer.callback_metrics[monitor])
        if not trainer.sanity_checking and value < best["value"]:
            best.update(value=value, state={name: held.clone() for name, held in model.state_dict().items()})

    def end(trainer: Any, module: Any) -> None:
        if best["state"] is not None:
            model.load_state_dict(best["state"])

    return callbacks.LambdaCallback(on_validation_end=after, on_fit_end=end)


@contextmanager
def quiet_trainer(**options: Any) -> Iterator[Any]:
    """A Trainer whose informational messages and warnings are not shown while the context lasts.

    options: of Lightning's Trainer, in place of these defaults: CPU, no logger, checkpoints, bars or summary.
    """
    lightning = require("lightning", extra="train")
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    on_interrupt = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield lightning.Trainer(**{**defaults, **options})
        except SystemExit as ended:
            # Lightning makes this of Ctrl-C, and has the next one ignored.
            if isinstance(ended.__context__, KeyboardInterrupt):
                signal.signal(signal.SIGINT, on_interrupt)
                raise KeyboardInterrupt from ended
            raise
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


class RowBatches:
    """`steps` batches, each of `size` rows of tensors drawn without replacement; all rows in order where they fit.

    For trainings of few columns, where gathering a batch row by row would take longer than the step.
    """

    def __init__(self, *tensors: Tensor, size: int, steps: int, generator: torch.Generator | None = None) -> None:
        self.tensors, self.size, self.steps, self.generator = tensors, size, steps, generator

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        count = len(self.tensors[0])
        for _ in range(self.steps):
            if self.size >= count:
                yield self.tensors
            else:
                chosen = torch.randperm(count, generator=self.generator)[: self.size]
                yield tuple(each[chosen] for each in self.tensors)
