"""Operators of dynamics from moments beside pydmd, which decomposes all snapshots: time, memory, eigenvalues.

Run: python benchmarks/dynamics_koopman.py [--rows 250000 1000000] [--channels 32] [--json FILE]. Rows lie in a file;
each fit has a process of its own, so that peak memory is its own. Ours reads the file in blocks, pydmd takes a matrix.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

from record import Record, parser, peak, timed

DELAYS = 4
BLOCK = 1 << 16


def snapshots(rows, channels):
    """Turning modes that decay and are driven by noise, seen through a matrix."""
    random = np.random.default_rng(0)
    values = random.uniform(0.9, 0.999, channels // 2) * np.exp(1j * random.uniform(0.05, 2.5, channels // 2))
    modes = np.empty((rows, channels))
    for place, value in enumerate(values):
        drive = random.normal(size=rows) + 1j * random.normal(size=rows)
        mode = lfilter([1.0], [1.0, -value], drive)
        modes[:, 2 * place], modes[:, 2 * place + 1] = mode.real, mode.imag
    return modes @ (random.normal(size=(channels, channels)) / channels**0.5)


def ours(path, rows, channels, delays):
    from subspan.dynamics import KoopmanOperator

    def blocks():
        with path.open("rb") as stream:
            for start in range(0, rows, BLOCK):
                count = min(BLOCK, rows - start)
                yield np.fromfile(stream, count=count * channels).reshape(count, channels)

    def fit():
        model = KoopmanOperator(delays=delays, fit_intercept=False, standardize=False)
        return model.fit(blocks()).eigenvalues_

    return fit


def pydmd(path, rows, channels, delays):
    from pydmd import DMD, HankelDMD

    def fit():
        x = np.fromfile(path, count=rows * channels).reshape(rows, channels).T
        model = DMD(svd_rank=channels) if delays == 1 else HankelDMD(svd_rank=delays * channels, d=delays)
        return model.fit(x).eigs

    return fit


WAYS = {"ours": ours, "pydmd": pydmd}


def one(way, path, rows, channels, delays):
    """Seconds, memory above that of the imports, and eigenvalues of one fit, as JSON."""
    small = 4 * channels * delays
    WAYS[way](path, small, channels, delays)()
    before, kept = peak(), []
    run = timed(lambda: kept.append(WAYS[way](path, rows, channels, delays)()), repeats=1, warm=False)
    values = np.asarray(kept[0])
    print(json.dumps([run.processor, peak(), peak() - before, values.real.tolist(), values.imag.tolist()]))


def apart(one, other):
    """The largest distance of eigenvalues to the nearest of the others."""
    return float(max(np.abs(value - other).min() for value in one))


def main():
    made = parser(__doc__)
    made.add_argument("--rows", type=int, nargs="+", default=[250_000, 1_000_000])
    made.add_argument("--channels", type=int, default=32)
    made.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.one:
        way, path, *sizes = options.one
        one(way, Path(path), *map(int, sizes))
        return
    record = Record(
        "dynamics_koopman",
        f"{options.channels} channels of float64 in a file, pydmd {version('pydmd')}, every fit in its own process",
    )
    table = []
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.bin"
        for rows in options.rows:
            snapshots(rows, options.channels).tofile(path)
            for delays in (1, DELAYS):
                for way in WAYS:
                    sizes = [str(rows), str(options.channels), str(delays)]
                    command = [sys.executable, __file__, "--one", way, str(path), *sizes]
                    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    seconds, memory, above, real, imag = json.loads(told.splitlines()[-1])
                    found[rows, delays, way] = seconds, above, np.array(real) + 1j * np.array(imag)
                    table.append([rows, delays, way, seconds, memory, above])
    columns = ["snapshots", "delays", "fit", "processor seconds", "peak MiB", "of it for the fit"]
    record.table("fits", columns, table)
    most = max(options.rows)
    for delays in (1, DELAYS):
        mine, theirs = (found[most, delays, way] for way in WAYS)
        record.target(f"{delays} delays: pydmd over ours, processor time", theirs[0] / mine[0], least=1)
        record.target(f"{delays} delays: pydmd over ours, memory for the fit", theirs[1] / max(mine[1], 1), least=4)
        record.target(f"{delays} delays: eigenvalues apart", apart(theirs[2], mine[2]), most=1e-6)
    least = min(options.rows)
    grown = [found[most, delays, "ours"][1] - found[least, delays, "ours"][1] for delays in (1, DELAYS)]
    record.target(f"MiB more for {most / least:g} times the snapshots, ours", max(grown), most=64)
    record.save(options.json)


if __name__ == "__main__":
    main()
