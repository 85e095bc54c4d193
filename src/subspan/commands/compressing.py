"""The linear layers of a checkpoint in fewer bits: `subspan compress`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspan.base import Progress, require
from subspan.base.files import temporary_folder, write_text
from subspan.datasets import read_texts, stdlib_docstrings
from subspan.models import StoredWeights, linear_names, linear_weight, save_factored, write_weights
from subspan.weights import CoSpaDi, factorise

from .checkpoint_folders import ChangedWeights, copy_companions, load_checkpoint

_FACTORED = ("procrustes", "ksvd", "mod", "rocket", "svd")


@dataclass(frozen=True)
class Compression:
    """A compression that can be looked at before it is done.

    Parameters
    ----------
    folder
        Checkpoint folder of transformers; never written to.
    ratio, solver, allocation, exclude
        As of `CoSpaDi`.
    text
        File of calibration texts; None: docstrings of Python's standard library.
    sequences, tokens
        Calibration sequences at most, and tokens of each.
    """

    folder: Path
    ratio: float = 0.2
    solver: Any = "procrustes"
    allocation: Any = "uniform"
    exclude: str | None = None
    text: Path | None = None
    sequences: int = 64
    tokens: int = 256

    def plan(self) -> dict[str, Any]:
        """How many layers and bits, and about how long it takes."""
        model = load_checkpoint(self.folder)
        weights = [linear_weight(model.get_submodule(name))[0] for name in linear_names(model)]
        numbers = sum(weight.numel() for weight in weights)
        probe = min(weights, key=lambda weight: weight.numel())
        started = time.perf_counter()
        factorise(probe, None, self.ratio, solver=self.solver)
        unit = (time.perf_counter() - started) / _work(probe)
        return {
            "layers": len(weights),
            "numbers": numbers,
            "of_the_model": numbers / sum(p.numel() for p in model.parameters()),
            "megabytes_before": 2 * numbers / 1e6,
            "megabytes_after": 2 * numbers * (1 - self.ratio) / 1e6,
            "estimated_seconds": unit * sum(map(_work, weights)),
        }

    def run(self, output: Path, progress: Progress) -> dict[str, Any]:
        """Write the checkpoint with dense weights, its factored layers beside them, a table of layers and a card.

        Where the process is killed, the same call goes on after the layers that are done.
        """
        model = load_checkpoint(self.folder)
        job = CoSpaDi(self.ratio, self.solver, self.allocation, exclude=self.exclude)
        with temporary_folder(output, exclusive=True, resumable=True) as unfinished:
            keep = unfinished / "layers"
            keep.mkdir(exist_ok=True)
            job.fit(model, list(self._batches()), keep=keep, progress=progress)
            changed = ChangedWeights(StoredWeights(self.folder), job.dense_weights(model))
            rows = [asdict(layer) for layer in job.report_]
            facts = {
                "solver": self.solver,
                "ratio": self.ratio,
                "allocation": self.allocation,
                "calibration": "docstrings" if self.text is None else self.text.name,
                "base": self.folder.name,
                "saved": job.saved(),
                "mean_error": sum(layer.error for layer in job.report_) / len(rows),
            }

            def finish(made: Path) -> None:
                copy_companions(self.folder, made)
                if self.solver in _FACTORED:
                    (made / "factored").mkdir()
                    surgery = job.apply_(model)
                    save_factored(model, made / "factored" / "layers.safetensors")
                    surgery.undo()
                write_text(made / "compress.json", json.dumps({**facts, "layers": rows}, indent=2) + "\n")
                write_text(made / "README.md", _card(facts))

            made = unfinished / "made"
            shutil.rmtree(made, ignore_errors=True)
            write_weights(changed, made, finish=finish)
            made.replace(output)
        return {**facts, "layers": rows}

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Calibration sequences of whole length, one a batch."""
        transformers = require("transformers", extra="llm")
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        texts = read_texts(self.text).texts if self.text else [each.text for each in stdlib_docstrings()]
        left: list[int] = []
        made = 0
        for text in texts:
            left += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
            while len(left) >= self.tokens and made < self.sequences:
                yield {"input_ids": torch.tensor([left[: self.tokens]])}
                left, made = left[self.tokens :], made + 1
            if made == self.sequences:
                return
        if not made:
            raise ValueError(f"--text: {len(left)} tokens are too few; a sequence has {self.tokens}")


def _work(weight: Tensor) -> float:
    """What a decomposition takes, but for a factor."""
    return max(weight.shape) * float(min(weight.shape)) ** 2


def _card(facts: Mapping[str, Any]) -> str:
    return (
        f"# Compressed model\n\nThe linear layers of `{facts['base']}` by {facts['solver']}, "
        f"{100 * facts['saved']:.1f} % of their bits fewer, calibrated on {facts['calibration']}, with "
        f"`subspan compress`. Mean relative error of the layers' outputs: {facts['mean_error']:.3f}.\n\n"
        "`model.safetensors` has the layers multiplied out, at full size, for transformers. "
        "`factored/layers.safetensors` has the factors, which `subspan.models.load_factored` puts into the model; "
        "`compress.json` lists the layers.\nIt was not evaluated: measure it on your task before use.\n"
    )
