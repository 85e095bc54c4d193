"""Data sets by name: bundled ones, and those of a local data folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspan.base.reading import text_lines
from subspan.base.tables import read_arrays

from . import original
from .bundled import BUNDLED
from .images import ImageCollection, anomaly_folder, image_folder
from .texts import iterate_records


@dataclass(frozen=True)
class SharedDataset:
    """What a data set is, on which terms, where it comes from, and what reads it as its authors distribute it.

    original_file: the name of their file, where it looks like one that is read without their reader.
    """

    title: str
    license: str
    source: str
    read_original: Callable[[str | os.PathLike[str]], Any] | None = None
    original_file: str | None = None


@dataclass(frozen=True)
class ImageRecords:
    """Images with a record each: `images[i]` is described by `records[i]`.

    Attributes
    ----------
    images
        Decoded when asked for.
    records
        A dict an image.
    """

    images: ImageCollection
    records: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.records)


_TORONTO = "https://www.cs.toronto.edu/~kriz/cifar.html (binary version)"

SHARED: dict[str, SharedDataset] = {
    "cifar10": SharedDataset("CIFAR-10", "research use", _TORONTO, original.cifar10),
    "cifar100": SharedDataset("CIFAR-100", "research use", _TORONTO, original.cifar100),
    "fashion_mnist": SharedDataset(
        "Fashion-MNIST", "MIT", "https://github.com/zalandoresearch/fashion-mnist", original.fashion_mnist
    ),
    "mnist10k": SharedDataset("MNIST", "CC BY-SA 3.0", "http://yann.lecun.com/exdb/mnist", original.mnist),
    "usps": SharedDataset("USPS digits", "not stated", "https://github.com/SK4772/GReBLS"),
    "coil20": SharedDataset(
        "COIL-20 objects", "research use", "https://www.cs.columbia.edu/CAVE/software/softlib/coil-20.php"
    ),
    "orl": SharedDataset("ORL faces", "research use", "https://cam-orl.co.uk/facedatabase.html"),
    "yaleb": SharedDataset("Extended Yale B faces", "research use", "http://vision.ucsd.edu/~leekc/ExtYaleDatabase"),
    "graphs": SharedDataset("Cora, Citeseer, ACM, Wiki", "MIT; not stated", "https://github.com/kimiyoung/planetoid"),
    "wikitext2": SharedDataset("WikiText-2", "CC BY-SA 3.0", "https://github.com/pytorch/examples"),
    "ptb": SharedDataset("Penn Treebank by words", "LDC, research use", "https://catalog.ldc.upenn.edu/LDC99T42"),
    "scifact": SharedDataset("SciFact as in BEIR", "CC BY-NC 2.0", "https://github.com/allenai/scifact"),
    "python_functions": SharedDataset("HumanEval, MBPP", "MIT; CC BY 4.0", "https://github.com/openai/human-eval"),
    "brown": SharedDataset("Brown corpus", "non-commercial use", "https://www.nltk.org/nltk_data"),
    "snli": SharedDataset("SNLI, validation and test", "CC BY-SA 4.0", "https://nlp.stanford.edu/projects/snli"),
    "stsb": SharedDataset("STS benchmark", "CC BY-SA 4.0", "https://ixa2.si.ehu.eus/stswiki"),
    "icl_text": SharedDataset("text classification sets", "their own terms", "https://github.com/hc495/StaICC"),
    "arabic_dialects": SharedDataset(
        "Dial2MSA-Verified", "research use", "https://github.com/khered20/Dial2MSA-Verified"
    ),
    "english_varieties": SharedDataset(
        "King James and World English Bible by verse", "public domain", "https://github.com/aruljohn/Bible-kjv"
    ),
    "tofu": SharedDataset("TOFU", "MIT", "https://github.com/locuslab/tofu"),
    "gsm8k": SharedDataset("GSM8K", "MIT", "https://github.com/openai/grade-school-math"),
    "safety_prompts": SharedDataset(
        "harmful and harmless instructions",
        "Apache-2.0, MIT, CC BY-NC 4.0",
        "https://github.com/andyrdt/refusal_direction",
    ),
    "magnetic_tile": SharedDataset(
        "magnetic-tile surface defects",
        "free to use, cite the paper",
        "https://github.com/abin24/Magnetic-tile-defect-datasets.",
        anomaly_folder,
    ),
    "mvtec_screw": SharedDataset(
        "MVTec AD, screws",
        "CC BY-NC-SA 4.0",
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
        anomaly_folder,
    ),
    "busi": SharedDataset("breast ultrasound images", "CC BY 4.0", "https://doi.org/10.1016/j.dib.2019.104863"),
    "imagenet1k_sample": SharedDataset(
        "one image for each ImageNet class",
        "non-commercial research",
        "https://github.com/EliSchwartz/imagenet-sample-images",
    ),
    "flickr8k_1000": SharedDataset(
        "1000 photographs of Flickr8k with 5 captions each",
        "non-commercial research and education",
        "https://doi.org/10.1613/jair.3994",
    ),
    "named_shapes": SharedDataset(
        "3D models with names", "CC0, Apache-2.0, LGPL-2.1", "https://github.com/KayKit-Game-Assets"
    ),
    "lpc_sprites": SharedDataset(
        "Sprites with known factors", "CC BY-SA 3.0, GPL-3.0", "https://github.com/YingzhenLi/Sprites"
    ),
    "dsprites": SharedDataset(
        "dSprites: shapes with known factors",
        "Apache-2.0",
        "https://github.com/google-deepmind/dsprites-dataset",
        original.dsprites,
        original.DSPRITES,
    ),
    "uci_har": SharedDataset(
        "UCI HAR, phone signals", "CC BY 4.0", "https://doi.org/10.24432/C54S4K", original.uci_har
    ),
    "watch_har": SharedDataset("smartwatch signals of exercises", "BSD-3-Clause", "https://github.com/dmbee/seglearn"),
    "troika_hr": SharedDataset(
        "TROIKA wrist PPG and heart rate",
        "research use",
        "https://doi.org/10.1109/TBME.2014.2359372",
        original.troika,
    ),
}


def data_folder(option: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder of shared data sets: the one given, else the environment variable SUBSPAN_DATA, else None.

    Parameters
    ----------
    option
        A folder, which comes before the variable.

    Returns
    -------
    Path or None

    Raises
    ------
    ValueError
        Where the one that is given is no folder.

    Examples
    --------
    >>> from pathlib import Path
    >>> from subspan.datasets import data_folder
    >>> Path("collected").mkdir()
    >>> data_folder("collected").name
    'collected'
    """
    name, value = (
        ("data", os.fspath(option)) if option is not None else ("SUBSPAN_DATA", os.environ.get("SUBSPAN_DATA"))
    )
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{name}: {value!r} is not a folder")
    return folder


def is_available(name: str, folder: str | os.PathLike[str] | None = None) -> bool:
    """Whether `load` would find a data set.

    Parameters
    ----------
    name, folder
        As in `load`.

    Returns
    -------
    bool

    Examples
    --------
    >>> from subspan.datasets import is_available
    >>> is_available("digits"), is_available("no such data")
    (True, False)
    """
    root = data_folder(folder)
    top = name.partition("/")[0]
    return name in BUNDLED or (top in SHARED and root is not None and (root / top).is_dir())


def load(name: str, folder: str | os.PathLike[str] | None = None) -> Any:
    """Load a data set by name.

    What comes back depends on how it is stored: arrays → a dict of numpy arrays; records → a list of dicts; text → a
    str; several files → a dict of these by file; images with records → `ImageRecords`; the MVTec AD layout →
    `AnomalyImages`. A folder that holds the authors' own files is read as such.

    Parameters
    ----------
    name
        A bundled data set (`BUNDLED`), or one of the data folder (`SHARED`). One of several files is named with a
        slash: `load("icl_text/trec")`, or `load("icl_text/agnews")` for its train and test.
    folder
        Of the shared data sets; None: see `data_folder`.

    Returns
    -------
    dict, list, str, ImageRecords or AnomalyImages

    Raises
    ------
    ValueError
        That says where the data set comes from when it is not there.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from subspan.datasets import load
    >>> Path("data/usps").mkdir(parents=True)
    >>> np.savez("data/usps/usps.npz", x=np.zeros((5, 256)), y=np.arange(5))
    >>> {name: array.shape for name, array in load("usps", "data").items()}
    {'x': (5, 256), 'y': (5,)}
    """
    top, _, part = name.partition("/")
    if name in BUNDLED:
        return BUNDLED[name]()
    if top not in SHARED:
        raise ValueError(f"name: unknown data set {name!r}; known are {', '.join([*BUNDLED, *SHARED])}")
    about, root = SHARED[top], data_folder(folder)
    if root is None or not (root / top).is_dir():
        where = f"{str(root)!r} has no folder {top!r}" if root is not None else "no data folder is set (SUBSPAN_DATA)"
        raise ValueError(f"name: {where}; {about.title} comes from {about.source}")
    files = {file.name: file for file in sorted((root / top).iterdir()) if not file.name.startswith(".")}
    archives = [file for file in files.values() if file.suffix == ".zip"]
    if archives:
        return _load_images(archives[0], files)
    readable = {_stem(file): file for file in files.values() if _reader(file) is not None}
    if about.read_original is not None and (not readable or about.original_file in files):
        return about.read_original(root / top)
    if not readable:
        raise ValueError(f"name: {str(root / top)!r} holds nothing that can be read; it comes from {about.source}")
    return _load_part(part, top, readable) if part else _load_all(top, readable)


def _load_part(part: str, top: str, files: dict[str, Path]) -> Any:
    if part in files:
        return _read(files[part])
    splits = {stem.removeprefix(f"{part}_"): file for stem, file in files.items() if stem.startswith(f"{part}_")}
    if not splits:
        raise ValueError(f"name: {top} has no {part!r}; it has {', '.join(files)}")
    return {split: _read(file) for split, file in splits.items()}


def _load_all(top: str, files: dict[str, Path]) -> Any:
    if len(files) == 1:
        return _read(next(iter(files.values())))
    return {_short(stem, top): _read(file) for stem, file in files.items()}


def _short(stem: str, top: str) -> str:
    """`stsb_train` of `stsb` is `train`."""
    return stem.removeprefix(f"{top}_") if stem.startswith(f"{top}_") else stem


def _load_images(archive: Path, files: dict[str, Path]) -> Any:
    records = [file for file in files.values() if ".jsonl" in file.name]
    if not records:
        return anomaly_folder(archive)
    described = {record.get("file"): record for record in iterate_records(records[0])}
    images = image_folder(archive)
    missing = [name for name in images.names if name not in described]
    if missing or len(described) != len(images):
        raise ValueError(f"name: {records[0].name} does not describe the images of {archive.name} one to one")
    return ImageRecords(images, tuple(described[name] for name in images.names))


def _stem(file: Path) -> str:
    return file.name.partition(".")[0]


def _read(file: Path) -> Any:
    reader = _reader(file)
    assert reader is not None
    return reader(file)


def _reader(file: Path) -> Callable[[Path], Any] | None:
    if file.suffix == ".npz":
        return read_arrays
    if ".jsonl" in file.suffixes:
        return lambda path: list(iterate_records(path))
    return _text if ".txt" in file.suffixes else None


def _text(file: Path) -> str:
    return "".join(line for _, line in text_lines(file))
