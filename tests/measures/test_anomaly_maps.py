"""AUROC and AUPRO against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from subspan.measures import aupro, auroc


def brute_auroc(scores, labels):
    positive, negative = scores[labels][:, None], scores[~labels][None, :]
    return float((positive > negative).mean() + 0.5 * (positive == negative).mean())


def brute_aupro(maps, masks, limit):
    """Every distinct score a threshold, curve by definition, then integrated on a very fine grid."""
    regions = []
    for index, mask in enumerate(masks):
        labelled, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [(index, labelled == number) for number in range(1, count + 1)]
    normal = maps[~masks]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        overlap = np.mean([(maps[index][region] >= threshold).mean() for index, region in regions])
        points.append((float((normal >= threshold).mean()), float(overlap)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), levels=st.integers(2, 50))
def test_auroc_is_the_share_of_ordered_pairs(seed, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, 60).astype(float)
    labels = rng.random(60) < 0.3
    labels[:2] = [True, False]
    assert auroc(scores, labels) == pytest.approx(brute_auroc(scores, labels), abs=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), limit=st.sampled_from([0.05, 0.3, 1.0]), levels=st.sampled_from([3, 20, 10_000]))
def test_aupro_is_its_definition(seed, limit, levels):
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 12, 10)) < 0.1
    masks[0, 0, 0] = True
    maps = np.floor(levels * rng.random(masks.shape)) + masks * rng.random()
    assert aupro(maps, masks, fpr_limit=limit) == pytest.approx(brute_aupro(maps, masks, limit), abs=1e-9)


def defects():
    masks = np.zeros((4, 32, 32), dtype=bool)
    masks[0, 4:9, 4:9] = True
    masks[1, 20:22, 3:30] = True
    masks[1, 2, 2] = True
    return masks


def test_a_perfect_map_gives_one_and_its_complement_nothing():
    masks = defects()
    assert aupro(masks.astype(float), masks) == pytest.approx(1.0)
    # One threshold separates all normal pixels from none: the curve is a straight line from (0, 0), then (1, 0).
    assert aupro(~masks, masks) == pytest.approx(0.0, abs=1e-12)


def test_small_regions_count_as_much_as_large_ones():
    masks = defects()
    found = masks.astype(float)
    found[1, 2, 2] = 0.0
    assert aupro(found, masks, fpr_limit=1e-9) == pytest.approx(2 / 3)


def test_only_the_order_of_scores_counts():
    masks = defects()
    maps = np.random.default_rng(0).standard_normal(masks.shape) + masks
    assert aupro(maps, masks) == pytest.approx(aupro(np.exp(3 * maps), masks), abs=1e-12)
    assert auroc(maps, masks) == pytest.approx(auroc(np.arctan(maps), masks), abs=1e-12)


def test_connectivity_decides_what_a_region_is():
    mask = np.zeros((1, 6, 6), dtype=bool)
    mask[0, 1, 1] = mask[0, 2, 2] = mask[0, 2, 3] = True
    found = np.zeros((1, 6, 6))
    found[0, 1, 1] = 1.0
    assert aupro(found, mask, connectivity=8, fpr_limit=1e-9) == pytest.approx(1 / 3)
    assert aupro(found, mask, connectivity=4, fpr_limit=1e-9) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 4), dtype=bool), "none has an anomalous pixel"),
        (np.zeros((1, 4, 4)), np.ones((1, 4, 4), dtype=bool), "no normal pixel"),
        (np.full((1, 4, 4), np.nan), np.eye(4, dtype=bool)[None], "NaN"),
        (np.zeros((1, 4, 5)), np.eye(4, dtype=bool)[None], "mask 0"),
        (np.zeros((2, 4, 4)), np.eye(4, dtype=bool)[None], "one a map"),
    ],
)
def test_refusals(maps, masks, message):
    with pytest.raises(ValueError, match=message):
        aupro(maps, masks)


def test_labels_of_one_kind_have_no_roc():
    with pytest.raises(ValueError, match="both normal and anomalous"):
        auroc([0.1, 0.2], [1, 1])
