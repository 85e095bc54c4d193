"""Lightning's Trainer for training inside a fit: on the CPU, without files, logs or messages (extra: train)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..geometry.extras import require

_LOGGERS = ("lightning.pytorch", "lightning.fabric")


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield lightning.Trainer(**{**defaults, **options})
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
