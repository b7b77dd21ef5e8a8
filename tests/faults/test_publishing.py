"""A target is complete or not there: publishing, replacing, cleaning up, and two runs at the same time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weight_conversion.errors import ConversionError
from weight_conversion.running import publishing
from weight_conversion.running.publishing import Publication


def publish(target: Path, *, force: bool = False, then: Callable[[], object] = lambda: None) -> None:
    """Publishes a folder of one file; `then` happens when that file is written."""
    with Publication(target, force=force) as folder:
        (folder / "file").write_text("new")
        then()


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While another process writes `folder`. A lock belongs to the open file, so this process can play the other."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_the_target_appears_when_it_is_complete(tmp_path: Path) -> None:
    with Publication(tmp_path / "hf", force=False) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("new")
        assert names(tmp_path) == [".hf.partial"]
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / "inner" / "file").read_text() == "new"


@pytest.mark.parametrize("error", [ConversionError("no"), OSError(5, "no"), KeyboardInterrupt(), ValueError()])
def test_a_failure_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "hf"
    with pytest.raises(type(error)):
        publish(target, then=failing(error))
    assert names(tmp_path) == []


def test_parents_are_made(tmp_path: Path) -> None:
    publish(tmp_path / "a" / "b" / "hf")
    assert (tmp_path / "a" / "b" / "hf" / "file").read_text() == "new"


def test_an_empty_target_may_exist(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    publish(tmp_path / "hf")
    assert names(tmp_path / "hf") == ["file"]


def test_a_relative_target_and_one_with_a_final_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish(Path("one"))
    publish(Path("x/../two/"))
    assert names(tmp_path) == ["one", "two"]


def test_a_filled_target_is_replaced_with_force_alone_and_at_the_end(tmp_path: Path) -> None:
    target = filled(tmp_path / "hf", "old")
    with pytest.raises(ConversionError, match=r"hf exists and is not empty.*--force"):
        Publication(target, force=False)
    with Publication(target, force=True) as folder:
        (folder / "file").write_text("new")
        assert (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "new"
    assert names(tmp_path) == ["hf"]


def test_with_force_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    target = filled(tmp_path / "hf", "old")
    with pytest.raises(OSError, match="full"):
        publish(target, force=True, then=failing(OSError(28, "full")))
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["hf"]


@pytest.mark.parametrize("step", ["first", "second"])
def test_a_rename_that_fails_keeps_what_was_there(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = filled(tmp_path / "hf", "old")
    rename, failing = Path.rename, {"first": target, "second": tmp_path / ".hf.partial"}[step]

    def rename_or_fail(path: Path, to: Path) -> Path:
        if path == failing:
            raise OSError(5, "Input/output error", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", rename_or_fail)
    with pytest.raises(OSError, match="Input/output"):
        publish(target, force=True)
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["hf"]


def test_a_flush_that_fails_after_the_renames_says_that_the_target_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = filled(tmp_path / "hf", "old")
    flush = publishing._flush

    def flush_or_fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error", str(path))
        flush(path)

    monkeypatch.setattr(publishing, "_flush", flush_or_fail)
    with pytest.raises(ConversionError, match="hf is complete, but"):
        publish(target, force=True)
    assert (target / "file").read_text() == "new"
    assert names(tmp_path) == ["hf"]


def test_every_file_is_flushed_before_the_target_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(publishing, "_flush", lambda path: flushed.append(path.name))
    rename = Path.rename

    def checked_rename(path: Path, to: Path) -> Path:
        assert sorted(flushed) == [".hf.partial", "file", "inner", "other"]
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", checked_rename)
    with Publication(tmp_path / "hf", force=False) as folder:
        (folder / "file").write_text("new")
        (folder / "inner").mkdir()
        (folder / "inner" / "other").write_text("new")
    assert flushed[-1] == tmp_path.name  # the folder in which the name now stands


def test_what_appears_at_the_target_meanwhile_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="not empty"):
        publish(tmp_path / "hf", then=lambda: filled(tmp_path / "hf", "of somebody else"))
    assert (tmp_path / "hf" / "file").read_text() == "of somebody else"
    assert names(tmp_path) == ["hf"]


# ---------------------------------------------------------------------------------------------- after a run was killed


def test_a_partial_folder_is_cleaned_up(tmp_path: Path) -> None:
    left = filled(tmp_path / ".hf.partial", "half")
    (left / "inner").mkdir()
    (left / "inner" / "file").write_text("half")
    (left / "link").symlink_to(filled(tmp_path / "elsewhere", "kept"))
    publish(tmp_path / "hf")
    assert names(tmp_path / "hf") == ["file"]
    assert names(tmp_path) == ["elsewhere", "hf"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "kept"


@pytest.mark.parametrize("made_again", [False, True])
def test_what_was_being_replaced_is_put_back_and_then_protected(made_again: bool, tmp_path: Path) -> None:
    """Killed between the two renames of --force: the old content stands under its other name."""
    if made_again:  # by a script that makes its folders before it starts
        (tmp_path / "hf").mkdir()
    filled(tmp_path / ".hf.replaced", "old")
    filled(tmp_path / ".hf.partial", "new")
    with pytest.raises(ConversionError, match="not empty"):
        Publication(tmp_path / "hf", force=False)
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / "file").read_text() == "old"


def test_what_was_being_replaced_is_put_back_and_then_replaced_with_force(tmp_path: Path) -> None:
    filled(tmp_path / ".hf.replaced", "old")
    filled(tmp_path / ".hf.partial", "half")
    with Publication(tmp_path / "hf", force=True) as folder:
        (folder / "file").write_text("new")
        assert (tmp_path / "hf" / "file").read_text() == "old"
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / "file").read_text() == "new"


def test_what_was_replaced_is_removed_by_the_next_run_even_if_that_is_refused(tmp_path: Path) -> None:
    """Killed after the second rename of --force: the new target is complete, the old content still lies beside it."""
    filled(tmp_path / ".hf.replaced", "old")
    filled(tmp_path / "hf", "new")
    with pytest.raises(ConversionError, match="not empty"):
        Publication(tmp_path / "hf", force=False)
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / "file").read_text() == "new"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_only_a_folder_of_its_own_is_cleaned_up(kind: str, tmp_path: Path) -> None:
    other = filled(tmp_path / "other", "kept")
    if kind == "link":
        (tmp_path / ".hf.partial").symlink_to(other)
    else:
        (tmp_path / ".hf.partial").write_text("kept")
    with pytest.raises(OSError, match=r"\.hf\.partial"):
        publish(tmp_path / "hf")
    assert (other / "file").read_text() == "kept"
    assert names(tmp_path) == [".hf.partial", "other"]


# ----------------------------------------------------------------------------------------------- two runs at one time


def test_a_second_run_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with Publication(tmp_path / "hf", force=False) as folder:
        (folder / "file").write_text("new")
        for force in (False, True):
            with pytest.raises(ConversionError, match="another run is writing"):
                Publication(tmp_path / "hf", force=force)
        publish(tmp_path / "other")
    assert (tmp_path / "hf" / "file").read_text() == "new"
    assert names(tmp_path) == ["hf", "other"]


def test_a_run_that_begins_between_check_and_start_is_respected(tmp_path: Path) -> None:
    late = Publication(tmp_path / "hf", force=False)
    with locked(tmp_path / ".hf.partial"):
        (tmp_path / ".hf.partial" / "file").write_text("of the other run")
        with pytest.raises(ConversionError, match="another run is writing"), late:
            pytest.fail("both runs write")
        assert names(tmp_path / ".hf.partial") == ["file"]


@pytest.mark.parametrize("then", ["renamed", "removed", "made again"])
def test_a_folder_that_changes_hands_while_it_is_locked_is_left_alone(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run ends between opening the folder and locking it: the lock is then on a folder of another name."""
    partial, lock = tmp_path / ".hf.partial", publishing._try_lock

    def other_run_ends_first(descriptor: int) -> bool:
        partial.rename(tmp_path / "hf") if then == "renamed" else partial.rmdir()
        if then == "made again":
            filled(partial, "of a third run")
        return lock(descriptor)

    monkeypatch.setattr(publishing, "_try_lock", other_run_ends_first)
    with pytest.raises(ConversionError, match="another run is writing"):
        publish(tmp_path / "hf")
    left = {"renamed": ["hf"], "removed": [], "made again": [".hf.partial"]}[then]
    assert names(tmp_path) == left
    if then == "made again":
        assert (partial / "file").read_text() == "of a third run"


# ------------------------------------------------------------------------------------------------- what is no target


def test_the_root_is_no_target() -> None:
    with pytest.raises(ConversionError, match="root"):
        Publication(Path("/"), force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "link to a folder", "dangling link", "link to itself"])
def test_a_link_or_a_file_is_no_target(kind: str, force: bool, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    if kind == "file":
        target.write_text("kept")
    else:
        places = {"link to a folder": tmp_path, "dangling link": tmp_path / "nowhere", "link to itself": target}
        target.symlink_to(places[kind])
    with pytest.raises(ConversionError, match="a link or a file"):
        publish(target, force=force)
    assert names(tmp_path) == ["hf"]


@pytest.mark.parametrize("kind", ["file", "dangling link", "link to itself"])
def test_a_target_in_what_is_no_folder_is_refused(kind: str, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    if kind == "file":
        parent.write_text("kept")
    else:
        parent.symlink_to(parent if kind == "link to itself" else tmp_path / "nowhere")
    with pytest.raises(ConversionError, match="parent, which is no folder"):
        publish(parent / "hf")


@pytest.mark.parametrize("place", ["source", "source/..", "link", "loop"])
def test_a_target_that_is_or_holds_the_source_is_refused(place: str, tmp_path: Path) -> None:
    source = filled(tmp_path / "source", "kept")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConversionError):
        Publication(tmp_path / place, force=True, sources=(source, tmp_path / "loop"))
    assert (source / "file").read_text() == "kept"


# ------------------------------------------------------------------------------------------------------------- room


def test_room_is_checked_on_the_disk_of_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, asked = namedtuple("usage", "total used free"), []

    def disk_usage(path: Path) -> object:
        asked.append(path)
        return usage(0, 0, 1_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    publication = Publication(tmp_path / "not" / "yet" / "hf", force=False)
    publication.check_space(900_000_000)
    with pytest.raises(ConversionError, match=r"1\.00 GB free, 1\.07 GB are needed"):
        publication.check_space(1_000_000_000)
    assert asked == [tmp_path, tmp_path]
