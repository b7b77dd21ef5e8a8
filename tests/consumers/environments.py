"""Makes an environment for each tool of tools.toml: `.compat/consumers/<tool>`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.consumers.folders import CASES, FAMILIES, FORMATS, KINDS, REPOSITORY, Case

ROOT = REPOSITORY / ".compat" / "consumers"
LIST = Path(__file__).with_name("tools.toml")
PROJECT = ("internlm_model", "internlm2_model", "internlm_vllm", "weight_conversion", "pyproject.toml", "README.md")
"""What `pip install .` reads; a copy of it is installed, so that nothing is built inside the repository."""


@dataclass(frozen=True)
class Way:
    """How a tool is told to load a folder."""

    name: str
    formats: tuple[str, ...] = FORMATS
    families: tuple[str, ...] = tuple(FAMILIES)
    kinds: tuple[str, ...] = KINDS
    environment: Mapping[str, str] = field(default_factory=dict)

    def cases(self) -> list[Case]:
        return [
            case
            for case in CASES
            if case.format in self.formats and case.family in self.families and case.kind in self.kinds
        ]


@dataclass(frozen=True)
class Limit:
    """Folders of some ways that come out wrong or are refused, and why."""

    why: str
    ways: tuple[str, ...]
    formats: tuple[str, ...] = FORMATS
    families: tuple[str, ...] = tuple(FAMILIES)
    kinds: tuple[str, ...] = KINDS

    def covers(self, way: str, case: Case) -> bool:
        return (
            way in self.ways
            and case.format in self.formats
            and case.family in self.families
            and case.kind in self.kinds
        )


@dataclass(frozen=True)
class Tool:
    """One entry of tools.toml."""

    name: str
    title: str
    read: str = ""
    note: str = ""
    program: str = ""
    requirements: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    project: bool = False
    together: bool = False
    build: Mapping[str, str] = field(default_factory=dict)
    ways: tuple[Way, ...] = ()
    limits: tuple[Limit, ...] = ()

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def why(self, way: str, case: Case) -> str:
        """Why a folder cannot be right, "" if it can."""
        return next((limit.why for limit in self.limits if limit.covers(way, case)), "")


def tools(path: Path = LIST) -> dict[str, Tool]:
    """The tools of the list by name.

    Raises:
        ValueError: a limit that names no way of its tool, or a family, format or kind that there is not.
    """
    found = {}
    for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
        ways = tuple(Way(title, **_tuples(way)) for title, way in entry.pop("ways", {}).items())
        limits = tuple(Limit(**_tuples(limit)) for limit in entry.pop("limits", []))
        found[name] = Tool(name, ways=ways, limits=limits, **_tuples(entry))
        for part in (*ways, *limits):
            for chosen, known in ((part.families, FAMILIES), (part.formats, FORMATS), (part.kinds, KINDS)):
                if not set(chosen) <= set(known):
                    raise ValueError(f"{path.name}, {name}: {chosen} are not all of {tuple(known)}.")
        for limit in limits:
            if not set(limit.ways) <= {way.name for way in ways}:
                raise ValueError(f"{path.name}, {name}: no way is called {limit.ways}.")
    return found


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def make(tool: Tool) -> dict[str, Any]:
    """Makes the tool's environment if it is absent or its pins changed.

    Returns:
        The minutes that took, its megabytes, and the version of transformers in it ("" if there is none).
    """
    stamp = tool.folder / "made.json"
    wanted = [*tool.requirements, "then", *tool.then, "remove", *tool.remove, "sources", *tool.sources]
    made = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if made.get("wanted") != wanted:
        start = time.monotonic()
        _install(tool)
        made = {"wanted": wanted, "minutes": round((time.monotonic() - start) / 60, 1), "megabytes": _megabytes(tool)}
        stamp.write_text(json.dumps(made))
    if tool.project:
        _install_project(tool)
    return {"minutes": made["minutes"], "megabytes": made["megabytes"], "transformers": _version(tool, "transformers")}


def _install(tool: Tool) -> None:
    shutil.rmtree(tool.folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(tool.folder)], check=True)
    _pip(tool, "install", "--no-compile", *tool.requirements)
    if tool.then:
        _pip(tool, "install", "--no-compile", "--no-deps", *tool.then)
    if tool.remove:
        _pip(tool, "uninstall", "--yes", *tool.remove)
    for source in tool.sources:
        package = source.partition("==")[0]
        folder = str(tool.folder / "sources")
        _pip(tool, "download", "--no-deps", "--no-binary", package, "--dest", folder, source)
    for archive in (tool.folder / "sources").glob("*.tar.gz"):
        with tarfile.open(archive) as packed:
            packed.extractall(archive.parent, filter="data")


def _install_project(tool: Tool) -> None:
    copy = tool.folder / "project"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in (*PROJECT, "LICENSE", *(script.name for script in REPOSITORY.glob("*.py"))):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, copy / name)
    _pip(tool, "install", "--force-reinstall", "--no-deps", str(copy))


def _pip(tool: Tool, *arguments: str) -> None:
    command = [str(tool.python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **tool.build})


def _version(tool: Tool, package: str) -> str:
    """The version of a package in the tool's environment, "" if it is not there."""
    found = [*tool.folder.glob(f"lib/*/site-packages/{package}-*.dist-info")]
    return found[0].name.removesuffix(".dist-info").partition("-")[2] if found else ""


def _megabytes(tool: Tool) -> int:
    return sum(path.lstat().st_size for path in tool.folder.rglob("*")) >> 20
