"""What the pictures share: a size that stays readable on a narrow screen, and lines told apart without colours."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

BLUE, RED, GREEN = "#2166ac", "#b2182b", "#4d9221"
STYLES: list[dict[str, Any]] = [
    {"color": color, "marker": marker, "linestyle": line}
    for color, marker, line in zip(
        (BLUE, RED, GREEN, "#444444", "#7b3294", "#b35806"),
        "os^Dv*",
        ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3))),
        strict=True,
    )
]
WIDTH = 5.6
"""Inches: shown 390 pixels wide, letters of 9 points are nearly 9 pixels high."""

plt.rcParams.update({"font.size": 9.5, "legend.fontsize": 9, "legend.handlelength": 3.5})
plt.rcParams.update({"axes.grid": False, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams["figure.constrained_layout.h_pad"] = 0.07


def panels(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of the common width with its axes."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height), constrained_layout=True, **options)


def save(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG, the same bytes for the same picture."""
    figure.savefig(Path(path).with_suffix(".png"), dpi=130, metadata={"Software": None})
    plt.close(figure)


def columns(table: dict[str, Any]) -> dict[str, list[Any]]:
    """A recorded table by column."""
    return dict(zip(table["columns"], map(list, zip(*table["rows"]))))


def titled(record: dict[str, Any], start: str) -> dict[str, list[Any]]:
    """The columns of the recorded table whose title starts so."""
    return columns(next(one for one in record["tables"] if one["title"].startswith(start)))


def loglog(axes: Any, xlabel: str, ylabel: str) -> None:
    """Logarithmic axes with their units, ticks as plain numbers."""
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="0.9", which="major")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        axis.set_minor_formatter(NullFormatter())


def guide(axes: Any, x: list[float], y: float, slope: int) -> None:
    """A grey line of growth x^slope from (x[0], y) on logarithmic axes, named behind its right end."""
    ends = np.array([x[0], x[-1]], float)
    line = y * (ends / ends[0]) ** slope
    axes.plot(ends, line, color="0.6", linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    axes.annotate(
        f"slope {slope}", (ends[1], line[1]), (8, 0), textcoords="offset points", va="center", color="0.35", fontsize=9
    )
