"""Data sets by name, from the folder, in their authors' formats, or bundled."""

from __future__ import annotations

import gzip
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from subspan.datasets import AnomalyImages, ImageRecords, data_folder, is_available, load, original
from subspan.datasets.shared import SHARED

pil = pytest.importorskip("PIL.Image", reason="pillow is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setenv("SUBSPAN_DATA", str(root))
    return root


def test_the_folder_is_the_option_or_the_environments(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data_folder() == folder
    assert data_folder(tmp_path) == tmp_path
    monkeypatch.delenv("SUBSPAN_DATA")
    assert data_folder() is None
    with pytest.raises(ValueError, match=r"data: .* is not a folder"):
        data_folder(tmp_path / "none")
    monkeypatch.setenv("SUBSPAN_DATA", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"SUBSPAN_DATA: .* is not a folder"):
        data_folder()


@pytest.mark.parametrize("name", ["mvtec_screw", "ptb", "python_functions", "scifact", "uci_har"])
def test_what_lies_in_the_folder_is_known(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    np.savez(folder / name / f"{name}.npz", x=np.eye(2))
    assert is_available(name)
    assert load(name)["x"].tolist() == [[1, 0], [0, 1]]


def write_jsonl(path: Path, *records: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def test_what_a_name_loads(folder: Path) -> None:
    (folder / "usps").mkdir()
    np.savez(folder / "usps" / "usps.npz", x=np.eye(3), classes=np.array(["a", "b"]))
    assert load("usps")["classes"].tolist() == ["a", "b"]
    for split in ("train", "test"):
        write_jsonl(folder / "stsb" / f"stsb_{split}.jsonl.gz", {"score": split})
        write_jsonl(folder / "icl_text" / f"agnews_{split}.jsonl.gz", {"text": split})
    write_jsonl(folder / "icl_text" / "trec.jsonl.gz", {"text": "q"})
    assert load("stsb") == {"train": [{"score": "train"}], "test": [{"score": "test"}]}
    assert load("icl_text/agnews")["test"] == [{"text": "test"}]
    assert load("icl_text/trec") == [{"text": "q"}]
    assert set(load("icl_text")) == {"agnews_train", "agnews_test", "trec"}
    (folder / "brown").mkdir()
    with gzip.open(folder / "brown" / "brown.txt.gz", "wt") as stream:
        stream.write("a text\n")
    assert load("brown") == "a text\n"


def test_images_with_records(folder: Path) -> None:
    root = folder / "flickr8k_1000"
    write_jsonl(root / "captions.jsonl.gz", *({"file": f"{i}.png", "captions": [str(i)]} for i in (2, 0, 1)))
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for index in range(3):
            with archive.open(f"{index}.png", "w") as stream:
                pil.new("L", (2, 2), index).save(stream, "png")
    data = load("flickr8k_1000")
    assert isinstance(data, ImageRecords)
    for image, record in zip(data.images, data.records):
        assert record["captions"] == [str(image.getpixel((0, 0)))]
    write_jsonl(root / "captions.jsonl.gz", {"file": "0.png", "captions": []})
    with pytest.raises(ValueError, match="does not describe the images"):
        load("flickr8k_1000")


def test_what_is_not_there_is_told_with_its_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'cifar11'; known are .*cifar10"):
        load("cifar11")
    with pytest.raises(ValueError, match="has no folder 'cifar10'; CIFAR-10 comes from https://www"):
        load("cifar10")
    assert not is_available("cifar10")
    monkeypatch.delenv("SUBSPAN_DATA")
    with pytest.raises(ValueError, match=r"no data folder is set \(SUBSPAN_DATA\); STS benchmark comes from"):
        load("stsb")
    assert is_available("textures")
    write_jsonl(folder / "icl_text" / "trec.jsonl.gz", {"text": "q"})
    with pytest.raises(ValueError, match="icl_text has no 'imdb'; it has trec"):
        load("icl_text/imdb", folder)
    (folder / "gsm8k").mkdir()
    with pytest.raises(ValueError, match="holds nothing that can be read"):
        load("gsm8k", folder)


def test_pickled_arrays_are_refused(folder: Path) -> None:
    (folder / "orl").mkdir()
    np.savez(folder / "orl" / "orl.npz", x=np.array([None], dtype=object))
    with pytest.raises(ValueError, match="cannot be read"):
        load("orl")


def cifar_bytes(rng: np.random.Generator, n: int, n_labels: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, (n, n_labels), dtype=np.uint8)
    records = np.concatenate([labels, images.transpose(0, 3, 1, 2).reshape(n, -1)], axis=1)
    return records.tobytes(), images, labels[:, -1]


def test_cifar10_in_its_binary_version(folder: Path) -> None:
    rng = np.random.default_rng(0)
    root = folder / "cifar10" / "cifar-10-batches-bin"
    root.mkdir(parents=True)
    batches = [cifar_bytes(rng, 3, 1) for _ in range(6)]
    for index, (data, _, _) in enumerate(batches[:5], start=1):
        (root / f"data_batch_{index}.bin").write_bytes(data)
    (root / "test_batch.bin").write_bytes(batches[5][0])
    (root / "batches.meta.txt").write_text("airplane\nautomobile\n\n")
    loaded = original.cifar10(folder / "cifar10")
    np.testing.assert_array_equal(loaded["x_train"], np.concatenate([images for _, images, _ in batches[:5]]))
    np.testing.assert_array_equal(loaded["y_test"], batches[5][2])
    assert loaded["classes"].tolist() == ["airplane", "automobile"]
    (root / "test_batch.bin").write_bytes(batches[5][0][:-1])
    with pytest.raises(ValueError, match="not a multiple of a record's 3073"):
        original.cifar10(root)
    (root / "test_batch.bin").unlink()
    with pytest.raises(ValueError, match=r"test_batch\.bin' does not exist"):
        original.cifar10(root)


def test_cifar100_keeps_the_fine_label(folder: Path) -> None:
    root = folder / "cifar-100-binary"
    root.mkdir()
    data, images, labels = cifar_bytes(np.random.default_rng(1), 4, 2)
    for name in ("train.bin", "test.bin"):
        (root / name).write_bytes(data)
    (root / "fine_label_names.txt").write_text("apple\n")
    loaded = original.cifar100(folder)
    np.testing.assert_array_equal(loaded["x_test"], images)
    np.testing.assert_array_equal(loaded["y_train"], labels)


def test_dsprites_as_distributed_without_its_pickled_part(folder: Path) -> None:
    root = folder / "dsprites"
    root.mkdir()
    images = np.random.default_rng(0).integers(2, size=(5, 64, 64), dtype=np.uint8)
    classes = np.arange(30).reshape(5, 6)
    archive = {"metadata": np.array({"a": 1}), "imgs": images, "latents_classes": classes}
    np.savez_compressed(root / original.DSPRITES, **archive)
    loaded = load("dsprites")
    np.testing.assert_array_equal(loaded["x"], images)
    assert dict(zip(loaded["factor_names"].tolist(), loaded["factors"][1]))["x"] == 10
    np.savez_compressed(root / original.DSPRITES, imgs=images, latents_classes=classes[:4])
    with pytest.raises(ValueError, match=r"5 images and factors of shape \(4, 6\)"):
        load("dsprites")
    np.savez_compressed(root / original.DSPRITES, imgs=images)
    with pytest.raises(ValueError, match="has no latents_classes"):
        load("dsprites")
    (root / original.DSPRITES).unlink()
    with pytest.raises(ValueError, match=r"has no dsprites_ndarray"):
        load("dsprites")


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def test_mnist_in_the_idx_format_is_found_under_its_name(folder: Path) -> None:
    root = folder / "fashion_mnist"
    root.mkdir()
    images, labels = np.arange(2 * 9).reshape(2, 3, 3), np.array([3, 4])
    for prefix in ("train", "t10k"):
        (root / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    loaded = load("fashion_mnist")
    np.testing.assert_array_equal(loaded["x_train"], images)
    np.testing.assert_array_equal(loaded["y_test"], labels)
    assert loaded["classes"][9] == "Ankle boot"
    (root / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels[:1]))
    with pytest.raises(ValueError, match="test has 2 images and 1 labels"):
        load("fashion_mnist")
    (root / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="has no t10k-labels-idx1-ubyte"):
        load("fashion_mnist")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an idx file"),
        (b"\0\0\x07\x01", "not an idx file"),
        (b"\0\0\x08\x03\0\0", "cut off in its header"),
        (idx_bytes(np.zeros((2, 2)))[:-1], r"has 3 bytes of data, its header declares \(2, 2\)"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "declares .* GiB, this machine"),
    ],
)
def test_a_malformed_idx_file_is_one_clear_error(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        original.read_idx(tmp_path / "x")


def test_bundled_data() -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    textures, photographs = load("textures"), load("photographs")
    assert {name: texture.shape for name, texture in textures.items()} == dict.fromkeys(textures, (512, 512))
    assert all(photo.shape[2] == 3 and photo.dtype == np.uint8 for photo in photographs.values())
    assert load("digits")["x"].shape == (1797, 8, 8)
    assert load("breast_cancer")["x"].shape == (569, 30)


@pytest.mark.parametrize(
    "name", ["cifar10", "stsb", "imagenet1k_sample", "flickr8k_1000", "magnetic_tile", "icl_text/agnews"]
)
def test_the_shared_sets_load(shared_data: Path, name: str) -> None:
    data = load(name, shared_data)
    if name == "magnetic_tile":
        assert isinstance(data, AnomalyImages)
        assert (len(data.train), len(data.test), int(data.anomalous.sum())) == (250, 542, 392)
        assert data.mask(0).any()
    elif name in ("imagenet1k_sample", "flickr8k_1000"):
        assert len(data) == len(data.images) == 1000
        assert data.records[5]["file"] == data.images.names[5]
    elif name == "cifar10":
        assert data["x_train"].shape == (10000, 32, 32, 3)
    else:
        assert {"train", "test"} <= set(data)


def test_every_shared_set_says_where_it_comes_from() -> None:
    assert all(about.source.startswith("http") and about.license for about in SHARED.values())
