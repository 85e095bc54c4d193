"""The linear layers of a checkpoint in fewer bits: `subspan compress`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspan.base import Progress, require
from subspan.base.files import temporary_folder, write_text
from subspan.datasets import read_texts, stdlib_docstrings
from subspan.models import (
    StoredWeights,
    linear_names,
    linear_weight,
    save_factored,
    text_perplexity,
    token_sequences,
    write_weights,
)
from subspan.weights import CoSpaDi, factorise

from .checkpoint_folders import ChangedWeights, copy_companions, load_checkpoint
from .origin import origin

_HELD = 16
_TOGETHER = 8
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
        Calibration sequences at most, and tokens of each. The sixteen that follow in the text, as far as it goes, are
        held out: of a causal model the perplexity on them is measured before, after, and by rounding to as many bits.
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

    def run(
        self, output: Path, progress: Progress, page: Callable[[dict[str, Any]], str] | None = None
    ) -> dict[str, Any]:
        """Write the checkpoint with dense weights, its factored layers beside them, a table of layers and a card.

        page: makes a report (HTML) of the facts, which is put beside them. Where the process is killed, the same call
        goes on after the layers that are done.
        """
        started = time.perf_counter()
        model = load_checkpoint(self.folder)
        job = CoSpaDi(self.ratio, self.solver, self.allocation, exclude=self.exclude)
        with temporary_folder(output, exclusive=True, resumable=True) as unfinished:
            keep = unfinished / "layers"
            keep.mkdir(exist_ok=True)
            calibration, held = self._sequences()
            before = self._perplexity(model, held)
            job.fit(model, _batches(calibration), keep=keep, progress=progress)
            dense = job.dense_weights(model)
            changed = ChangedWeights(StoredWeights(self.folder), dense)
            surgery = job.apply_(model) if self.solver in _FACTORED else None
            factored = unfinished / "factored.safetensors"
            if surgery is not None:
                save_factored(model, factored)
                surgery.undo()
            rounded = None if before is None or self.solver == "round" else self._rounded(model, held)
            if before is not None:
                model.load_state_dict(dense, strict=False)
            rows = [asdict(layer) for layer in job.report_]
            facts = {
                "solver": self.solver,
                "ratio": self.ratio,
                "allocation": self.allocation,
                "calibration": "docstrings" if self.text is None else self.text.name,
                "base": self.folder.name,
                "sequences": len(calibration),
                "tokens": self.tokens,
                "saved": job.saved(),
                "mean_error": sum(layer.error for layer in job.report_) / len(rows),
                "megabytes_before": sum(layer.dense_bits for layer in job.report_) / 8e6,
                "megabytes_after": sum(layer.bits for layer in job.report_) / 8e6,
                "held_sequences": len(held),
                "perplexity_before": before,
                "perplexity_after": self._perplexity(model, held),
                "perplexity_rounded": rounded,
                "left_out": len(job.left_out_),
            }

            def finish(made: Path) -> None:
                copy_companions(self.folder, made)
                if surgery is not None:
                    (made / "factored").mkdir()
                    factored.replace(made / "factored" / "layers.safetensors")
                write_text(made / "compress.json", json.dumps({**facts, "layers": rows}, indent=2) + "\n")
                write_text(made / "README.md", _card(facts))
                if page is not None:
                    about = origin(started, job.random_state, "torch", "transformers")
                    write_text(made / "report.html", page({**facts, **about, "layers": rows}))

            made = unfinished / "made"
            shutil.rmtree(made, ignore_errors=True)
            write_weights(changed, made, finish=finish)
            made.replace(output)
        return {**facts, "layers": rows}

    def _sequences(self) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """Sequences to calibrate on, and those that follow."""
        transformers = require("transformers", extra="llm")
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        texts = read_texts(self.text).texts if self.text else [each.text for each in stdlib_docstrings()]
        every = token_sequences(tokenizer, texts, length=self.tokens)
        calibration = list(islice(every, self.sequences))
        if not calibration:
            raise ValueError(f"--text: has too few tokens for one sequence of {self.tokens}")
        return calibration, list(islice(every, _HELD))

    def _rounded(self, model: Any, held: list[dict[str, Tensor]]) -> float | None:
        """The same with each number rounded to as many bits, the rival that costs nothing. The model is changed."""
        rival = CoSpaDi(self.ratio, "round", exclude=self.exclude).fit(model)
        model.load_state_dict(rival.dense_weights(model), strict=False)
        return self._perplexity(model, held)

    def _perplexity(self, model: Any, held: list[dict[str, Tensor]]) -> float | None:
        """On the sequences that are held out; None without any, and for models that predict no next token."""
        causal = model.get_output_embeddings() is not None and not getattr(model.config, "is_encoder_decoder", False)
        return text_perplexity(model, held) if held and causal else None


def _batches(sequences: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Some sequences at a time: what it costs to add a batch to second moments grows with their size, not with it."""
    parts = [sequences[start : start + _TOGETHER] for start in range(0, len(sequences), _TOGETHER)]
    return [{key: torch.cat([each[key] for each in part]) for key in part[0]} for part in parts]


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
