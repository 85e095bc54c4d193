"""Run uv under pip's own settings: `python .ci/uv.py ARGUMENT...`.

uv reads none of pip's configuration, so a machine whose package index or folder of wheels is set up for pip alone
would be out of its reach. uv is the one on PATH or, where there is none, a pinned one fetched into .tools.
Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".tools"
SETTING = re.compile(r"(?P<section>\S+)\.(?P<option>[\w-]+)=(?P<value>'.*'|\".*\")")
# pip's option: uv's variable, and what uv puts between several values.
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}


def pip_settings(listing: str) -> dict[str, str]:
    """Options from what `pip config list` prints, later sections over earlier ones as pip reads them."""
    order = {"global": 0, "install": 1, ":env:": 2}
    found = [match for match in map(SETTING.fullmatch, listing.splitlines()) if match and match["section"] in order]
    found.sort(key=lambda match: order[match["section"]])
    return {match["option"]: ast.literal_eval(match["value"]) for match in found}


def environment(settings: Mapping[str, str], inherited: Mapping[str, str]) -> dict[str, str]:
    """uv's environment that says the same as pip's settings; what is already said to uv itself stays."""
    result = dict(inherited)
    for option, (variable, separator) in VARIABLES.items():
        if settings.get(option, "").strip():
            result.setdefault(variable, separator.join(settings[option].split()))
    if "UV_INDEX" in result:
        # pip takes the best version that any index has; the pinned hashes decide which file that may be.
        result.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return result


def listing() -> str:
    """What pip says of its settings; without a pip, what its environment variables say."""
    pythons = [sys.executable] if importlib.util.find_spec("pip") else []
    pythons += [str(TOOLS / "bin/python")] if (TOOLS / "bin/python").exists() else []
    for python in pythons:
        answer = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True)
        if answer.returncode == 0:
            return answer.stdout
    return "\n".join(
        f":env:.{name[4:].lower().replace('_', '-')}={value!r}"
        for name, value in os.environ.items()
        if name.startswith("PIP_")
    )


def find_uv() -> str:
    """The uv to run, fetched into .tools when there is none."""
    for candidate in (str(TOOLS / "bin/uv"), shutil.which("uv")):
        # Asked for its version, since a version manager's shim may stand on PATH for a uv that is not there.
        works = candidate and shutil.which(candidate)
        if works and subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return candidate
    print("fetching uv into .tools", file=sys.stderr)
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(TOOLS)]).returncode:
        sys.exit(f"{sys.executable} cannot make a virtual environment: install its venv module (python3-venv) or uv")
    fetch = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    fetch += ["--require-hashes", "--requirement", str(ROOT / "requirements-uv.txt")]
    if subprocess.run([str(TOOLS / "bin/python"), *fetch]).returncode:
        sys.exit("uv could not be fetched: is a package index within reach of pip?")
    return str(TOOLS / "bin/uv")


if __name__ == "__main__":
    uv = find_uv()
    os.execve(uv, [uv, *sys.argv[1:]], environment(pip_settings(listing()), os.environ))
