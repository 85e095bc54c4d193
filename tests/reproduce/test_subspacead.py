"""The SubspaceAD protocol in small."""

import numpy as np
import pytest
import torch

from subspan.detect import RandomRotations, SubspaceAD
from subspan.measures import auroc

pytest.importorskip("skimage", reason="needs scikit-image's bundled photographs")

from subspan.datasets import is_installed, load
from subspan.reproduce import subspacead
from subspan.reproduce.materials.pasted_defects import DEFECTS, pasted_defects

needs_weights = pytest.mark.skipif(
    not is_installed(subspacead.MODEL), reason=f"the {subspacead.MODEL} weights are not installed"
)


def scene(per_kind=4, seed=0, name="brick"):
    return pasted_defects(load("textures"), name, per_kind=per_kind, seed=seed)


def test_scenes_are_reproducible_and_half_of_the_crops_are_normal():
    one, two, other = scene(), scene(), scene(seed=1)
    assert one.reference.shape == (3, 256, 256)
    assert one.labels.tolist() == [False] * 4 + [True] * 4
    for a, b in zip(one.crops + one.turned, two.crops + two.turned):
        assert torch.equal(a, b)
    assert not torch.equal(one.crops[0], other.crops[0])
    assert all(crop.shape == (3, 128, 128) for crop in one.crops + one.turned)


def test_masks_are_exactly_the_changed_pixels():
    rng = np.random.default_rng(0)
    image = rng.uniform(60, 200, (256, 256))
    others = list(load("textures").values())
    for defect in DEFECTS:
        changed, mask = defect(image, np.array([120, 130]), rng, others)
        assert np.array_equal(changed[~mask], image[~mask])
        assert (changed[mask] != image[mask]).mean() > 0.95
        assert 50 < mask.sum() < 3000


def test_test_crops_do_not_come_from_the_reference():
    drawn = scene(per_kind=6)
    reference = drawn.reference[0]
    for crop, mask in zip(drawn.crops, drawn.masks):
        if mask.any():
            continue
        corner = crop[0, :16, :16]
        windows = reference.unfold(0, 16, 1).unfold(1, 16, 1)
        assert float((windows - corner).abs().amax((-2, -1)).min()) > 0


@needs_weights
@pytest.mark.slow
def test_one_normal_image_is_enough_to_find_defects_in_brick():
    drawn = scene(per_kind=8)
    grid = subspacead._grid(subspacead.MIDDLE, subspacead.INPUT)
    model = SubspaceAD(grid, normalize=True, window=128, augment=RandomRotations(4), blur=4.0).fit([drawn.reference])
    result = model.predict(drawn.crops)
    assert auroc(result.maps, np.stack(drawn.masks)) > 0.93
    assert auroc(result.scores, drawn.labels) > 0.8


def test_table_rows_are_near_the_best_detector():
    found = subspacead.table_rows(range(3))
    assert found.mean("ours") > 0.92
    assert found.mean("ours") > max(found.means().values()) - 0.02
