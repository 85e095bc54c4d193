import pytest
import torch

from subspan.models.preprocessing import ImagePreprocessing
from subspan.models.views import _crop_box, random_views

PLAIN = ImagePreprocessing(size=16, mean=0.0, std=1.0, crop_fraction=1.0)


@pytest.fixture
def ramp():
    """Red grows to the right, green downwards, so that a crop's colours tell where it was cut."""
    x = torch.linspace(0, 1, 60).expand(48, 60)
    y = torch.linspace(0, 1, 48).unsqueeze(-1).expand(48, 60)
    return torch.stack([x, y, torch.zeros(48, 60)])


@pytest.mark.parametrize(("ratio", "draw", "size"), [((4.0, 4.0), 0.3, (10, 40)), ((1.0, 4.0), 0.5, (14, 28))])
def test_boxes_are_as_wide_for_their_height_as_drawn_on_a_logarithmic_scale(ratio, draw, size):
    top, left, height, width = _crop_box(100, 100, [[0.0, draw, 0.5, 0.5]], (0.04, 0.04), ratio)
    assert (height, width) == size
    assert 0 <= top <= 100 - height
    assert 0 <= left <= 100 - width


def test_the_first_view_is_the_image_and_the_same_seed_gives_the_same_views(ramp):
    views = random_views(ramp, 9, PLAIN, generator=torch.Generator().manual_seed(0))
    assert views.shape == (9, 3, 16, 16)
    assert torch.equal(views[0], PLAIN(ramp))
    assert torch.equal(views, random_views(ramp, 9, PLAIN, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(views[1], views[2])


def test_crops_cover_the_asked_share_of_the_area(ramp):
    generator = torch.Generator().manual_seed(1)
    for low, high in ((0.1, 0.2), (0.5, 0.9)):
        views = random_views(ramp, 200, PLAIN, scale=(low, high), flip=0.0, generator=generator)[1:]
        # The colour range of a crop of 16 pixels is 15/16 of the side that it was cut from.
        width = (views[:, 0].amax((1, 2)) - views[:, 0].amin((1, 2))) * 16 / 15
        height = (views[:, 1].amax((1, 2)) - views[:, 1].amin((1, 2))) * 16 / 15
        share = width * height
        assert float(share.min()) > low * 0.8
        assert float(share.max()) < high * 1.25
        assert float(share.max() - share.min()) > 0.5 * (high - low)


def test_half_of_the_views_are_mirrored(ramp):
    views = random_views(ramp, 400, PLAIN, generator=torch.Generator().manual_seed(2))[1:]
    mirrored = views[:, 0, :, 0].mean(-1) > views[:, 0, :, -1].mean(-1)
    assert 0.4 < float(mirrored.float().mean()) < 0.6
    upright = random_views(ramp, 50, PLAIN, flip=0.0, generator=torch.Generator().manual_seed(2))[1:]
    assert bool((upright[:, 0, :, 0].mean(-1) < upright[:, 0, :, -1].mean(-1)).all())


def test_shapes_that_never_fit_fall_back_to_a_centre_crop():
    strip = torch.linspace(0, 1, 400).expand(3, 4, 400)
    view = random_views(strip, 2, PLAIN, scale=(1.0, 1.0), flip=0.0)[1]
    assert float(view.mean()) == pytest.approx(0.5, abs=1e-2)


def test_bad_arguments_are_refused(ramp):
    with pytest.raises(ValueError, match="count: at least 1"):
        random_views(ramp, 0, PLAIN)
    with pytest.raises(ValueError, match="scale: needs"):
        random_views(ramp, 2, PLAIN, scale=(0.0, 1.0))
