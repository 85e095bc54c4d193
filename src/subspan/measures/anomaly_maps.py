"""How well scores rank anomalies: areas under the ROC curve and under the per-region-overlap curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage


def auroc(scores: Any, labels: Any) -> float:
    """Area under the ROC curve; ties count half.

    Parameters
    ----------
    scores
        Any shape, higher = more anomalous.
    labels
        Same shape, true = anomaly.

    Returns
    -------
    Area in [0, 1]; 0.5 is chance.

    Raises
    ------
    ValueError
        For NaN, unequal shapes, or labels of one kind only.

    Examples
    --------
    >>> from subspan.measures import auroc
    >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    values, positive = np.asarray(scores).ravel(), np.asarray(labels).ravel() != 0
    if values.shape != positive.shape:
        raise ValueError(f"labels: expected {values.size} entries, one a score, got {positive.size}")
    if positive.all() or not positive.any():
        raise ValueError("labels: both normal and anomalous entries are needed")
    return _area(values, positive / positive.sum(), ~positive, limit=1.0)


def aupro(
    maps: Sequence[Any] | np.ndarray,
    masks: Sequence[Any] | np.ndarray,
    *,
    fpr_limit: int | float = 0.3,
    connectivity: int = 8,
) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, over that rate.

    Every connected region counts alike, however small; the false-positive rate is over the normal pixels of all images.
    Exact: every score is a threshold, ties are joined, the curve is interpolated at the limit.

    Parameters
    ----------
    maps, masks
        One (h, w) an image: anomaly scores, and true = defect.
    fpr_limit
        False-positive rate in (0, 1] up to which the area is taken.
    connectivity
        Neighbours of a pixel that belong to its region, 4 or 8.

    Returns
    -------
    Area in [0, 1].

    Raises
    ------
    ValueError
        For maps and masks that do not fit, NaN, or where no region or no normal pixel is left.

    References
    ----------
    Bergmann et al. (2021), The MVTec anomaly detection dataset.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import aupro
    >>> mask = np.zeros((8, 8), dtype=bool)
    >>> mask[1, 1] = mask[4:7, 4:7] = True  # a small region, which the second map misses, and a large one
    >>> round(aupro([mask + 0.0], [mask]), 6), aupro([mask * (np.arange(8) > 2)], [mask]) < 0.7
    (1.0, True)
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit: in (0, 1], got {fpr_limit}")
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity: 4 or 8, got {connectivity}")
    if len(maps) != len(masks) or len(maps) == 0:
        raise ValueError(f"masks: one a map and at least one, got {len(maps)} maps and {len(masks)} masks")
    structure = ndimage.generate_binary_structure(2, 2 if connectivity == 8 else 1)
    shares, normal, n_regions = [], [], 0
    for index, (scores, mask) in enumerate(zip(maps, masks)):
        defect = np.asarray(mask) != 0
        if defect.ndim != 2 or np.shape(scores) != defect.shape:
            raise ValueError(f"masks: mask {index} has shape {defect.shape}, its map {np.shape(scores)}")
        labelled: Any = ndimage.label(defect, structure)
        regions, count = labelled
        area = np.maximum(np.bincount(regions.ravel(), minlength=count + 1), 1)
        shares.append(np.where(defect, 1 / area[regions], 0.0).ravel())
        normal.append(~defect.ravel())
        n_regions += count
    outside = np.concatenate(normal)
    if n_regions == 0:
        raise ValueError("masks: none has an anomalous pixel")
    if not outside.any():
        raise ValueError("masks: no normal pixel is left to count false positives on")
    values = np.concatenate([np.asarray(scores).ravel() for scores in maps])
    return _area(values, np.concatenate(shares) / n_regions, outside, limit=fpr_limit)


def _area(
    scores: np.ndarray, hits: Float[np.ndarray, " n"], normal: Bool[np.ndarray, " n"], *, limit: int | float
) -> float:
    """Area under (false-alarm rate over `normal`, sum of `hits`) as the threshold falls, up to `limit` on the first."""
    if not np.isfinite(scores).all():
        raise ValueError(f"scores: {int((~np.isfinite(scores)).sum())} of {scores.size} are NaN or infinite")
    scores = scores.astype(np.float64) if scores.dtype.kind != "f" else scores
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    x = np.append(0.0, np.cumsum(normal[order])[last_of_tie] / normal.sum())
    y = np.append(0.0, np.cumsum(hits[order])[last_of_tie])
    # The first point at or beyond the limit; a rise of y at the limit itself adds no area.
    end = int(np.searchsorted(x, limit))
    share = (limit - x[end - 1]) / (x[end] - x[end - 1])
    at_limit = y[end - 1] + share * (y[end] - y[end - 1])
    return float(np.trapezoid(np.append(y[:end], at_limit), np.append(x[:end], limit)) / limit)
