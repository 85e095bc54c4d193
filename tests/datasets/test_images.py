from __future__ import annotations

import io
import multiprocessing
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subspan.datasets import ImageCollection, anomaly_folder, image_folder, open_image
from subspan.datasets import images as module

pil = pytest.importorskip("PIL.Image", reason="pillow is not installed")


def picture(value: int = 0, size: tuple[int, int] = (8, 6)) -> Any:
    return pil.new("RGB", size, (value, value, value))


def encoded(image: Any, kind: str = "png", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for index, name in enumerate(["b/2.png", "b/1.png", "a/deep/3.jpg", "4.PNG"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(root / name)
    for name in (".hidden/5.png", "__MACOSX/6.png", ".DS_Store", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(root / name, "png")
    return root


@pytest.fixture
def archive(tree: Path) -> Path:
    return Path(shutil.make_archive(str(tree.parent / "images"), "zip", tree))


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_images_are_found_labelled_by_folder_and_decoded_lazily(tree: Path, archive: Path, kind: str) -> None:
    images = image_folder(tree if kind == "folder" else archive)
    assert images.names == ["4.PNG", "a/deep/3.jpg", "b/1.png", "b/2.png"]
    assert images.labels == ["", "a/deep", "b", "b"]
    assert [image.size for image in images] == [(8, 6)] * 4
    assert images[-1].getpixel((0, 0)) == (0, 0, 0)
    assert images[0].getpixel((0, 0)) == (3, 3, 3)
    part = images[1:3].subset([1])
    assert (part.names, part.labels) == (["b/1.png"], ["b"])
    assert len(image_folder(tree, limit=2)) == 2


def _pixel(images: ImageCollection, index: int) -> int:
    return images[index].getpixel((0, 0))[0]


def test_an_archive_is_read_by_threads_and_by_other_processes(archive: Path) -> None:
    images = image_folder(archive)
    truth = [_pixel(images, index) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: _pixel(images, i % 4), range(40))) == truth * 10
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(_pixel, [(images, index) for index in range(4)]) == truth


def test_a_broken_image_is_named_or_left_out_with_a_warning(tree: Path) -> None:
    (tree / "b" / "0.png").write_bytes(encoded(picture())[:40])
    (tree / "c.jpg").write_text("no image")
    images = image_folder(tree)
    with pytest.raises(ValueError, match=r"image b/0.png: broken or not an image"):
        images[2]
    with pytest.warns(UserWarning, match="2 of 6 images are left out; the first: image b/0.png"):
        assert len(image_folder(tree, on_broken="skip")) == 4


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        image_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no image"):
        image_folder(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images"), pytest.warns(UserWarning, match="1 of 1"):
        image_folder(tmp_path, on_broken="skip")
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(ValueError, match="neither a folder nor a zip archive"):
        image_folder(tmp_path / "t.txt")


def bomb() -> bytes:
    """A PNG of a few bytes that declares 60 000 × 60 000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    parts = [
        (struct.pack(">I", len(data)), kind + data, struct.pack(">I", zlib.crc32(kind + data))) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(b"".join(part) for part in parts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "broken or not an image"),
        (b"GIF89a", "broken or not an image"),
        (encoded(picture())[:-30], "broken"),
        (encoded(picture(), "jpeg")[:200], "broken"),
        (bomb(), "pixels"),
    ],
)
def test_what_does_not_decode_is_a_value_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        open_image(data, "x.png")
    assert "x.png" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_images_orientation_is_applied() -> None:
    exif = pil.Exif()
    exif[0x0112] = 6
    image = open_image(encoded(picture(size=(8, 6)), "jpeg", exif=exif))
    assert image.size == (6, 8)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "LA", "CMYK"])
def test_modes_are_kept(mode: str) -> None:
    kind = "tiff" if mode == "CMYK" else "png"
    assert open_image(encoded(pil.new(mode, (4, 4)), kind)).mode == mode


def test_an_entry_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", b"\0" * 10_000)
    monkeypatch.setattr(module, "MAX_BYTES", 9_999)
    with pytest.raises(ValueError, match="10000 bytes unpacked"):
        image_folder(tmp_path / "z.zip")[0]


@pytest.fixture
def anomalies(tmp_path: Path) -> Path:
    root = tmp_path / "bottle"
    for name in ("train/good/0.png", "train/good/1.png", "test/good/0.png", "test/crack/0.png", "test/crack/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(7).save(root / name)
    (root / "ground_truth/crack").mkdir(parents=True)
    for index in range(2):
        mask = pil.new("L", (8, 6))
        mask.putpixel((index, 2), 255)
        mask.save(root / f"ground_truth/crack/{index}_mask.png")
    return root


@pytest.mark.parametrize(
    "place", [lambda root: (root, None), lambda root: (root.parent, "bottle"), lambda root: (root.parent, None)]
)
def test_the_anomaly_layout(anomalies: Path, place: Callable[[Path], tuple[Path, str | None]]) -> None:
    path, category = place(anomalies)
    data = anomaly_folder(path, category)
    assert len(data.train) == 2
    assert data.test.labels == ["crack", "crack", "good"]
    assert data.anomalous.tolist() == [True, True, False]
    assert [np.argwhere(data.mask(index)).tolist() for index in range(3)] == [[[2, 0]], [[2, 1]], []]
    assert data.mask(2).shape == (6, 8)


def test_the_anomaly_layout_in_an_archive(anomalies: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", anomalies)
    data = anomaly_folder(archive)
    assert data.anomalous.sum() == 2
    assert data.mask(1).sum() == 1


def test_what_is_missing_in_an_anomaly_layout_is_named(anomalies: Path) -> None:
    shutil.copytree(anomalies, anomalies.parent / "cable")
    with pytest.raises(ValueError, match="choose one of bottle, cable"):
        anomaly_folder(anomalies.parent)
    with pytest.raises(ValueError, match="has no 'hazelnut'; it has bottle, cable"):
        anomaly_folder(anomalies.parent, "hazelnut")
    shutil.rmtree(anomalies / "train")
    with pytest.raises(ValueError, match="no images under train/good"):
        anomaly_folder(anomalies)


def test_a_defect_without_a_mask_is_a_defect_still(anomalies: Path) -> None:
    (anomalies / "ground_truth/crack/1_mask.png").unlink()
    data = anomaly_folder(anomalies)
    assert data.anomalous.tolist() == [True, True, False]
    assert data.located.tolist() == [True, False, True]
    assert not data.mask(2).any()
    with pytest.raises(ValueError, match=r"defect image test/crack/1\.png has none"):
        data.mask(1)


def disc_mask(mode: str) -> Any:
    """A mask (32, 32) of a disc, as pictures of several modes store it."""
    y, x = np.indices((32, 32))
    disc = np.where(np.hypot(y - 13, x - 17) < 9, 255, 0).astype(np.uint8)
    white = np.full_like(disc, 255)
    stored = {
        "L": disc,
        "1": disc > 0,
        "classes": np.where(disc > 0, 1 + x // 16, 0).astype(np.uint8),
        "I;16": disc.astype(np.uint16) * 257,
        "RGB": np.stack([disc, disc * 0, disc * 0], -1),
        "white on transparent white": np.stack([white, white, white, disc], -1),
        "black on transparent black": np.stack([white * 0, white * 0, white * 0, disc], -1),
        "opaque": np.stack([disc, disc, disc, white], -1),
        "LA": np.stack([white, disc], -1),
    }
    if mode == "dark palette":
        image = pil.fromarray(np.where(disc > 0, 1, 0).astype(np.uint8), mode="P")
        image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
        return image
    return pil.fromarray(stored[mode])


@pytest.mark.parametrize(
    "mode",
    ["L", "1", "classes", "I;16", "RGB", "dark palette", "white on transparent white", "black on transparent black",
     "opaque", "LA"],
)  # fmt: skip
def test_masks_of_every_mode_mark_the_same_pixels(anomalies: Path, mode: str) -> None:
    for name in ("test/crack/0.png", "ground_truth/crack/0_mask.png"):
        disc_mask(mode).save(anomalies / name)
    assert np.array_equal(anomaly_folder(anomalies).mask(0), np.asarray(disc_mask("1")))


@pytest.mark.parametrize("kept_as", ["jpg", "png"])
def test_traces_of_compression_mark_nothing(anomalies: Path, kept_as: str) -> None:
    mask = disc_mask("L")
    mask.save(anomalies / "mask.jpg", quality=60)
    compressed = pil.open(anomalies / "mask.jpg")
    assert (np.asarray(compressed) > 0).mean() > 1.1 * (np.asarray(mask) > 0).mean()
    (anomalies / "ground_truth/crack/0_mask.png").unlink()
    target = anomalies / f"ground_truth/crack/0_mask.{kept_as}"
    if kept_as == "jpg":
        shutil.copy(anomalies / "mask.jpg", target)
    else:
        compressed.save(target)
    mask.save(anomalies / "test/crack/0.png")
    assert np.array_equal(anomaly_folder(anomalies).mask(0), np.asarray(disc_mask("1")))


def test_a_mask_of_another_size_is_refused(anomalies: Path) -> None:
    pil.new("L", (9, 6)).save(anomalies / "ground_truth/crack/0_mask.png")
    with pytest.raises(ValueError, match="9×6 pixels, its image has 8×6"):
        anomaly_folder(anomalies).mask(0)
