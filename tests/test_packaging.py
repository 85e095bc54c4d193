"""What is declared, what is pinned and what is installed agree."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sources import nodes_of, source_files

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "src/subspan/datasets/weights.txt"
PINNED = {path.name: path for path in [*ROOT.glob("requirements*.txt"), WEIGHTS]}
PIN = re.compile(r"[\w.-]+==[\w.+!]+(?: ; [^#]+?)?(?: --hash=sha256:[0-9a-f]{64})+")
# Hosts under .example are nobody's (RFC 2606).
INDEX_HOST = re.compile(
    r"pypi\.org|pythonhosted\.org|pytorch\.org/whl|https?://(?![^\s/]+\.example/)[^\s/]+/(?:[\w/-]+/)?simple\b"
)


@pytest.fixture(scope="module")
def project() -> dict:
    """The whole of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def settings_reader() -> ModuleType:
    """The script that runs uv under pip's settings."""
    specification = importlib.util.spec_from_file_location("run_uv", ROOT / ".ci/uv.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def pins(*names: str) -> dict[str, list[Requirement]]:
    """Pinned requirements of the named files by package."""
    found: dict[str, list[Requirement]] = {}
    for name in names:
        for line in PINNED[name].read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                requirement = Requirement(line.split(" --hash=")[0])
                found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def asked_extras() -> dict[str, str]:
    """Extras that some `require(..., extra=...)` names, with the file that does."""
    found = {}
    for path, source in source_files().items():
        for node in nodes_of(source):
            if isinstance(node, ast.Call):
                for word in node.keywords:
                    if word.arg == "extra" and isinstance(word.value, ast.Constant):
                        found[word.value.value] = path.name
    return found


def imported_packages(source: str) -> set[tuple[str, str | None]]:
    """What a module imports beside its own package and Python's, each with the extra that `require` says brings it."""
    found: set[tuple[str, str | None]] = set()
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add((node.module, None))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "require",
            "import_module",
        ):
            extra = next((word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)), None)
            found |= {(word.value, extra) for word in node.args if isinstance(getattr(word, "value", None), str)}
    known = {"subspan", *sys.stdlib_module_names}
    return {(name.split(".")[0], extra) for name, extra in found if name.split(".")[0] not in known}


def distributions(requirements: list[str]) -> set[str]:
    """Canonical names of what is required."""
    return {canonicalize_name(Requirement(line).name) for line in requirements}


@pytest.mark.parametrize("name", sorted(PINNED))
def test_every_line_is_a_pin_with_hashes(name: str) -> None:
    lines = PINNED[name].read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#") and not PIN.fullmatch(line)] == []
    assert pins(name)


@pytest.mark.parametrize(
    "line",
    ["numpy>=2", "numpy==2.4.6", "numpy==2.4.6 --hash=sha256:12", "--index-url https://index.example/simple", "-e ."],
)
def test_a_line_without_pin_or_hash_is_seen(line: str) -> None:
    assert not PIN.fullmatch(line)


def test_every_declared_dependency_is_pinned_within_its_bounds(project: dict) -> None:
    declared = list(project["project"]["dependencies"])
    extras = project["project"]["optional-dependencies"]
    # What is no part of `all` is not installed here.
    for group in [*(extras[name] for name in extras if name != "wireless"), project["dependency-groups"]["dev"]]:
        declared += group
    pinned = pins("requirements.txt", "requirements-torch.txt")
    for requirement in map(Requirement, declared):
        if requirement.name == "subspan":
            continue
        versions = pinned.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement} is not pinned: run `make lock`"
        for pin in versions:
            assert requirement.specifier.contains(next(iter(pin.specifier)).version), f"{pin} is not {requirement}"


def test_what_is_imported_is_declared(project: dict) -> None:
    provided = importlib.metadata.packages_distributions()
    always = distributions(project["project"]["dependencies"])
    extras = {name: distributions(lines) for name, lines in project["project"]["optional-dependencies"].items()}
    anything = always.union(*extras.values())
    # Protocols measure against other libraries, which only those who run them need.
    groups = project["dependency-groups"]
    measured_against = distributions([*groups["dev"], *groups["rivals"]])
    missing = {}
    for path, source in source_files().items():
        for package, extra in imported_packages(source):
            names = {canonicalize_name(name) for name in provided.get(package, [package])}
            allowed = anything if extra is None else always | extras[extra]
            if not names & (allowed | measured_against if "reproduce" in path.parts else allowed):
                missing[package, extra] = path.name
    assert missing == {}


@pytest.mark.parametrize(
    ("source", "extra"),
    [
        ("import filelock", None),
        ("def late():\n    from filelock import FileLock", None),
        ("require('filelock.asyncio', extra='index')", "index"),
        ("importlib.import_module('filelock')", None),
    ],
)
def test_an_import_is_seen(source: str, extra: str | None) -> None:
    found = imported_packages(f"import os\nfrom . import own\nimport subspan.nn\n{source}")
    assert found == {("filelock", extra)}


def test_both_builds_of_torch_are_the_same_version() -> None:
    (cpu,), (other,) = pins("requirements-torch-cpu.txt")["torch"], pins("requirements-torch.txt")["torch"]
    assert str(cpu.specifier) == f"{other.specifier}+cpu"


def test_the_weights_are_those_of_the_weights_group(project: dict) -> None:
    assert set(pins("weights.txt")) == set(project["dependency-groups"]["weights"])


def test_every_extra_is_named_by_the_error_that_needs_it(project: dict) -> None:
    extras, asked = project["project"]["optional-dependencies"], asked_extras()
    assert {extra: path for extra, path in asked.items() if extra not in extras} == {}
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    paragraphs = [
        text for path in documents if path.exists() for text in path.read_text(encoding="utf-8").split("\n\n")
    ]
    written = {name for text in paragraphs if "extras" in text for name in re.findall(r"`(\w+)`", text)}
    assert set(extras) - set(asked) - written == set()


def test_all_holds_every_extra_but_the_documentation(project: dict) -> None:
    extras = project["project"]["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    # A ray tracer with a compiler below it is asked for by its name.
    assert everything.extras == set(extras) - {"all", "docs", "wireless"}


def test_no_tracked_file_names_a_package_index() -> None:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files are tracked is not known")
    names = [name for name in listed.decode().split("\0") if name]
    assert "uv.lock" not in names
    found = []
    for name in names:
        if (ROOT / name).is_file():
            match = INDEX_HOST.search((ROOT / name).read_bytes().decode("utf-8", errors="ignore"))
            found += [f"{name}: {match[0]}"] if match else []
    assert found == []


@pytest.mark.parametrize(("name", "rest"), [("pypi", "org/project/x"), ("mirror", "test/root/simple/")])
def test_a_package_index_is_seen(name: str, rest: str) -> None:
    assert INDEX_HOST.search(f"see https://{name}.{rest}")


def test_the_command_says_the_declared_version(project: dict) -> None:
    command = Path(sys.executable).parent / "subspan"
    answer = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert project["project"]["version"] in answer.stdout.split()
    assert importlib.metadata.version("subspan") == project["project"]["version"]


def test_pip_settings_are_read_in_the_order_pip_reads_them(settings_reader: ModuleType) -> None:
    listing = "\n".join(
        [
            ":env:.find-links='/wheels /more'",
            "global.find-links='/old'",
            "global.index-url='https://index.example/a b'",
            "install.index-url='https://index.example/simple'",
            "freeze.index-url='https://index.example/other'",
            "a warning that pip printed",
        ]
    )
    settings = settings_reader.pip_settings(listing)
    assert settings == {"find-links": "/wheels /more", "index-url": "https://index.example/simple"}
    assert settings_reader.environment(settings, {}) == {
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_DEFAULT_INDEX": "https://index.example/simple",
    }


def test_what_is_said_to_uv_itself_stays(settings_reader: ModuleType) -> None:
    settings = {"extra-index-url": "https://index.example/a\nhttps://index.example/b", "cert": ""}
    assert settings_reader.environment(settings, {"UV_INDEX_STRATEGY": "first-index"}) == {
        "UV_INDEX": "https://index.example/a https://index.example/b",
        "UV_INDEX_STRATEGY": "first-index",
    }
    assert settings_reader.environment({"index-url": "x"}, {"UV_DEFAULT_INDEX": "y"}) == {"UV_DEFAULT_INDEX": "y"}
