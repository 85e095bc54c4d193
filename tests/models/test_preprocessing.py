from __future__ import annotations

import numpy as np
import pytest
import torch

from subspan.models import ImagePreprocessing, image_tensor

pil = pytest.importorskip("PIL.Image", reason="pillow is not installed")

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_the_same_picture_in_every_form_is_the_same_tensor() -> None:
    expected = torch.from_numpy(COLOURS.copy()).movedim(-1, 0).float() / 255
    for form in (
        COLOURS,
        pil.fromarray(COLOURS),
        torch.from_numpy(COLOURS.copy()).movedim(-1, 0),
        expected,
        (COLOURS / 255).astype(np.float32),
        COLOURS.astype(np.uint16) * 257,
    ):
        torch.testing.assert_close(image_tensor(form), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, bool])
def test_grey_is_repeated(dtype: type) -> None:
    grey = (np.arange(6).reshape(2, 3) % 2).astype(dtype)
    assert image_tensor(grey).shape == (3, 2, 3)
    assert torch.equal(image_tensor(grey)[0], image_tensor(grey)[2])
    assert image_tensor(grey[..., None]).shape == (3, 2, 3)


def test_sixteen_bits_are_not_clipped_to_eight() -> None:
    deep = pil.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    torch.testing.assert_close(image_tensor(deep)[0, 0], torch.tensor([0.0, 32768 / 65535, 1.0]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = pil.new("RGBA", (1, 1), (0, 0, 0, 0)).convert(mode if mode != "PA" else "LA")
    assert torch.equal(image_tensor(image), torch.ones(3, 1, 1))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("text", TypeError, "got str"),
        (np.zeros((2, 2, 5)), ValueError, r"got \(2, 2, 5\)"),
        (np.zeros((0, 2, 3), np.uint8), ValueError, "shape"),
        (np.zeros(3), ValueError, "shape"),
        (torch.zeros(4, 4, 2, dtype=torch.uint8).movedim(-1, 0), ValueError, r"shape \(3, h, w\)"),
        (np.full((2, 2), 2.0), ValueError, r"in \[0, 1\]"),
        (np.full((2, 2), np.nan), ValueError, "finite"),
        (np.zeros((2, 2), np.int64), ValueError, "uint8, uint16 or float"),
    ],
)
def test_what_is_no_image_is_refused(image: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        image_tensor(image)


def test_sizes() -> None:
    wide = np.zeros((60, 120, 3), np.uint8)
    assert ImagePreprocessing(40)(wide).shape == (3, 40, 40)
    assert ImagePreprocessing((20, 30), resize="squash")(wide).shape == (3, 20, 30)
    assert ImagePreprocessing(resize="none")(wide).shape == (3, 60, 120)
    assert ImagePreprocessing(40).batch([wide, np.zeros((50, 45), np.uint8)]).shape == (2, 3, 40, 40)


def test_the_crop_is_the_middle_of_the_shrunk_image() -> None:
    wide = np.zeros((70, 140), np.uint8)
    wide[:, :36] = 255
    cropped = ImagePreprocessing(35, mean=0.0, std=1.0)(wide)
    assert cropped.max() < 0.01  # 80 columns after shrinking, of which the middle 35 begin at the original's column 38
    assert ImagePreprocessing(35, mean=0.0, std=1.0, resize="squash")(wide)[0, 0, 0] == 1


def test_normalisation_is_the_published_one_of_efficientnet_lite() -> None:
    prepared = ImagePreprocessing(8, mean=127 / 255, std=128 / 255, resize="none")(COLOURS)
    torch.testing.assert_close(prepared, (torch.from_numpy(COLOURS.copy()).movedim(-1, 0) - 127.0) / 128)
    back = ImagePreprocessing(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), resize="none")
    torch.testing.assert_close(back.denormalize(back(COLOURS)), image_tensor(COLOURS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size"),
        ({"size": (4, -1)}, "size"),
        ({"crop_fraction": 0.0}, "crop_fraction"),
        ({"std": 0.0}, "std"),
        ({"std": (1.0, float("nan"), 1.0)}, "std"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImagePreprocessing(**options)


def test_batches_need_images_of_one_size() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        ImagePreprocessing().batch([])
    with pytest.raises(ValueError, match="of several sizes"):
        ImagePreprocessing(resize="none").batch([COLOURS, COLOURS[1:]])


def test_the_border_is_cut_away_only_where_one_vector_describes_the_picture() -> None:
    wide = np.zeros((20, 40, 3), dtype=np.uint8)
    wide[:, 36:] = 255
    assert ImagePreprocessing(20, mean=0.0, std=1.0)(wide).max() == 0
    assert ImagePreprocessing(20, mean=0.0, std=1.0).whole()(wide).max() == 1
    assert ImagePreprocessing(20, mean=0.0, std=1.0, resize="crop").whole()(wide).max() == 0
