"""Well-known data sets in the formats that their authors publish."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from subspan.base.array_files import npz_headers
from subspan.base.reading import check_memory, read_bytes, reading, text_lines

_MAX_BYTES = 2**30
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip

_HAR_CHANNELS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")

DSPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
_DSPRITES_FACTORS = ("color", "shape", "scale", "orientation", "x", "y")


def cifar10(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """CIFAR-10 in its binary version (data_batch_1.bin …, test_batch.bin, batches.meta.txt), as distributed.

    x_train (50000, 32, 32, 3) uint8, y_train, x_test (10000, …), y_test, classes.
    """
    root = _subfolder(folder, "cifar-10-batches-bin")
    train = [_cifar_records(root / f"data_batch_{index}.bin", n_labels=1) for index in range(1, 6)]
    x_test, y_test = _cifar_records(root / "test_batch.bin", n_labels=1)
    return {
        "x_train": np.concatenate([x for x, _ in train]),
        "y_train": np.concatenate([y for _, y in train]),
        "x_test": x_test,
        "y_test": y_test,
        "classes": _class_names(root / "batches.meta.txt"),
    }


def cifar100(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """CIFAR-100's binary version (train.bin, test.bin, fine_label_names.txt), fine labels, keys as `cifar10`."""
    root = _subfolder(folder, "cifar-100-binary")
    x_train, y_train = _cifar_records(root / "train.bin", n_labels=2)
    x_test, y_test = _cifar_records(root / "test.bin", n_labels=2)
    classes = _class_names(root / "fine_label_names.txt")
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test, "classes": classes}


def mnist(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """MNIST's idx files (train-images-idx3-ubyte …, also .gz): x_train (n, 28, 28) uint8, y_train, x_test, y_test."""
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        x = read_idx(_present(Path(folder), f"{prefix}-images-idx3-ubyte"))
        y = read_idx(_present(Path(folder), f"{prefix}-labels-idx1-ubyte"))
        if len(x) != len(y):
            raise ValueError(f"folder: {split} has {len(x)} images and {len(y)} labels in {os.fspath(folder)!r}")
        arrays |= {f"x_{split}": x, f"y_{split}": y}
    return arrays


def fashion_mnist(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Fashion-MNIST in the idx format, as `mnist`, with `classes`."""
    return mnist(folder) | {"classes": np.array(_FASHION_CLASSES)}


def dsprites(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """dSprites as distributed: x (737280, 64, 64) uint8 of 0 and 1, factors (n, 6), factor_names.

    The pickled metadata in the file is not read.
    """
    path = _present(Path(folder), DSPRITES)
    headers = npz_headers(path)
    if missing := {"imgs", "latents_classes"} - set(headers):
        raise ValueError(f"folder: {str(path)!r} has no {' and '.join(sorted(missing))}")
    check_memory(sum(math.prod(headers[name][0]) for name in ("imgs", "latents_classes")), f"folder: {str(path)!r}")
    with reading(path, "folder"), np.load(path, allow_pickle=False) as archive:
        images, classes = archive["imgs"], archive["latents_classes"]
    if classes.shape != (len(images), len(_DSPRITES_FACTORS)):
        raise ValueError(f"folder: {str(path)!r} has {len(images)} images and factors of shape {classes.shape}")
    return {"x": images, "factors": classes, "factor_names": np.array(_DSPRITES_FACTORS)}


def uci_har(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """UCI HAR's "Inertial Signals" (train and test folders of text), as distributed, with the people.

    x_train (7352, 9, 128) float32, y_train from 0, people_train, x_test …, channels, classes, fs.
    """
    root = _subfolder(folder, "UCI HAR Dataset")
    found: dict[str, np.ndarray] = {"channels": np.array(_HAR_CHANNELS), "fs": np.array(50)}
    for split in ("train", "test"):
        signals = [_numbers(root / split / "Inertial Signals" / f"{name}_{split}.txt") for name in _HAR_CHANNELS]
        people, labels = (_numbers(root / split / f"{name}_{split}.txt")[:, 0] for name in ("subject", "y"))
        if len({len(rows) for rows in (*signals, people, labels)}) > 1:
            raise ValueError(f"folder: files of {split!r} in {str(root)!r} have different numbers of rows")
        found |= {f"x_{split}": np.stack(signals, 1).astype(np.float32), f"y_{split}": labels.astype(np.int64) - 1}
        found[f"people_{split}"] = people.astype(np.int64)
    names = [line.split()[-1].lower() for line in _class_names(root / "activity_labels.txt")]
    return found | {"classes": np.array(names)}


def troika(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The training set of the IEEE Signal Processing Cup 2015 (DATA_01_TYPE01.mat and its …_BPMtrace.mat), as given.

    sig_01_TYPE01 (6, n) float32, bpm_01_TYPE01 (m,), and so on.
    """
    from scipy.io import loadmat

    root = _subfolder(folder, "Training_data")
    files = sorted(path for path in root.glob("DATA_*_TYPE*.mat") if not path.stem.endswith("BPMtrace"))
    if not files:
        raise ValueError(f"folder: {str(root)!r} has no DATA_…_TYPE….mat")
    found = {}
    for path in files:
        name = path.stem.removeprefix("DATA_")
        for kind, key, file in (("sig", "sig", path), ("bpm", "BPM0", root / f"{path.stem}_BPMtrace.mat")):
            with reading(file, "folder"):
                found[f"{kind}_{name}"] = np.squeeze(loadmat(file)[key]).astype(np.float32)
    return found


def _numbers(path: Path) -> np.ndarray:
    with reading(path, "folder"):
        return np.loadtxt(path, ndmin=2)


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """An idx file (also .gz). Raises ValueError for a wrong magic number or a size that is not the header's."""
    source = Path(path)
    head = read_bytes(source, 4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES:
        raise ValueError(f"path: {str(source)!r} is not an idx file")
    n_axes = head[3]
    start = 4 + 4 * n_axes
    head = read_bytes(source, start)
    if len(head) < start:
        raise ValueError(f"path: {str(source)!r} is cut off in its header")
    shape = tuple(int(size) for size in np.frombuffer(head, ">u4", count=n_axes, offset=4))
    dtype = np.dtype(_IDX_TYPES[head[2]])
    size = math.prod(shape) * dtype.itemsize
    check_memory(2 * size, f"path: {str(source)!r} declares {shape}, which")
    data = read_bytes(source, start + size + 1)
    if len(data) - start != size:
        held = f"has {len(data) - start} bytes of data" if len(data) - start < size else "has more bytes of data"
        raise ValueError(f"path: {str(source)!r} {held}, its header declares {shape}")
    with reading(source):
        return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _cifar_records(path: Path, *, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and the last of the labels of each record."""
    data = np.frombuffer(read_bytes(path, _MAX_BYTES), np.uint8)
    width = n_labels + 3072
    if not len(data) or len(data) % width:
        raise ValueError(f"path: {str(path)!r} has {len(data)} bytes, not a multiple of a record's {width}")
    records = data.reshape(-1, width)
    images = np.ascontiguousarray(records[:, n_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, records[:, n_labels - 1].astype(np.int64)


def _class_names(path: Path) -> np.ndarray:
    return np.array([line.strip() for _, line in text_lines(path) if line.strip()])


def _subfolder(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) / name if (Path(folder) / name).is_dir() else Path(folder)


def _present(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise ValueError(f"folder: {str(folder)!r} has no {name} (or {name}.gz)")
