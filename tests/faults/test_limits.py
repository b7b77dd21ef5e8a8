"""Limits of the system, and file systems of all kinds: one sentence, or success."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.faults.fault_harness import (
    Conditions,
    assert_refused,
    contents,
    revert_words,
    run_child,
    run_itself,
    run_script,
    snapshot,
)
from tests.faults.fault_moments import COMMANDS, WEIGHTS, Place, expected_result, others_of
from tests.support.checkpoints import Shape, build
from tests.support.tokenizer_fixture import NORMAL, append_pieces, train_tokenizer


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_limit_on_file_sizes(direction: str, place: Place) -> None:
    result = expected_result(place, COMMANDS[direction])
    sizes = sorted({len(content) for content in result.files.values()})
    messages = 1000  # what the warnings and the sentence take: they go to a file here
    for limit in [messages, *(size - 1 for size in sizes if size > messages)]:
        outcome = run_child(*COMMANDS[direction](place), Conditions(place.root, file_size=limit))
        assert_refused(outcome, str(place.root), "File too large", "ulimit -f")
        assert ("--max_shard" in outcome.errors) == (direction == "convert")
        assert not place.target.exists()
        assert others_of(place) == result.others
    outcome = run_child(*COMMANDS[direction](place), Conditions(place.root, file_size=sizes[-1]))
    assert outcome.status == 0


@pytest.mark.parametrize("direction", COMMANDS)
def test_more_files_than_may_be_open(direction: str, place: Place) -> None:
    shutil.rmtree(place.source)
    if direction == "convert":  # 2 x 40 shards
        build(place.source, "internlm2", shape=Shape(16, 40, 4, 2, 256, 128), tp=2, pp=40)
        command = place.convert_command()
    else:  # a file for every tensor, to 64 shards
        shape = Shape(hidden=128, layers=2, heads=64, kv_heads=64, vocab=128)
        build(place.source, "internlm2", shape=shape)
        assert run_script(*place.convert_command("--force", "--max_shard", "1KB", target=place.hf)).status == 0
        command = ("revert_internlm2", revert_words(place.hf, place.target, 64))
    assert run_script(*command).status == 0
    expected = contents(place.target)
    shutil.rmtree(place.target)
    outcome = run_child(*command, Conditions(place.root, open_files=32))
    assert outcome.status == 0, outcome
    assert contents(place.target) == expected


@pytest.mark.parametrize("direction", COMMANDS)
def test_no_thread_to_be_had(direction: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def start_or_fail(thread: threading.Thread) -> None:
        if thread.name.startswith("copying"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    for flags in ((), ("--verify",)):
        before = snapshot(place.root, times=False)
        assert_refused(run_script(*COMMANDS[direction](place, *flags)), "can't start new thread", "ulimit -u")
        assert snapshot(place.root, times=False) == before


@pytest.mark.parametrize("megabytes", [100, 190, 210, 300, 600])
def test_too_little_address_space(megabytes: int, place: Place) -> None:
    """One sentence, or success; never a traceback, whatever the libraries do with the little they get."""
    before = snapshot(place.root, times=False)
    outcome = run_itself(place.root, place.convert_command(), f'ulimit -v {megabytes << 10}; "$@"')
    if outcome.status:
        assert outcome.status == 1, outcome
        assert "Traceback" not in outcome.errors
        assert outcome.sentences[-1].startswith("error: "), outcome
        assert snapshot(place.root, times=False) == before


@pytest.mark.parametrize("megabytes", [200, 215, 230, 260, 290])
def test_too_little_address_space_for_a_large_tokenizer(megabytes: int, place: Place) -> None:
    """Comparing it takes more memory than all else, and libraries that get none crash."""
    shutil.rmtree(place.source)
    build(place.source, "internlm2", shape=Shape(16, 1, 4, 2, vocab=92544))
    train_tokenizer(place.tokenizer)
    numbers = Random(0)
    append_pieces(place.tokenizer, (f"{numbers.randrange(10**12)}+{number}" for number in range(92000)), NORMAL)
    before = snapshot(place.root, times=False)
    outcome = run_itself(place.root, place.convert_command(), f'ulimit -v {megabytes << 10}; "$@"')
    if outcome.status:
        assert_refused(outcome, "ulimit -v")
        assert snapshot(place.root, times=False) == before


@contextmanager
def mounted(folder: Path, options: str, kind: str = "tmpfs") -> Iterator[Path]:
    """A file system at `folder`, in memory unless another kind is named; for "bind" `options` is the other folder."""
    folder.mkdir(exist_ok=True)
    words = ["--bind", options] if kind == "bind" else ["-t", kind, "-o", options, kind]
    command = ["mount", *words, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"mounting a file system is not permitted here: {done.stderr.strip() if done else 'no mount'}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
@pytest.mark.parametrize("direction", COMMANDS)
def test_a_mount_point_is_no_target(direction: str, kind: str, place: Place) -> None:
    """As a container's volume: known before anything is written, and a folder in it is a target."""
    disk = place.root.parent / "disk"
    (place.root.parent / "elsewhere").mkdir()
    options = {"tmpfs": "size=100m", "bind": str(place.root.parent / "elsewhere")}[kind]
    with mounted(disk, options, kind):
        for force in ((), ("--force",)):
            outcome = run_script(*COMMANDS[direction](place, *force, target=disk))
            assert_refused(outcome, "the mount point", str(disk), f"such as {disk}/model")
        assert list(disk.iterdir()) == []
        assert run_script(*COMMANDS[direction](place, target=disk / "model")).status == 0


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_target_in_the_lower_layer_of_an_overlay(direction: str, place: Place) -> None:
    """As a folder of a container's image: it cannot be moved, which is known before anything is written."""
    layers = [place.root.parent / name for name in ("lower", "upper", "work_folder")]
    for folder in (*layers, layers[0] / "empty", layers[0] / "full"):
        folder.mkdir()
    (layers[0] / "full" / WEIGHTS[direction]).write_text("old")
    options = "lowerdir={},upperdir={},workdir={},redirect_dir=off".format(*layers)
    with mounted(place.root.parent / "disk", options, "overlay") as disk:
        outcome = run_script(*COMMANDS[direction](place, "--force", target=disk / "full"))
        assert_refused(outcome, str(disk / "full"), "cannot be replaced", "layer", os.strerror(errno.EXDEV))
        assert contents(disk / "full") == {WEIGHTS[direction]: b"old"}
        assert run_script(*COMMANDS[direction](place, target=disk / "empty")).status == 0
        assert sorted(path.name for path in disk.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_disk_that_is_full(direction: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything starts; where others fill the disk meanwhile, a sentence and nothing left."""
    result = expected_result(place, COMMANDS[direction])
    total = sum(len(content) for content in result.files.values())
    for part in (0.02, 0.2, 0.5, 0.8, 0.9, 0.95):
        with mounted(place.root.parent / "disk", f"size={int(total * part)}") as disk:
            command = COMMANDS[direction](place, target=disk / "target")
            assert_refused(run_script(*command), str(disk), "GB free", "needed")
            assert list(disk.iterdir()) == []
            with monkeypatch.context() as patch:
                patch.setattr("weight_conversion.running.publishing.Publication.check_space", lambda *_: None)
                assert_refused(run_script(*command), str(disk), "No space left", "make room")
            assert list(disk.iterdir()) == []
    with mounted(place.root.parent / "disk", f"size={total + (68 << 20)}") as disk:
        assert run_script(*COMMANDS[direction](place, target=disk / "target")).status == 0
        assert contents(disk / "target") == result.files


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_disk_that_cannot_be_written(direction: str, place: Place) -> None:
    with mounted(place.root.parent / "disk", "ro") as disk:
        outcome = run_script(*COMMANDS[direction](place, target=disk / "target"))
        assert_refused(outcome, str(disk), "Read-only file system", "choose one")


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_folder_that_may_not_be_written(direction: str, bases: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(bases["internlm2"], Path(folder) / "work")
        place = Place(Path(folder) / "work", "internlm2")
        place.root.chmod(0o555)
        user = 65534 if os.geteuid() == 0 else 0  # root may write anywhere, so the child becomes nobody
        outcome = run_child(*COMMANDS[direction](place), Conditions(place.root, user=user))
        assert_refused(outcome, str(place.root), "Permission denied", "permissions")
        place.root.chmod(0o755)
