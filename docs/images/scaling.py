"""Draw docs/images/scaling_*.png from the recorded benchmarks: time and memory over size. Nothing is measured here."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drawing import STYLES, columns, guide, loglog, panels, save, titled

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parents[1] / "benchmarks" / "results"


def sizes_as_ticks(axes: Any, sizes: list[int]) -> None:
    """The measured sizes under the axis in place of powers of ten."""
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()


def s2cag(record: dict[str, Any]) -> Any:
    """Time and memory over edges."""
    table = titled(record, "Generated block models")
    figure, both = panels(4.6, 2, sharex=True)
    for axes, key, label, style in zip(
        both, ("processor seconds", "MiB over the start"), ("time, processor s", "memory, MiB"), STYLES
    ):
        axes.plot(table["edges"], table[key], **style)
        guide(axes, table["edges"], table[key][0], 1)
        loglog(axes, "", label)
    both[1].set_xlabel("edges")
    return figure


def subspace_rows(record: dict[str, Any]) -> Any:
    """Time and memory over rows, the sparse methods and K-subspaces."""
    rows = [
        row
        for start in ("Sparse self-expression", "K-subspaces")
        for row in zip(*(titled(record, start)[key] for key in ("", "rows", "processor seconds", "MiB over the start")))
    ]
    figure, (above, below) = panels(5.4, 2, sharex=True)
    for name, style in zip(dict.fromkeys(row[0] for row in rows), STYLES):
        n, seconds, memory = zip(*(row[1:] for row in rows if row[0] == name))
        above.plot(n, seconds, **style)
        below.plot(n, memory, **style, label={"OMP": "pursuit", "EnSC": "elastic net"}.get(name, name))
    first = min(row[1] for row in rows), min(row[2] for row in rows)
    guide(above, [first[0], 1_000_000], first[1], 1)
    guide(above, [first[0], 100_000], first[1], 2)
    loglog(above, "", "time, processor s")
    loglog(below, "rows", "memory, MiB")
    below.legend(loc="lower right")
    return figure


def butterfly(record: dict[str, Any]) -> Any:
    """The multiply over N: milliseconds, and ratios."""
    table = titled(record, "Multiply")
    n, dense = table["N"], table["dense, ms"]
    ours = [ms / ratio for ms, ratio in zip(dense, table["dense / butterfly"])]
    figure, (above, below) = panels(5.4, 2, sharex=True)
    above.plot(n, dense, **STYLES[1], label="dense")
    above.plot(n, ours, **STYLES[0], label="butterfly")
    guide(above, n, dense[0], 2)
    loglog(above, "", "64 rows, processor ms")
    ratios = {
        "dense over butterfly": "dense / butterfly",
        "the same, with backward": "the same, forward and backward",
        "complex butterfly over FFT": "complex butterfly / FFT",
    }
    for (label, key), style in zip(ratios.items(), (STYLES[0], STYLES[2], STYLES[3])):
        below.plot(n, table[key], **style, label=label)
    below.axhline(1, color="0.4", linewidth=1)
    loglog(below, "N", "time over time")
    sizes_as_ticks(below, n)
    for axes in (above, below):
        axes.legend(loc="best")
    return figure


def simvq(record: dict[str, Any]) -> Any:
    """A training step over the number of codes: time, and what is kept of the distances."""
    table = titled(record, "A forward and backward pass")
    codes = table["codes"]
    peer = [ms * ratio for ms, ratio in zip(table["ms"], table["the peer / ours"])]
    figure, (above, below) = panels(5.2, 2, sharex=True)
    above.plot(codes, table["ms"], **STYLES[0], label="SimVQ")
    above.plot(codes, peer, **STYLES[1], label="vector-quantize-pytorch")
    guide(above, codes, table["ms"][0], 1)
    loglog(above, "", "training step, processor ms")
    below.plot(codes, table["kept, MB"], **STYLES[0], label="block that is kept")
    below.plot(codes, table["N x K, MB"], **STYLES[1], label="all distances")
    loglog(below, "codes", "distances, MB")
    sizes_as_ticks(below, codes)
    for axes in (above, below):
        axes.legend(loc="upper left")
    return figure


def compatibility(record: dict[str, Any]) -> Any:
    """A training step over the width, constrained and plain."""
    found: dict[str, list[tuple[int, float]]] = {}
    for table in record["tables"]:
        width = re.match(r"One step of training.* d = (\d+)", table["title"])
        for name, ms, _ in table["rows"] if width else ():
            found.setdefault(name, []).append((int(width[1]), ms))
    figure, axes = panels(4.2)
    for (name, points), style in zip(found.items(), STYLES):
        axes.plot(*zip(*points), **style, label=name.replace("(two orthogonal maps, matrix_exp)", "(two, matrix_exp)"))
    loglog(axes, "width d", "training step of 256 rows, processor ms")
    sizes_as_ticks(axes, [width for width, _ in points])
    axes.legend(loc="upper left", fontsize=8.5)
    axes.set_ylim(top=axes.get_ylim()[1] * 3)
    return figure


def over_size(record: dict[str, Any]) -> Any:
    """The first table whose first column is a size: a panel a unit, a line a column."""
    for one in record["tables"]:
        table = columns(one)
        (label, sizes), *rest = table.items()
        if len(sizes) > 2 and all(isinstance(size, int | float) for size in sizes):
            break
    else:
        raise SystemExit(f"{record['benchmark']}: no table has a size in its first column")
    units: dict[str, list[tuple[str, list[float]]]] = {}
    for name, values in rest:
        if any(isinstance(value, int | float) for value in values):
            what, _, unit = name.rpartition(", ")
            known = re.search(r"\b(ms|s|seconds|µs|microseconds|MiB|MB|GiB)\b", unit)
            series = [value if isinstance(value, int | float) else float("nan") for value in values]
            units.setdefault(unit if known else "ratio", []).append((what if known and what else name, series))
    figure, every = panels(0.4 + 2.6 * len(units), len(units), sharex=True, squeeze=False)
    for axes, (unit, lines) in zip(every[:, 0], units.items()):
        for (name, values), style in zip(lines, STYLES):
            axes.plot(sizes, values, **style, label=name)
        loglog(axes, "", unit)
        axes.legend(loc="best", fontsize=8.5)
    every[-1, 0].set_xlabel(label)
    sizes_as_ticks(every[-1, 0], sizes[:: 1 + len(sizes) // 8])
    return figure


PICTURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "s2cag": s2cag,
    "subspace_rows": subspace_rows,
    "butterfly": butterfly,
    "simvq": simvq,
    "compatibility": compatibility,
    "grassmann_mixing": over_size,
    "orthogonal": over_size,
}


def main() -> None:
    """Write a picture for every record that there is."""
    for name, draw in PICTURES.items():
        path = RECORDS / f"{name}.json"
        if path.exists():
            save(draw(json.loads(path.read_text(encoding="utf-8"))), HERE / f"scaling_{name}.png")


if __name__ == "__main__":
    main()
