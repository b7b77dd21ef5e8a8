"""A target is complete or not there: publishing, replacing, cleaning up, and two runs at the same time."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from weight_conversion.errors import ConversionError
from weight_conversion.folders.model_folder import CHECKPOINT, HUGGING_FACE, Kind
from weight_conversion.running import publishing
from weight_conversion.running.publishing import MARK, Publication

FILE = "model.safetensors"
"""A name that a folder of model files has; what is in it does not matter here."""


def publish(target: Path, *, force: bool = False, then: Callable[[], object] = lambda: None) -> None:
    """Publishes a folder of one file; `then` happens when that file is written."""
    with Publication(target, HUGGING_FACE, force=force) as folder:
        (folder / FILE).write_text("new")
        then()


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def left_by_a_killed_run(tmp_path: Path, **folders: str) -> None:
    """The hidden folder for the target `hf`, with `new`, `old` or `trash` of one file in it."""
    hidden = tmp_path / ".hf.partial"
    hidden.mkdir()
    (hidden / MARK).touch()
    for name, text in folders.items():
        filled(hidden / name, text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / FILE).write_text(text)
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
    with Publication(tmp_path / "hf", HUGGING_FACE, force=False) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / FILE).write_text("new")
        assert names(tmp_path) == [".hf.partial"]
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / "inner" / FILE).read_text() == "new"


@pytest.mark.parametrize("error", [ConversionError("no"), OSError(5, "no"), KeyboardInterrupt(), ValueError()])
def test_a_failure_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "hf"
    with pytest.raises(type(error)):
        publish(target, then=failing(error))
    assert names(tmp_path) == []


def test_parents_are_made(tmp_path: Path) -> None:
    publish(tmp_path / "a" / "b" / "hf")
    assert (tmp_path / "a" / "b" / "hf" / FILE).read_text() == "new"


def test_an_empty_target_may_exist(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    publish(tmp_path / "hf")
    assert names(tmp_path / "hf") == [FILE]


def test_a_relative_target_and_one_with_a_final_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish(Path("one"))
    publish(Path("x/../two/"))
    assert names(tmp_path) == ["one", "two"]


def test_a_filled_target_is_replaced_with_force_alone_and_at_the_end(tmp_path: Path) -> None:
    target = filled(tmp_path / "hf", "old")
    with pytest.raises(ConversionError, match=r"hf exists and is not empty.*--force"):
        Publication(target, HUGGING_FACE, force=False)
    with Publication(target, HUGGING_FACE, force=True) as folder:
        (folder / FILE).write_text("new")
        assert (target / FILE).read_text() == "old"
    assert (target / FILE).read_text() == "new"
    assert names(tmp_path) == ["hf"]


def test_with_force_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    target = filled(tmp_path / "hf", "old")
    with pytest.raises(OSError, match="full"):
        publish(target, force=True, then=failing(OSError(28, "full")))
    assert (target / FILE).read_text() == "old"
    assert names(tmp_path) == ["hf"]


@pytest.mark.parametrize("step", ["first", "second"])
def test_a_rename_that_fails_keeps_what_was_there(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = filled(tmp_path / "hf", "old")
    rename, failing = Path.rename, {"first": target, "second": tmp_path / ".hf.partial" / "new"}[step]

    def rename_or_fail(path: Path, to: Path) -> Path:
        if path == failing and to.name != "probe":
            raise OSError(5, "Input/output error", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", rename_or_fail)
    with pytest.raises(OSError, match="Input/output"):
        publish(target, force=True)
    assert (target / FILE).read_text() == "old"
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
    assert (target / FILE).read_text() == "new"
    assert names(tmp_path) == ["hf"]


def test_every_file_is_flushed_before_the_target_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(publishing, "_flush", lambda path: flushed.append(path.name))
    rename = Path.rename

    def checked_rename(path: Path, to: Path) -> Path:
        assert sorted(flushed) == ["inner", FILE, "new", "other"]
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", checked_rename)
    with Publication(tmp_path / "hf", HUGGING_FACE, force=False) as folder:
        (folder / FILE).write_text("new")
        (folder / "inner").mkdir()
        (folder / "inner" / "other").write_text("new")
    assert flushed[-1] == tmp_path.name  # the folder in which the name now stands


def test_what_appears_at_the_target_meanwhile_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="not empty"):
        publish(tmp_path / "hf", then=lambda: filled(tmp_path / "hf", "of somebody else"))
    assert (tmp_path / "hf" / FILE).read_text() == "of somebody else"
    assert names(tmp_path) == ["hf"]


# ---------------------------------------------------------------------------------------------- after a run was killed


def test_a_partial_folder_is_cleaned_up(tmp_path: Path) -> None:
    left_by_a_killed_run(tmp_path, new="half")
    left = tmp_path / ".hf.partial" / "new"
    (left / "inner").mkdir()
    (left / "inner" / FILE).write_text("half")
    (left / "link").symlink_to(filled(tmp_path / "elsewhere", "kept"))
    publish(tmp_path / "hf")
    assert names(tmp_path / "hf") == [FILE]
    assert names(tmp_path) == ["elsewhere", "hf"]
    assert (tmp_path / "elsewhere" / FILE).read_text() == "kept"


@pytest.mark.parametrize("made_again", [False, True])
def test_what_was_being_replaced_is_put_back_and_then_protected(made_again: bool, tmp_path: Path) -> None:
    """Killed between the two renames of --force: the old content stands under its other name."""
    if made_again:  # by a script that makes its folders before it starts
        (tmp_path / "hf").mkdir()
    left_by_a_killed_run(tmp_path, old="old", new="new")
    with pytest.raises(ConversionError, match="not empty"):
        Publication(tmp_path / "hf", HUGGING_FACE, force=False)
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / FILE).read_text() == "old"


def test_what_was_being_replaced_is_put_back_and_then_replaced_with_force(tmp_path: Path) -> None:
    left_by_a_killed_run(tmp_path, old="old", new="half")
    with Publication(tmp_path / "hf", HUGGING_FACE, force=True) as folder:
        (folder / FILE).write_text("new")
        assert (tmp_path / "hf" / FILE).read_text() == "old"
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / FILE).read_text() == "new"


@pytest.mark.parametrize("name", ["old", "trash"])
def test_what_was_replaced_is_removed_by_the_next_run_even_if_that_is_refused(name: str, tmp_path: Path) -> None:
    """Killed after the second rename of --force: the new target is complete, the old content still lies beside it."""
    left_by_a_killed_run(tmp_path, **{name: "old"})
    filled(tmp_path / "hf", "new")
    with pytest.raises(ConversionError, match="not empty"):
        Publication(tmp_path / "hf", HUGGING_FACE, force=False)
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / FILE).read_text() == "new"


def test_half_of_what_was_replaced_is_never_put_back(tmp_path: Path) -> None:
    """Killed while it removed the old content, and the user removed the new one since."""
    left_by_a_killed_run(tmp_path, trash="half of the old")
    Publication(tmp_path / "hf", HUGGING_FACE, force=False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_only_a_folder_of_its_own_is_cleaned_up(kind: str, tmp_path: Path) -> None:
    other = filled(tmp_path / "other", "kept")
    if kind == "link":
        (tmp_path / ".hf.partial").symlink_to(other)
    elif kind == "file":
        (tmp_path / ".hf.partial").write_text("kept")
    else:
        other = filled(tmp_path / ".hf.partial", "kept")
    for force in (False, True):
        with pytest.raises(ConversionError, match=r"\.hf\.partial .*no run of these scripts made it"):
            publish(tmp_path / "hf", force=force)
    assert (other / FILE).read_text() == "kept"
    assert names(tmp_path) == [".hf.partial", "other"]


@pytest.mark.parametrize("name", [".hf.replaced", ".hf.old", ".hf.trash"])
def test_other_hidden_folders_are_left_alone(name: str, tmp_path: Path) -> None:
    filled(tmp_path / name, "kept")
    filled(tmp_path / "hf", "old")
    publish(tmp_path / "hf", force=True)
    assert names(tmp_path) == [name, "hf"]
    assert (tmp_path / name / FILE).read_text() == "kept"


def cannot_be_removed(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """As if a file in the folder of this name could not be removed, like one that is open on NFS."""
    remove = shutil.rmtree

    def remove_or_fail(path: Path, *arguments: Any) -> None:
        if path.name == folder:
            raise OSError(39, "Directory not empty", str(path / ".nfs01"))
        remove(path, *arguments)

    monkeypatch.setattr(shutil, "rmtree", remove_or_fail)


def test_what_was_replaced_and_cannot_be_removed_is_told_and_removed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    target = filled(tmp_path / "hf", "old")
    with monkeypatch.context() as patch:
        cannot_be_removed(patch, "trash")
        with Publication(target, HUGGING_FACE, force=True, warn=warnings.append) as folder:
            (folder / FILE).write_text("new")
        assert len(warnings) == 1
        assert re.search(r"hf is complete, but \S+\.hf\.partial .*Directory not empty: \S+\.nfs01", warnings[0])
        assert (target / FILE).read_text() == "new"
        with pytest.raises(ConversionError, match=r"\.hf\.partial, left by a run .*Remove it yourself"):
            publish(target, force=True)
    assert (target / FILE).read_text() == "new"
    publish(target, force=True)
    assert names(tmp_path) == ["hf"]


# ----------------------------------------------------------------------------------------------- two runs at one time


def test_a_second_run_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with Publication(tmp_path / "hf", HUGGING_FACE, force=False) as folder:
        (folder / FILE).write_text("new")
        for force in (False, True):
            with pytest.raises(ConversionError, match="another run is writing"):
                Publication(tmp_path / "hf", HUGGING_FACE, force=force)
        publish(tmp_path / "other")
    assert (tmp_path / "hf" / FILE).read_text() == "new"
    assert names(tmp_path) == ["hf", "other"]


def test_a_run_that_begins_between_check_and_start_is_respected(tmp_path: Path) -> None:
    late = Publication(tmp_path / "hf", HUGGING_FACE, force=False)
    with locked(tmp_path / ".hf.partial"):
        (tmp_path / ".hf.partial" / MARK).touch()
        with pytest.raises(ConversionError, match="another run is writing"), late:
            pytest.fail("both runs write")
        assert names(tmp_path / ".hf.partial") == [MARK]


@pytest.mark.parametrize("then", ["renamed", "removed", "made again"])
def test_a_folder_that_changes_hands_while_it_is_locked_is_left_alone(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run ends between opening the folder and locking it: the lock is then on a folder of another name."""
    partial, lock = tmp_path / ".hf.partial", publishing._try_lock

    def other_run_ends_first(descriptor: int, folder: Path) -> bool:
        partial.rename(tmp_path / "hf") if then == "renamed" else partial.rmdir()
        if then == "made again":
            filled(partial, "of a third run")
        return lock(descriptor, folder)

    monkeypatch.setattr(publishing, "_try_lock", other_run_ends_first)
    with pytest.raises(ConversionError, match="another run is writing"):
        publish(tmp_path / "hf")
    left = {"renamed": ["hf"], "removed": [], "made again": [".hf.partial"]}[then]
    assert names(tmp_path) == left
    if then == "made again":
        assert (partial / FILE).read_text() == "of a third run"


def test_without_locks_a_folder_with_content_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    publish(tmp_path / "hf")
    left_by_a_killed_run(tmp_path, new="half")
    with pytest.raises(ConversionError, match=r"\.hf\.partial is there, .* no locks"):
        publish(tmp_path / "hf", force=True)
    assert names(tmp_path) == [".hf.partial", "hf"]


# ------------------------------------------------------------------------------------------------- what is no target


def test_the_root_is_no_target() -> None:
    with pytest.raises(ConversionError, match="root"):
        Publication(Path("/"), HUGGING_FACE, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "link to a file", "dangling link", "link to itself"])
def test_a_file_or_a_link_to_none_is_no_target(kind: str, force: bool, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    if kind == "file":
        target.write_text("kept")
    else:
        (tmp_path / "other").write_text("kept")
        places = {"link to a file": tmp_path / "other", "dangling link": tmp_path / "nowhere", "link to itself": target}
        target.symlink_to(places[kind])
    before = names(tmp_path)
    with pytest.raises(ConversionError, match="a link or a file"):
        publish(target, force=force)
    assert names(tmp_path) == before


@pytest.mark.parametrize("content", [None, "old"])
def test_a_link_to_a_folder_is_followed(content: str | None, tmp_path: Path) -> None:
    disk = tmp_path / "large disk"
    disk.mkdir()
    filled(disk / "place", content) if content else (disk / "place").mkdir()
    (tmp_path / "hf").symlink_to(disk / "place")
    if content:
        with pytest.raises(ConversionError, match="large disk/place exists and is not empty"):
            publish(tmp_path / "hf")
    publish(tmp_path / "hf", force=bool(content))
    assert (tmp_path / "hf").is_symlink()
    assert (tmp_path / "hf" / FILE).read_text() == "new"
    assert names(tmp_path) == ["hf", "large disk"]
    assert names(disk) == ["place"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("place", [".", "..", "../current", "./.", "../../outer"])
def test_the_current_folder_and_those_above_it_are_no_target(
    place: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = tmp_path / "outer" / "current"
    current.mkdir(parents=True)
    monkeypatch.chdir(current)
    for content in (None, "old"):
        if content:
            (current / FILE).write_text(content)
        with pytest.raises(ConversionError, match=r"the current folder \S+/outer/current.* Choose a folder in it"):
            publish(Path(place), force=force)
    assert names(tmp_path / "outer") == ["current"]
    assert names(current) == [FILE]
    publish(Path("hf"))


def test_a_current_folder_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    (tmp_path / "current").rmdir()
    with pytest.raises(ConversionError, match="current folder, which does not exist"):
        publish(Path("hf"))
    publish(tmp_path / "hf")


@pytest.mark.parametrize("place", ["home", "home/user"])
def test_the_home_folder_is_no_target(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "user"
    home.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "link" / "user"))
    with pytest.raises(ConversionError, match="the home folder"):
        publish(tmp_path / place, force=True)
    publish(home / "hf")


def test_the_folder_that_holds_a_mounted_disk_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = filled(tmp_path / "a model", "old")
    entries = f"29 1 254:1 / {str(target).replace(' ', chr(92) + '040')}/disk rw - ext4 /dev/sdb rw\n".encode()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: entries if "mountinfo" in path.name else read(path))
    for place in (target / "disk", target):
        with pytest.raises(ConversionError, match=r"the mount point .*a model/disk, which no run replaces"):
            publish(place, force=True)
    assert (target / FILE).read_text() == "old"


@pytest.mark.parametrize(
    "others",
    [["notes.txt"], ["README.md"], ["optimizer_tp0_pp0_zo0.pt"], ["train.py"], list("abcdefg"), ["inner/"], []],
    ids=str,
)
def test_force_replaces_model_files_alone(others: list[str], tmp_path: Path) -> None:
    """What a person wrote or cannot make again keeps the folder from being replaced; without weights so does all."""
    target = tmp_path / "hf"
    target.mkdir()
    (target / "config.json").write_text("{}")
    if others:
        (target / FILE).write_text("old")
    for name in others:
        (target / name).mkdir() if name.endswith("/") else (target / name).write_text("kept")
    before = names(target)
    more = " and 3 more" if len(others) > 4 else ""
    named = ", ".join(name.strip("/") for name in others[:4]) or "no weights"
    with pytest.raises(ConversionError, match=f"hf holds {re.escape(named + more)}: --force replaces"):
        publish(target, force=True)
    assert names(target) == before
    assert names(tmp_path) == ["hf"]


@pytest.mark.parametrize(
    ("kind", "held", "file"),
    [
        (HUGGING_FACE, "training checkpoint", "model_tp0_pp0.pt"),
        (HUGGING_FACE, "training checkpoint", "model_tp0_wp0_pp0.pt"),
        (CHECKPOINT, "Hugging Face folder", "model.safetensors"),
        (CHECKPOINT, "Hugging Face folder", "pytorch_model-00001-of-00002.bin"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_force_does_not_replace_a_folder_of_the_other_kind(kind: Kind, held: str, file: str, tmp_path: Path) -> None:
    target = tmp_path / "old"
    target.mkdir()
    (target / file).write_text("kept")
    words = rf"old holds a {held} \({re.escape(file)}\): --force of this script replaces a {kind.name} only"
    with pytest.raises(ConversionError, match=words):
        Publication(target, kind, force=True)
    (target / file).rename(target / "away")
    for name in (FILE, "model_tp0_pp0.pt"):  # both kinds at one place
        (target / name).write_text("kept")
    with pytest.raises(ConversionError, match=f"old holds a {held}"):
        Publication(target, kind, force=True)


def test_a_shard_is_replaced_by_a_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    target.mkdir()
    for name in ("model_tp0_pp0.pt", "model_config.pt", "model_tp0_pp0.pt.md5"):
        (target / name).write_text("old")
    with Publication(target, CHECKPOINT, force=True) as folder:
        (folder / "model_tp0_pp0.pt").write_text("new")
    assert names(target) == ["model_tp0_pp0.pt"]


def test_a_package_of_the_models_own_modules_is_replaced(tmp_path: Path) -> None:
    """An __init__.py elsewhere is somebody's program."""
    target = filled(tmp_path / "hf", "old")
    (target / "__init__.py").touch()
    with pytest.raises(ConversionError, match=r"hf holds __init__\.py"):
        publish(target, force=True)
    (target / "modeling_internlm2.py").touch()
    publish(target, force=True)
    assert names(target) == [FILE]


def test_other_files_that_come_while_a_run_writes_are_not_lost(tmp_path: Path) -> None:
    target = filled(tmp_path / "hf", "old")
    with pytest.raises(ConversionError, match=r"hf holds notes\.txt"):
        publish(target, force=True, then=lambda: (target / "notes.txt").write_text("kept"))
    assert names(target) == [FILE, "notes.txt"]
    assert (target / FILE).read_text() == "old"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("content", [None, "old"])
def test_a_folder_that_cannot_be_moved_is_refused_before_anything_is_written(
    content: str | None, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overlay's lower layer, a mount point of another kind, another user's folder: as the kernel answers."""
    target = filled(tmp_path / "hf", content) if content else tmp_path / "hf"
    target.mkdir(exist_ok=True)
    rename = Path.rename

    def rename_or_fail(path: Path, to: Path) -> Path:
        if path == target:
            raise OSError(number, os.strerror(number), str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", rename_or_fail)
    if content is None and number == errno.EXDEV:  # an empty folder need not be moved
        publish(target, force=True)
        return
    with pytest.raises(ConversionError, match=re.escape(os.strerror(number))):
        publish(target, force=True, then=lambda: pytest.fail("something was written"))
    assert names(target) == ([FILE] if content else [])
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
        Publication(tmp_path / place, HUGGING_FACE, force=True, sources=(source, tmp_path / "loop"))
    assert (source / FILE).read_text() == "kept"


# ------------------------------------------------------------------------------------------------------------- room


def test_room_is_checked_on_the_disk_of_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, asked = namedtuple("usage", "total used free"), []

    def disk_usage(path: Path) -> object:
        asked.append(path)
        return usage(0, 0, 1_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    publication = Publication(tmp_path / "not" / "yet" / "hf", HUGGING_FACE, force=False)
    publication.check_space(900_000_000)
    with pytest.raises(ConversionError, match=r"1\.00 GB free, 1\.07 GB are needed"):
        publication.check_space(1_000_000_000)
    assert asked == [tmp_path, tmp_path]
