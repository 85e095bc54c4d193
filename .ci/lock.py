"""Pin every dependency, with hashes and without naming an index (`make lock`).

Writes `requirements.txt` (everything but torch), `requirements-torch.txt` (torch as the package index has it, with the
CUDA libraries it needs on Linux), `requirements-torch-cpu.txt` (its CPU build, where one is offered to pip),
`requirements-uv.txt`, and the package's own list of pretrained weights.
The pins hold for Python 3.11 and later on every platform.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import uv as runner

ROOT = runner.ROOT
CPU = ROOT / "requirements-torch-cpu.txt"
WEIGHTS = ROOT / "src/subspan/datasets/weights.txt"
HEADER = "# Written by `make lock`; versions are asked for in pyproject.toml.\n"
CUDA = re.compile(r"(torch|triton|cuda-[\w-]+|nvidia-[\w-]+)==")
PIN = re.compile(r"^(?P<pin>[\w.-]+==\S.*?) \\\n(?P<hashes>(?:    --hash=sha256:\w+(?: \\)?\n?)+)", re.MULTILINE)


def compiled(uv: str, environment: dict[str, str], *arguments: str, requirements: str = "") -> dict[str, list[str]]:
    """Pin: hashes, for the requirements named by `arguments` or written in `requirements`."""
    command = [uv, "pip", "compile", "--universal", "--python-version", "3.11", "--generate-hashes", "--upgrade"]
    command += ["--only-binary", ":all:", "--no-header", "--no-annotate", "--no-emit-package", "subspan", *arguments]
    command += ["-"] if requirements else []
    answer = subprocess.run(command, cwd=ROOT, env=environment, input=requirements, stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        sys.exit(f"uv could not resolve: {' '.join(arguments) or requirements}")
    return {match["pin"]: re.findall(r"sha256:\w+", match["hashes"]) for match in PIN.finditer(answer.stdout)}


def cpu_hashes(uv: str, environment: dict[str, str], pin: str) -> list[str]:
    """Hashes of the files of torch's CPU build that pip's indexes and folders offer, and of those pinned before."""
    offered = set(compiled(uv, environment, "--no-deps", "--no-config", requirements=pin).get(pin, []))
    # uv gives no hashes for the wheels of a folder.
    for folder in environment.get("UV_FIND_LINKS", "").split(","):
        for wheel in Path(folder).glob(f"{pin.replace('==', '-')}-*.whl") if folder else []:
            with wheel.open("rb") as content:
                offered.add(f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}")
    before = CPU.read_text(encoding="utf-8") if CPU.exists() else ""
    if f"{pin} " in before:
        offered.update(re.findall(r"sha256:\w+", before))
    return sorted(offered)


def write(path: Path, pins: dict[str, list[str]], note: str = "") -> None:
    """One pin a line, each followed by its hashes."""
    lines = [f"{pin} {' '.join(f'--hash={value}' for value in hashes)}\n" for pin, hashes in sorted(pins.items())]
    path.write_text(HEADER + note + "".join(lines), encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(pins)} pins")


def main() -> None:
    """Resolve everything and write the five files."""
    uv = runner.find_uv()
    offered = runner.environment(runner.pip_settings(runner.listing()), os.environ)
    # One index alone, so that each version is listed with the hashes of all its files.
    index = {name: value for name, value in offered.items() if name not in {"UV_INDEX", "UV_FIND_LINKS"}}

    pins = compiled(uv, index, "--group", "dev")
    torch = {pin: hashes for pin, hashes in pins.items() if CUDA.match(pin)}
    write(ROOT / "requirements.txt", {pin: hashes for pin, hashes in pins.items() if pin not in torch})
    write(ROOT / "requirements-torch.txt", torch)

    version = next(pin for pin in torch if pin.startswith("torch=="))
    write(CPU, {f"{version}+cpu": cpu_hashes(uv, offered, f"{version}+cpu")})
    write(WEIGHTS, compiled(uv, index, "--no-deps", "--group", "weights"), "# Installed without their dependencies.\n")
    write(ROOT / "requirements-uv.txt", compiled(uv, index, "--no-deps", "--no-config", requirements="uv"))


if __name__ == "__main__":
    main()
