"""Morlet scalograms of many windows: time and memory of MorletView beside PyWavelets, at equal values.

The peer is measured where it is installed. Run: python benchmarks/series_views.py [--windows 64] [--json FILE]
"""

import importlib.metadata
import importlib.util
import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from record import Record, parser, peak, timed
from subspan.nn import MorletView

SCALES = 48
# Bits of PyWavelets' table of the wavelet: its default, and enough for its values to settle.
DEFAULT, SETTLED = 12, 20


def material(windows: int, length: int) -> tuple[torch.Tensor, MorletView]:
    x = torch.randn(windows, 1, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, MorletView(SCALES, (1, length / 2), norm="l2", sampling="pywavelets")


def theirs(x: torch.Tensor, view: MorletView, bits: int) -> np.ndarray:
    """Magnitudes (n, scales, length) by PyWavelets, all windows at once."""
    import pywt

    scales = view.scales_of(x.shape[-1]).numpy()
    found = pywt.cwt(x[:, 0].numpy(), scales, "cmor1-1", precision=bits, method="fft", axis=-1)[0]
    return np.abs(found).swapaxes(0, 1)


def memory(who: str, windows: int, length: int) -> float:
    """MiB that a process of its own takes for one scalogram of all windows, the result included."""
    torch.set_num_threads(1)
    x, view = material(windows, length)
    few = x[:1]
    run: Callable[[torch.Tensor], Any] = (
        (lambda x: theirs(x, view, DEFAULT)) if who == "theirs" else (lambda x: view(x.float()))
    )
    run(few)
    before = peak()
    run(x)
    return peak() - before


def measured(who: str, windows: int, length: int) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(memory, (who, windows, length))


def row_of(windows: int, length: int, has_peer: bool) -> list[Any]:
    x, view = material(windows, length)
    single, fewer = x.float(), MorletView(SCALES, (1, length / 2), time_stride=4)
    a_window = 1e3 / windows
    ours = timed(lambda: view(single)).processor
    row: list[Any] = [length, ours * a_window, timed(lambda: fewer(single)).processor * a_window]
    row.append(measured("ours", windows, length))
    if has_peer:
        usual = timed(lambda: theirs(x, view, DEFAULT), repeats=1).processor
        exact = theirs(x, view, SETTLED)
        differences = [
            np.abs(found - exact).max() / exact.max() for found in (view(x)[:, 0].numpy(), theirs(x, view, DEFAULT))
        ]
        row += [usual * a_window, measured("theirs", windows, length), usual / ours, *map(float, differences)]
    return row


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--windows", type=int, default=64)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    has_peer = importlib.util.find_spec("pywt") is not None
    record = Record("series_views", f"{options.windows} windows of noise, {SCALES} scales from 1 to half the length")
    rows = [row_of(options.windows, length, has_peer) for length in (128, 512, 2048)]
    heads = ["length", "ours, ms", "ours, every 4th place, ms", "ours, MB"]
    heads += ["theirs, ms", "theirs, MB", "theirs / ours", "difference", "theirs at 12 bits"] if has_peer else []
    record.table("A window's scalogram, processor time; memory of all windows at once", heads, rows)
    if has_peer:
        record.target("times as fast as PyWavelets, the least", min(row[6] for row in rows), least=2)
        record.target("difference from PyWavelets, of the largest value", max(row[7] for row in rows), most=1e-2)
        record.note("Differences are from PyWavelets with a table of 20 bits; its default is 12.")
        record.note(f"The peer is PyWavelets {importlib.metadata.version('PyWavelets')}, by FFT, all windows at once.")
    else:
        record.note("The peer, PyWavelets, is not installed and was not measured.")
    record.save(options.json)


if __name__ == "__main__":
    main()
