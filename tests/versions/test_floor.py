"""The versions that `make floor` installs are the lowest ones that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_RUN_BY_TESTS = {"ruff", "mypy", "types-tqdm"}


def lower_bounds() -> dict[str, str]:
    """Each package that pyproject.toml needs, or its tests do, and the version after its >=."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    found = {}
    for line in needed:
        match = re.fullmatch(r"([\w-]+)(?:>=([\d.]+)(?:,<\d+)?)?", line)
        assert match, line
        if match[1] not in NOT_RUN_BY_TESTS:
            assert match[2], f"{line} has no lower bound"
            found[match[1]] = match[2]
    return found


def test_the_floor_is_what_the_project_allows() -> None:
    lines = (REPOSITORY / "requirements.floor.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    assert pins == lower_bounds()
