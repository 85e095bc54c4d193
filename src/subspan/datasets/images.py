"""Images in folders and zip archives, decoded one at a time when asked for."""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from subspan.base import require
from subspan.base.reading import read_bytes, readable_name, reading, regular_file

_LOSSY_SUFFIXES = frozenset({".jpg", ".jpeg", ".webp"})
_CLASS_LEVELS = 32
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"})
MAX_PIXELS = 100_000_000
MAX_BYTES = 512 * 2**20


def open_image(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Any:
    """A decoded, upright PIL image from a file or its bytes.

    The stored mode is kept (grey, RGBA, 16 bit, …), of several frames the first is taken. Needs the extra `vision`.

    Parameters
    ----------
    source
        Path or bytes.
    name
        What errors call it; None: the path.

    Returns
    -------
    PIL image

    Raises
    ------
    ValueError
        For what is broken, truncated, no image, or declares more than 100 million pixels.

    Examples
    --------
    >>> import io
    >>> from PIL import Image
    >>> from subspan.datasets import open_image
    >>> file = io.BytesIO()
    >>> Image.new("L", (4, 3)).save(file, "png")
    >>> open_image(file.getvalue()).size
    (4, 3)
    """
    image_module, operations = require("PIL.Image", extra="vision"), require("PIL.ImageOps", extra="vision")
    shown = readable_name(name or (os.fspath(source) if not isinstance(source, bytes) else "image"))
    opened = io.BytesIO(source) if isinstance(source, bytes) else regular_file(source, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with image_module.open(opened) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels, more than the {MAX_PIXELS} allowed")
                image.load()
                upright = operations.exif_transpose(image)
                return upright if upright is not image else image.copy()
    except (image_module.DecompressionBombError, ValueError) as error:
        raise ValueError(f"image {shown}: {error}") from error
    except Exception as error:
        raise ValueError(f"image {shown}: broken or not an image ({str(error) or type(error).__name__})") from error


class ImageCollection(Sequence[Any]):
    """Images of a folder or zip archive by index, each decoded when asked for.

    A slice or `subset(indices)` is a collection again. Safe to index from several threads and worker processes.

    Parameters
    ----------
    root
        Folder or zip archive.
    names
        Of the images, below the root.
    labels
        One an image; None: the folder that it lies in.

    Raises
    ------
    ValueError
        Where there is not one label an image.

    Examples
    --------
    >>> from subspan.datasets import ImageCollection
    >>> images = ImageCollection("pets", ["cats/tom.png", "dogs/rex.png"])
    >>> images.labels, images[1:].names
    (['cats', 'dogs'], ['dogs/rex.png'])
    """

    def __init__(self, root: str | os.PathLike[str], names: Iterable[str], labels: Iterable[str] | None = None) -> None:
        self.root = Path(root)
        self.names = list(names)
        self.labels = list(labels) if labels is not None else [name.rpartition("/")[0] for name in self.names]
        if len(self.labels) != len(self.names):
            raise ValueError(f"labels: one an image is needed, got {len(self.labels)} for {len(self.names)}")
        self._files = _Archive(self.root) if self.root.is_file() else None

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ImageCollection({str(self.root)!r}, {len(self)} images)"

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.subset(range(*index.indices(len(self))))
        name = self.names[index]
        return open_image(self.read(name), name)

    def read(self, name: str) -> bytes:
        """The undecoded bytes of one file."""
        if self._files is not None:
            return self._files.read(name)
        return read_bytes(self.root / name, MAX_BYTES)

    def subset(self, indices: Iterable[int]) -> ImageCollection:
        """The images at these indices, in this order."""
        chosen = [int(index) for index in indices]
        return ImageCollection(self.root, [self.names[i] for i in chosen], [self.labels[i] for i in chosen])

    def without_broken(self) -> ImageCollection:
        """Only the images that decode (all are tried); a warning counts the others and names the first."""
        errors: dict[int, str] = {}
        for index in range(len(self)):
            try:
                self[index]
            except ValueError as error:
                errors[index] = str(error)
        if errors:
            first = next(iter(errors.values()))
            warnings.warn(f"{len(errors)} of {len(self)} images are left out; the first: {first}", stacklevel=2)
        return self.subset(index for index in range(len(self)) if index not in errors)


def image_folder(
    path: str | os.PathLike[str], *, on_broken: Literal["error", "skip"] = "error", limit: int | None = None
) -> ImageCollection:
    """All images under a folder or in a zip archive, sorted by name; an image's label is the folder that it lies in.

    Parameters
    ----------
    path
        Folder or zip archive.
    on_broken
        "error" names the file when it is decoded; "skip" tries all now and leaves the broken ones out with a warning.
    limit
        Only the first so many.

    Returns
    -------
    ImageCollection

    Raises
    ------
    ValueError
        For a missing path, and where no image (or none that decodes) is there.

    Examples
    --------
    >>> from pathlib import Path
    >>> from subspan.datasets import image_folder
    >>> Path("pictures/cats").mkdir(parents=True)
    >>> Path("pictures/cats/tom.png").touch()
    >>> image_folder("pictures").labels
    ['cats']
    """
    if on_broken not in ("error", "skip"):
        raise ValueError(f"on_broken: 'error' or 'skip', got {on_broken!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: at least 1, got {limit}")
    names = [name for name in _file_names(Path(path)) if Path(name).suffix.lower() in IMAGE_SUFFIXES][:limit]
    if not names:
        raise ValueError(f"path: {os.fspath(path)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    found = ImageCollection(path, names)
    if on_broken == "skip":
        found = found.without_broken()
        if not len(found):
            raise ValueError(f"path: none of the {len(names)} images of {os.fspath(path)!r} can be decoded")
    return found


@dataclass(frozen=True)
class AnomalyImages:
    """Normal training images, and test images with defects: the layout of MVTec AD (Bergmann et al., 2019).

    Attributes
    ----------
    train
        Normal images.
    test
        Test images; `test.labels` are the defect types, "good" = none.
    mask_names
        File of each test image's mask, None where there is none.
    """

    train: ImageCollection
    test: ImageCollection
    mask_names: tuple[str | None, ...] = field(repr=False)

    @property
    def anomalous(self) -> Bool[np.ndarray, " n"]:
        """Which test images are not good."""
        return np.array([label != "good" for label in self.test.labels], dtype=bool)

    @property
    def located(self) -> Bool[np.ndarray, " n"]:
        """Of which test images it is known where they are defective: the good ones, and those with a mask."""
        return ~self.anomalous | np.array([name is not None for name in self.mask_names], dtype=bool)

    def mask(self, index: int) -> Bool[np.ndarray, "h w"]:
        """Where a test image's defect is, at the image's size; nowhere for a good one.

        Raises ValueError for a defect without a mask (see `located`), and for a mask of another size than its image.
        """
        image = self.test[index]
        name = self.mask_names[index]
        if not self.located[index]:
            raise ValueError(f"mask: the defect image {self.test.names[index]} has none")
        if name is None:
            return np.zeros((image.height, image.width), dtype=bool)
        mask = defect_pixels(open_image(self.test.read(name), name), lossy=Path(name).suffix.lower() in _LOSSY_SUFFIXES)
        if mask.shape != (image.height, image.width):
            shape = f"{mask.shape[1]}×{mask.shape[0]}"
            raise ValueError(f"mask {name}: {shape} pixels, its image has {image.width}×{image.height}")
        return mask


def defect_pixels(mask: Any, *, lossy: bool = False) -> Bool[np.ndarray, "h w"]:
    """Where a mask (PIL image of any mode) marks a defect.

    Where there are few levels, as of class numbers: what is not zero. In a picture of many levels, or a `lossy` one:
    what is brighter than half, so that traces of compression and of resizing mark nothing. What is transparent is no
    defect, and what is not is one where all of it has one colour.
    """
    if mask.mode in ("1", "F") or mask.mode.startswith("I"):
        values = np.asarray(mask)
        return values > 0 if mask.mode == "1" else _marked(values, 1.0 if mask.mode == "F" else 65535.0, lossy)
    if mask.mode not in ("RGBA", "LA", "PA") and "transparency" not in mask.info:
        # The colours of a palette stand for classes, however dark they are.
        grey = np.asarray(mask.convert("L"))
        return grey > 0 if mask.mode == "P" else _marked(grey, 255.0, lossy)
    pixels = np.asarray(mask.convert("RGBA"))
    grey, opaque = np.asarray(mask.convert("RGB").convert("L")), pixels[..., 3] > 127
    if not opaque.all() and len(np.unique(grey[opaque])) <= 1:
        return opaque
    return opaque & _marked(np.where(opaque, grey, 0), 255.0, lossy)


def _marked(values: np.ndarray, white: float, lossy: bool) -> Bool[np.ndarray, "h w"]:
    picture = lossy or (values.max(initial=0) > white / 2 and len(np.unique(values)) > _CLASS_LEVELS)
    return values > (white / 2 if picture else 0)


def is_anomaly_layout(path: str | os.PathLike[str]) -> bool:
    """Whether a folder or zip archive has train/good and test, as MVTec AD has.

    Parameters
    ----------
    path
        Folder or zip archive.

    Returns
    -------
    bool

    Examples
    --------
    >>> from pathlib import Path
    >>> from subspan.datasets import is_anomaly_layout
    >>> Path("screws/train/good").mkdir(parents=True)
    >>> Path("screws/test").mkdir()
    >>> is_anomaly_layout("screws"), is_anomaly_layout("screws/train")
    (True, False)
    """
    root = Path(path)
    if root.is_dir():
        return (root / "train" / "good").is_dir() and (root / "test").is_dir()
    if root.is_file() and zipfile.is_zipfile(root) and root.suffix.lower() == ".zip":
        with reading(root), zipfile.ZipFile(root) as archive:
            names = [f"/{name}" for name in archive.namelist()]
        return any("/train/good/" in name for name in names) and any("/test/" in name for name in names)
    return False


def anomaly_folder(path: str | os.PathLike[str], category: str | None = None) -> AnomalyImages:
    """Read images with defects from a folder or zip archive, lazily.

    The layout is that of MVTec AD: train/good, test/<type>, ground_truth/<type>/<name>_mask.png. A defect may have no
    mask (see `AnomalyImages.located`).

    Parameters
    ----------
    path
        Folder or zip archive.
    category
        The subfolder (or top folder of the archive) where several such layouts lie side by side.

    Returns
    -------
    AnomalyImages

    Raises
    ------
    ValueError
        Naming what is missing: the category, the training or the test images.

    Examples
    --------
    >>> from pathlib import Path
    >>> from subspan.datasets import anomaly_folder
    >>> for name in ("train/good/0.png", "test/good/1.png", "test/crack/2.png"):
    ...     Path("tiles", name).parent.mkdir(parents=True, exist_ok=True)
    ...     Path("tiles", name).touch()
    >>> found = anomaly_folder("tiles")
    >>> found.test.labels, found.anomalous.tolist()
    (['crack', 'good'], [True, False])
    """
    every = [name for name in _file_names(Path(path)) if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    roots = sorted({found.group(1) or "" for name in every if (found := re.match(r"(?:(.*)/)?train/good/", name))})
    if not roots:
        raise ValueError(f"path: {os.fspath(path)!r} has no images under train/good")
    if category is None and len(roots) > 1:
        raise ValueError(f"category: choose one of {', '.join(roots)} of {os.fspath(path)!r}")
    if category is not None and category not in roots:
        have = ", ".join(root or "(its top folder)" for root in roots)
        raise ValueError(f"category: {os.fspath(path)!r} has no {category!r}; it has {have}")
    root = roots[0] if category is None else category
    prefix = f"{root}/" if root else ""
    train = [name for name in every if name.startswith(f"{prefix}train/good/")]
    test = [name for name in every if name.startswith(f"{prefix}test/")]
    if not test:
        raise ValueError(f"path: {os.fspath(path)!r} has no images under {prefix}test")
    types = [name.removeprefix(f"{prefix}test/").partition("/")[0] for name in test]
    masks = {name.removeprefix(f"{prefix}ground_truth/").rpartition(".")[0]: name for name in every}
    mask_names = [None if kind == "good" else _mask_name(name, kind, masks) for name, kind in zip(test, types)]
    return AnomalyImages(
        train=ImageCollection(path, train, ["good"] * len(train)),
        test=ImageCollection(path, test, types),
        mask_names=tuple(mask_names),
    )


def _mask_name(name: str, kind: str, masks: dict[str, str]) -> str | None:
    stem = Path(name).stem
    for candidate in (f"{kind}/{stem}_mask", f"{kind}/{stem}"):
        if candidate in masks and "ground_truth/" in masks[candidate]:
            return masks[candidate]
    return None


def _file_names(root: Path) -> list[str]:
    """Relative POSIX names of the files under a folder or in a zip archive, sorted; hidden ones are left out."""
    if root.is_dir():
        names = [
            Path(folder, file).relative_to(root).as_posix() for folder, _, files in os.walk(root) for file in files
        ]
    else:
        if not zipfile.is_zipfile(regular_file(root)):
            raise ValueError(f"path: {str(root)!r} is neither a folder nor a zip archive")
        names = _Archive(root).names()
    return sorted(
        name for name in names if not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    )


class _Archive:
    """A zip archive read by several threads, reopened in each worker process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])

    def names(self) -> list[str]:
        with self._lock:
            return [entry.filename for entry in self._file().infolist() if not entry.is_dir()]

    def read(self, name: str) -> bytes:
        with self._lock, reading(self.path, problem=f"has no readable {name!r}"):
            entry = self._file().getinfo(name)
            if entry.file_size > MAX_BYTES:
                raise ValueError(f"{name} in {self.path}: {entry.file_size} bytes unpacked, over {MAX_BYTES}")
            return self._file().read(entry)

    def _file(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            with reading(self.path, problem="is a broken zip archive"):
                self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]
