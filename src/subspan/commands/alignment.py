"""The work of `subspan align`: a map from one embedding to another, and how well it does."""

from __future__ import annotations

from typing import Any, NamedTuple

from subspan.align import ReAlign
from subspan.base import Progress, silent
from subspan.datasets import Rows

from .columns import calling
from .comparison import fit_map, paired


class Aligned(NamedTuple):
    """What maps rows (`transform`), what is kept of it in a file (`save`), and the facts."""

    fitted: Any
    kept: Any
    facts: dict[str, Any]


def align_rows(
    source: Rows, target: Rows, method: str = "procrustes", *, seed: int = 0, progress: Progress = silent
) -> Aligned:
    """Fit a map of the source rows to the target ones: of the same rows, or ("realign") of any."""
    facts = {"method": method, "source_rows": len(source), "target_rows": len(target)}
    if method == "realign":
        fitted = ReAlign()
        with calling(source, target):
            fitted.fit(source.array(), target.array())
        gaps = {"gap_before": fitted.gap_before_, "gap_after": fitted.gap_after_, "scale": fitted.scale_}
        return Aligned(fitted, fitted.to_module(), facts | gaps)
    with calling(source, target):
        fitted, found = fit_map(*paired(source, target), method, seed=seed, progress=progress)
    return Aligned(fitted, fitted.map_, facts | found)
