"""Windows of sensor series with labels, and whose they are, so that people who are learnt from are not tested on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from .shared import load

LABELLED_WINDOWS = ("uci_har", "watch_har", "troika_hr")
"""Data sets of `labelled_windows`."""


@dataclass(frozen=True)
class LabelledWindows:
    """Windows of equal length with a label each.

    Attributes
    ----------
    x
        (n, channels, length).
    y
        (n,) numbers of classes, or numbers.
    people
        (n,) whose each window is; None where only the official split is known.
    held_out
        (n,) the official test part; None where there is none.
    channels, classes
        Names; no classes where labels are numbers.
    rate
        Samples a second.

    Raises
    ------
    ValueError
        In `split` for a share that leaves nobody on one side.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.datasets import LabelledWindows
    >>> people = np.repeat(np.arange(5), 4)
    >>> windows = LabelledWindows(np.zeros((20, 2, 30)), people % 2, people, None, ("a", "b"), ("no", "yes"), 50.0)
    >>> test = windows.split(0, share=0.4)
    >>> int(test.sum()), set(people[test]) & set(people[~test])
    (8, set())
    """

    x: Float[np.ndarray, "n c l"]
    y: Shaped[np.ndarray, " n"]
    people: Shaped[np.ndarray, " n"] | None
    held_out: Bool[np.ndarray, " n"] | None
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    rate: float

    def split(self, seed: int, *, share: float = 0.3) -> Bool[np.ndarray, " n"]:
        """Which windows are to be tested on: the official part, or those of a share of the people, drawn."""
        if self.held_out is not None:
            return self.held_out
        if self.people is None:
            raise ValueError("people: nobody knows whose these windows are, and there is no official test part")
        everyone = np.unique(self.people)
        count = round(share * len(everyone))
        if not 0 < count < len(everyone):
            raise ValueError(f"share: {share} of {len(everyone)} people leaves nobody on one side")
        return np.isin(self.people, np.random.default_rng(seed).permutation(everyone)[:count])


def labelled_windows(name: str, folder: str | os.PathLike[str] | None = None) -> LabelledWindows:
    """Windows of a data set of people's sensors.

    Parameters
    ----------
    name
        "uci_har": 2.56 s of a phone at 50 Hz, six activities, official split of people. "watch_har": 4 s every 2 s of
        a watch, at 25 Hz, seven exercises. "troika_hr": 8 s every 2 s of two pulse sensors and acceleration at the
        wrist, at 25 Hz, with the heart rate in beats a minute; the electrocardiogram is left out.
    folder
        Of the shared data sets; None: see `data_folder`.

    Returns
    -------
    LabelledWindows

    Raises
    ------
    ValueError
        For another name, and where the data set is not there.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from subspan.datasets import labelled_windows
    >>> Path("data/uci_har").mkdir(parents=True)
    >>> parts = {f"x_{part}": np.ones((3, 2, 16), np.int16) for part in ("train", "test")}
    >>> parts |= {f"y_{part}": np.arange(3) for part in ("train", "test")}
    >>> about = {"scale": 0.5, "channels": np.array(["a", "b"]), "classes": np.array(["c"] * 3), "fs": 50}
    >>> np.savez("data/uci_har/uci_har.npz", **parts, **about)
    >>> windows = labelled_windows("uci_har", "data")
    >>> windows.x.shape, float(windows.x[0, 0, 0]), windows.split(0).tolist()
    ((6, 2, 16), 0.5, [False, False, False, True, True, True])
    """
    if name not in LABELLED_WINDOWS:
        raise ValueError(f"name: expected one of {LABELLED_WINDOWS}, got {name!r}")
    data = load(name, folder)
    return {"uci_har": _uci_har, "watch_har": _watch_har, "troika_hr": _troika_hr}[name](data)


def _uci_har(data: dict[str, Any]) -> LabelledWindows:
    x = np.concatenate([data["x_train"], data["x_test"]]).astype(np.float32) * np.float32(data.get("scale", 1))
    held_out = np.arange(len(x)) >= len(data["x_train"])
    y = np.concatenate([data["y_train"], data["y_test"]]).astype(np.int64)
    people = np.concatenate([data["people_train"], data["people_test"]]) if "people_train" in data else None
    channels, classes = (tuple(map(str, data[key])) for key in ("channels", "classes"))
    return LabelledWindows(x, y, people, held_out, channels, classes, float(data["fs"]))


def _watch_har(data: dict[str, Any]) -> LabelledWindows:
    found, rows = [], []
    for row, (start, stop) in enumerate(zip(data["offsets"], data["offsets"][1:])):
        recording = _averaged(data["signal"][start:stop].T * data["scale"][:, None], 2)
        cut = _cut(recording, 100, 50)
        found.append(cut)
        rows += [row] * len(cut)
    channels, classes = (tuple(map(str, data[key])) for key in ("channels", "classes"))
    y, people = data["y"][rows].astype(np.int64), data["subject"][rows]
    return LabelledWindows(np.concatenate(found), y, people, None, channels, classes, float(data["fs"]) / 2)


def _troika_hr(data: dict[str, Any]) -> LabelledWindows:
    channels = ("pulse 1", "pulse 2", "acceleration x", "acceleration y", "acceleration z")
    found, rates, people = [], [], []
    for key in sorted(key for key in data if key.startswith("sig_")):
        bpm = data[key.replace("sig_", "bpm_")].ravel()
        cut = _cut(_averaged(data[key][-len(channels) :], 5), 200, 50)[: len(bpm)]
        found.append(cut)
        rates.append(bpm[: len(cut)])
        people += [int(key.split("_")[1])] * len(cut)
    y = np.concatenate(rates).astype(np.float64)
    return LabelledWindows(np.concatenate(found), y, np.array(people), None, channels, (), 25.0)


def _averaged(x: Float[np.ndarray, "c l"], factor: int) -> Float[np.ndarray, "c m"]:
    """Means of so many samples."""
    length = x.shape[1] // factor * factor
    return x[:, :length].reshape(len(x), -1, factor).mean(2, dtype=np.float64).astype(np.float32)


def _cut(x: Float[np.ndarray, "c l"], length: int, stride: int) -> Float[np.ndarray, "n c m"]:
    return np.lib.stride_tricks.sliding_window_view(x, length, axis=1)[:, ::stride].swapaxes(0, 1).copy()
