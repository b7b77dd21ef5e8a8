"""Make one folder per transformers version that shares this interpreter's torch.

    python tests/versions/environments.py            # every version of PINS
    python tests/versions/environments.py 4.57.6 5.24.0

makes `.compat/<version>/`, which holds transformers and the few packages whose version depends on it
(tokenizers, huggingface_hub and its HTTP client) and nothing else. A program then runs on that version with

    PYTHONPATH=.compat/<version> python program.py

while torch, numpy, safetensors and the rest still come from the interpreter's own site-packages.

`newest` instead of a version is whatever the package index has as newest today, and `candidate` a release candidate
that is newer still; both are made anew each time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / ".compat"
STAMP = ".pins"

_HUB_0 = (
    "huggingface_hub==0.36.2",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "certifi==2026.10.19.post1",
    "charset-normalizer==3.5.2",
)
_HUB_1 = ("huggingface_hub==1.33.0", "httpx==0.28.1", "httpcore==1.0.9", "certifi==2026.10.19.post1")
_HUB_2 = ("huggingface_hub==2.4.0", "httpx2==2.16.2", "httpcore2==2.16.2", "truststore==0.10.5")

# What transformers itself asks for, newest of each at the time of writing.
PINS: Mapping[str, tuple[str, ...]] = {
    "4.57.6": ("tokenizers==0.22.2", *_HUB_0),
    "5.0.0": ("tokenizers==0.22.2", "typer-slim==0.24.0", *_HUB_1),
    "5.4.0": ("tokenizers==0.22.2", *_HUB_1),
    "5.8.0": ("tokenizers==0.22.2", *_HUB_1),
    "5.12.1": ("tokenizers==0.22.2", *_HUB_1),
    "5.17.0": ("tokenizers==0.23.3", *_HUB_1),
    "5.20.2": ("tokenizers==0.23.3", *_HUB_2),
    "5.23.0": ("tokenizers==0.23.3", *_HUB_2),
    "5.24.0": ("tokenizers==0.23.3", *_HUB_2),
}


def requirements(version: str) -> list[str]:
    """Return the requirement lines of one transformers version; ValueError for a version without pins."""
    if version not in PINS:
        raise ValueError(f"transformers {version} has no pins; the versions with pins are {', '.join(PINS)}.")
    return [f"transformers=={version}", *PINS[version]]


NEWEST = {"newest": (), "candidate": ("--pre",)}
"""Environments without pins, and what makes pip look for them."""

PACKAGES = ("transformers", "tokenizers", "huggingface_hub")
CLIENTS = ("httpx", "httpcore", "certifi", "httpx2", "httpcore2", "truststore")  # of huggingface_hub 1 and 2


def newest_versions(folder: Path) -> dict[str, str]:
    """Versions of PACKAGES in an environment."""
    found = importlib.metadata.distributions(path=[str(folder)])
    return {name: each.version for each in found if (name := each.name.replace("-", "_")) in PACKAGES}


def make_newest(name: str) -> Path:
    """Make `.compat/newest` or `.compat/candidate`: transformers as new as the index has it, and what it asks for."""
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    chosen = _resolved(NEWEST[name])
    _install([f"{package}=={version}" for package, version in chosen.items()], folder)
    return folder


def _resolved(options: Sequence[str]) -> dict[str, str]:
    """The versions that pip would install today of PACKAGES and CLIENTS, with transformers itself as new as can be."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", *options, "transformers"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = {each["metadata"]["name"].replace("-", "_"): each["metadata"]["version"] for each in report["install"]}
    return {name: found[name] for name in (*PACKAGES, *CLIENTS) if name in found}


def environment_variables(version: str) -> dict[str, str]:
    """Return this process's environment with `.compat/<version>` first on the import path, and offline."""
    folder = ROOT / version if version in NEWEST else make_environment(version)
    return {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def make_environment(version: str) -> Path:
    """Make `.compat/<version>` if it is absent or its pins changed, and return its path.

    The folder appears under its name only after an import in a fresh interpreter showed the pinned versions.
    """
    wanted = requirements(version)
    folder = ROOT / version
    if _stamp(folder) == wanted:
        return folder
    partial = ROOT / f".{version}.{os.getpid()}"
    try:
        _install(wanted, partial)
        _check(partial, wanted)
        (partial / STAMP).write_text("\n".join(wanted) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _stamp(folder: Path) -> list[str]:
    path = folder / STAMP
    return path.read_text().split() if path.is_file() else []


def _install(wanted: Sequence[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--no-deps", "--target", str(folder), *wanted], check=True)


def _check(folder: Path, wanted: Sequence[str]) -> None:
    """Raise RuntimeError unless a fresh interpreter imports the pinned versions from `folder`."""
    names = ("transformers", "tokenizers", "huggingface_hub")
    program = f"import torch, {', '.join(names)}\nfor m in ({', '.join(names)}): print(m.__version__, m.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"transformers cannot be imported from {folder}:\n{run.stderr}")
    pins = dict(line.split("==") for line in wanted if "==" in line)
    for name, line in zip(names, run.stdout.splitlines(), strict=True):
        version, path = line.split(" ", 1)
        if version != pins[name] or not path.startswith(str(folder)):
            raise RuntimeError(f"{name} {version} was imported from {path}; expected {pins[name]} in {folder}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("versions", nargs="*", default=list(PINS), help=f"of {', '.join(PINS)} (default: all)")
    for version in parser.parse_args().versions:
        print(make_environment(version))


if __name__ == "__main__":
    main()
