"""Places that tests change before a script is run on them, and the sentence that must follow."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.fault_harness import assert_refused, quick_folder, run_script, snapshot
from tests.faults.fault_moments import Place
from tests.faults.fuzzing import KINDS

Change = Callable[[Place], Any]
A, B, C, D = (f"model_tp{tp}_pp{pp}.pt" for tp in (0, 1) for pp in (0, 1))
"""The four shards of a Place's checkpoint."""


@contextmanager
def copied_place(bases: dict[str, Path], family: str) -> Iterator[Place]:
    with quick_folder() as folder:
        shutil.copytree(bases[family], folder / "work")
        yield Place(folder / "work", family)


def refused(place: Place, command: tuple[str, list[str]], *words: str) -> None:
    """One sentence with these words, and not even the times of the folders have changed."""
    before = snapshot(place.root)
    assert_refused(run_script(*command), *words)
    assert snapshot(place.root) == before


def link(name: str, to: str) -> Change:
    def change(place: Place) -> None:
        path = place.root / name
        path.rename(path.with_name("moved")) if path.is_dir() else path.unlink()
        path.symlink_to(to)

    return change


def kind_of(folder: str, name: str, kind: str) -> Change:
    """Something that is no file under the name of one: opening it waits for ever, or reading it never ends."""

    def change(place: Place) -> None:
        path = place.root / folder / name
        path.unlink(missing_ok=True)
        KINDS[kind](path)

    return change
