"""What --tgt may be, known before any work is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.changes import B, copied_place, refused
from tests.faults.fault_harness import run_script, snapshot
from tests.faults.fault_moments import COMMANDS, Place
from tests.support.conversions import FAMILIES


@pytest.mark.parametrize("command", [Place.convert_command, Place.revert_command])
def test_a_target_with_files_is_refused_before_any_work(command: Callable[..., Any], place: Place) -> None:
    place.target.mkdir()
    (place.target / "notes.txt").write_text("kept")
    (place.source / B).write_bytes(b"")  # would be found if any work was done
    (place.hf / "config.json").write_bytes(b"")
    refused(place, command(place), str(place.target), "not empty", "--force")


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_target_that_is_or_holds_the_source_is_refused(force: tuple[str, ...], place: Place) -> None:
    for target in (place.source, place.root, place.root / "hf" / ".." / "source"):
        refused(place, place.convert_command(*force, target=target), "--tgt", "source")
    for target in (place.hf, place.root):
        refused(place, place.revert_command(*force, target=target), "--tgt", "source")


@pytest.mark.parametrize("kind", ["file", "link to a file", "link to itself"])
def test_a_target_that_is_no_folder_is_refused(kind: str, place: Place) -> None:
    if kind == "file":
        place.target.write_text("kept")
    else:
        place.target.symlink_to({"link to a file": place.tokenizer, "link to itself": place.target}[kind])
    for command in (place.convert_command("--force"), place.revert_command("--force")):
        refused(place, command, str(place.target), "a link or a file")


@pytest.mark.parametrize("flag", ["--src", "--tgt", "--tokenizer", "--config"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_name_is_a_wrong_flag(
    flag: str, family: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--tgt "" --force, of an unset variable, once replaced the current folder."""
    with copied_place(bases, family) as place:
        monkeypatch.chdir(place.root)
        before = snapshot(place.root)
        for script, words in (place.convert_command("--force", "--config", "."), place.revert_command("--force")):
            if flag in words:
                words[words.index(flag) + 1] = ""
                outcome = run_script(script, words)
                assert outcome.status == 2
                assert f"{flag}: the name is empty" in outcome.errors
        assert snapshot(place.root) == before


@pytest.mark.parametrize("direction", COMMANDS)
def test_the_current_folder_is_not_replaced(direction: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    current = place.root / "current"
    (current / "in").mkdir(parents=True)
    monkeypatch.chdir(current / "in")
    for target in (".", "..", "../in", "../../current"):
        command = COMMANDS[direction](place, "--force", target=Path(target))
        refused(place, command, "the current folder", str(current / "in"))


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_link_to_an_empty_folder_is_followed(direction: str, place: Place) -> None:
    (place.root / "disk" / "empty").mkdir(parents=True)
    place.target.symlink_to(place.root / "disk" / "empty")
    assert run_script(*COMMANDS[direction](place)).status == 0
    assert place.target.is_symlink()
    assert [path.name for path in (place.root / "disk").iterdir()] == ["empty"]
    assert any(place.target.glob("model*"))


def test_room_on_the_disk_is_checked_before(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    for command in (place.convert_command(), place.revert_command()):
        refused(place, command, str(place.root), "0.00 GB free", "needed")
