"""The work of `subspan embed-series`: windows of series, features learnt from them without labels, and a first look."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from subspan.base import Progress, require
from subspan.base.estimators import in_numpy
from subspan.base.files import atomic_write, write_array
from subspan.datasets import Series, read_series
from subspan.datasets.series_files import Wanted, channels_but, stored_labels
from subspan.measures import probe_score
from subspan.represent import FrameViews

from .columns import Columns
from .origin import origin

# Shares of the labels that a probe is given, and draws of each.
_SHARES = ((0.05, 5), (0.2, 3), (1.0, 1))
# More different numbers than this are numbers, not classes.
_MOST_CLASSES = 30
_SHOWN = 1500
_LEAST = 16


@dataclass(frozen=True)
class Windows:
    """Windows (n, channels, length), where each was cut, and a label each where there are labels.

    series: the number of the trajectory that a window is of, over all files.
    """

    x: Float[np.ndarray, "n c l"]
    columns: Columns
    series: np.ndarray
    labels: np.ndarray | None
    channels: tuple[str, ...]
    time_step: float
    time_unit: str


def cut_windows(
    files: Sequence[Path],
    length: int,
    stride: int,
    *,
    label: str | None = None,
    channels: Sequence[str] | None = None,
    **reading: Any,
) -> Windows:
    """Windows of all trajectories of all files; `label`: of a window, the commonest in it.

    reading: of `read_series`. Raises ValueError for files that do not fit together, and where no trajectory is long
    enough.
    """
    found: list[np.ndarray] = []
    columns: Columns = {"window": [], "source": [], "series": [], "start": []}
    owners: list[int] = []
    labels: list[str] = []
    first: Series | None = None
    count = 0
    for path in files:
        series, texts = _read(path, label, channels, reading)
        if first is not None and series.channels != first.channels:
            raise ValueError(f"{path}: has channels {series.channels}, {files[0]} has {first.channels}")
        first = first or series
        for place, part in enumerate(series.trajectories):
            starts = range(0, len(part) - length + 1, stride)
            for start in starts:
                found.append(np.asarray(part[start : start + length], dtype=np.float32).T)
                owners.append(count)
                for name, value in zip(columns, (len(found) - 1, path.name, series.ids[place], start)):
                    columns[name].append(value)
                if texts is not None:
                    names, counts = np.unique(texts[place][start : start + length], return_counts=True)
                    labels.append(str(names[counts.argmax()]))
            count += 1
    assert first is not None
    if len(found) < 2:
        longest = max(first.lengths)
        raise ValueError(
            f"--window: {length} rows; {len(found)} such windows were found, the longest series has {longest}"
        )
    if label is not None:
        columns["label"] = list(labels)
    given = np.array(labels) if label is not None else None
    return Windows(np.stack(found), columns, np.array(owners), given, first.channels, first.time_step, first.time_unit)


def _read(
    path: Path, label: str | None, channels: Sequence[str] | None, reading: dict[str, Any]
) -> tuple[Series, list[np.ndarray] | None]:
    if label is None:
        return read_series(path, channels=channels, **reading), None
    kept = ("time_column", "id_column", "array", "channels_first")
    wanted = Wanted(**{key: reading[key] for key in kept if key in reading})
    series = read_series(path, channels=channels or channels_but(path, label, wanted), **reading)
    texts = stored_labels(path, label, wanted)
    if tuple(map(len, texts)) != series.lengths:
        raise ValueError(
            f"--label: rows of {path} were left out or filled in, so that labels do not fit; clean it first"
        )
    return series, texts


def embed_windows(
    windows: Windows,
    *,
    model: Path | None = None,
    save: Path | None = None,
    epochs: int | None = None,
    width: int = 16,
    per_window: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Features of all windows by a saved model, or by one that is trained on them, and the facts.

    epochs: None for 30, and of few windows more, until they are 600 steps or 200 epochs.
    """
    started = time.perf_counter()
    if epochs is None:
        epochs = min(200, max(30, -(-600 // max(1, len(windows.x) // batch_size))))
    progress("training", 0.05)
    if model is not None:
        views = FrameViews.load(model)
        if views.channels_ != len(windows.channels):
            have = ", ".join(windows.channels)
            raise ValueError(f"--model: {model} is for {views.channels_} channels, the series have {have}")
    else:
        views = FrameViews(
            width=width,
            dim=4 * width,
            n_scales=24,
            time_stride=4,
            dropout=0.2,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=3e-3,
            normalize="window" if per_window else "channel",
            trainer={"callbacks": [_reporting(epochs, progress)]},
            random_state=seed,
        ).fit(windows.x)
    progress("features", 0.85)
    features = np.asarray(views.transform(windows.x), dtype=np.float32)
    if save is not None:
        views.save(save)
    facts: dict[str, Any] = {
        "windows": len(windows.x),
        "series": int(windows.series[-1]) + 1,
        "channels": list(windows.channels),
        "length": windows.x.shape[2],
        "time_step": windows.time_step,
        "time_unit": windows.time_unit,
        "features": features.shape[1],
        "model": None if model is None else model.name,
        "epochs": None if model is not None else epochs,
        "losses": list(views.losses_) if model is None else None,
        "dimensions": int(views.subspace_.dim) if model is None else None,
    }
    progress("first look", 0.9)
    facts["map"] = _map(features, windows)
    facts["probe"] = None if windows.labels is None else _probe(features, windows, seed)
    return features, facts | origin(started, seed, "torch")


def _reporting(epochs: int, progress: Progress) -> Any:
    """A callback that says how far both stages are; the second is much the shorter one."""
    callbacks = require("lightning.pytorch.callbacks", extra="train")
    done = [0]

    def after(trainer: Any, module: Any) -> None:
        done[0] += 1
        share = min(done[0], epochs) / epochs
        progress("training" if done[0] <= epochs else "learning the maps", 0.05 + 0.8 * share)

    return callbacks.LambdaCallback(on_train_epoch_end=after)


def _map(features: np.ndarray, windows: Windows) -> dict[str, Any]:
    """The two directions of most variance of standardised features, of some windows."""
    rows = torch.from_numpy(features).double()
    deviation = rows.std(0)
    rows = (rows - rows.mean(0)) / torch.where(deviation > 0, deviation, 1)
    some = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SHOWN)).astype(int))
    vectors, values, _ = torch.linalg.svd(rows, full_matrices=False)
    places = (vectors * values)[:, :2]
    if places.shape[1] < 2:
        places = torch.nn.functional.pad(places, (0, 2 - places.shape[1]))
    share = float(values[:2].square().sum() / values.square().sum().clamp_min(1e-30))
    groups = windows.labels if windows.labels is not None else np.array(windows.columns["series"])
    return {
        "x": [round(float(value), 4) for value in places[some, 0]],
        "y": [round(float(value), 4) for value in places[some, 1]],
        "group": [str(groups[row]) for row in some],
        "window": some.tolist(),
        "share": share,
    }


def _probe(features: np.ndarray, windows: Windows, seed: int) -> dict[str, Any] | None:
    """What a linear probe reads of the label in series that it was not fitted on, beside the spectrum and samples.

    With fewer than four series, in the last third of each, a window's length apart.
    """
    assert windows.labels is not None
    labels, numeric = _told(windows.labels)
    held, fit, how = _apart(windows, seed)
    spectrum = in_numpy(torch.fft.rfft(torch.from_numpy(windows.x), norm="ortho").abs().flatten(1))
    kinds = {"features": features, "spectrum": spectrum, "samples": windows.x.reshape(len(windows.x), -1)}
    if not len(fit) or not len(held) or len(np.unique(labels[fit])) < 2:
        return {"told": None, "reason": "all windows that could be learnt from have the same label"}
    random = np.random.default_rng(seed)
    rows = []
    chance = 0.0
    for share, times in _SHARES:
        draws = [random.permutation(fit)[: max(2, round(share * len(fit)))] for _ in range(times)]
        draws = [some for some in draws if len(np.unique(labels[some])) > 1]
        if not draws:
            continue
        row: dict[str, Any] = {"share": share, "windows": len(draws[0])}
        for name, x in kinds.items():
            options: dict[str, Any] = {"kind": "regression" if numeric else "ridge"}
            found = [probe_score(x[some], labels[some], test=(x[held], labels[held]), **options) for some in draws]
            row[name] = float(np.mean([each.score for each in found]))
            chance = found[-1].chance
        rows.append(row)
    classes = None if numeric else sorted(map(str, np.unique(labels)))
    return {"told": "R²" if numeric else "accuracy", "rows": rows, "chance": chance, "how": how, "classes": classes,
            "fit": len(fit), "held": len(held)}  # fmt: skip


def _told(labels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Labels as classes, or as numbers where they are many different ones."""
    try:
        numbers = labels.astype(np.float64)
    except ValueError:
        return labels, False
    if not np.isfinite(numbers).all():
        raise ValueError("--label: some windows have no label")
    return (numbers, True) if len(np.unique(numbers)) > _MOST_CLASSES else (labels, False)


def _apart(windows: Windows, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Windows to test on, windows to fit on, and in words how they were told apart."""
    everyone = np.unique(windows.series)
    if len(everyone) >= 4:
        chosen = np.random.default_rng(seed).permutation(everyone)[: max(1, round(0.3 * len(everyone)))]
        held = np.isin(windows.series, chosen)
        return np.flatnonzero(held), np.flatnonzero(~held), "other series"
    held, fit = [], []
    starts = np.array(windows.columns["start"])
    for each in everyone:
        own = np.flatnonzero(windows.series == each)
        cut = starts[own[int(len(own) * 2 / 3)]]
        held += own[starts[own] >= cut].tolist()
        fit += own[starts[own] <= cut - windows.x.shape[2]].tolist()
    return np.array(held, dtype=int), np.array(fit, dtype=int), "the last third of each series"


def write_features(path: Path, features: Float[np.ndarray, "n m"], columns: Columns) -> None:
    """Features as .npy alone, as .npz beside the windows they are of, or as columns of a .parquet."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        write_array(path, features)
    elif suffix == ".npz":
        with atomic_write(path) as unfinished:
            arrays: dict[str, Any] = {name: np.asarray(values) for name, values in columns.items()}
            np.savez(unfinished, features=features, **arrays)
    else:
        arrow, parquet = (require(name, extra="tables") for name in ("pyarrow", "pyarrow.parquet"))
        values = {f"feature_{place}": features[:, place] for place in range(features.shape[1])}
        with atomic_write(path) as unfinished:
            parquet.write_table(arrow.table({**columns, **values}), unfinished)
