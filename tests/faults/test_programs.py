"""The scripts as programs: exit status, streams, terminals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.faults.changes import B
from tests.faults.fault_harness import REPOSITORY, Outcome, assert_refused, contents, run_itself, run_script, snapshot
from tests.faults.fault_moments import COMMANDS, Place


def test_the_scripts_themselves_end_with_a_sentence(place: Place) -> None:
    """As a user runs them: exit status, error stream, nothing on the output, whatever the current folder."""
    os.truncate(place.source / B, 1000)
    (place.hf / "config.json").write_text("{")
    for (script, words), name in ((place.convert_command(), B), (place.revert_command(), "config.json")):
        before = snapshot(place.root)
        run = subprocess.run(
            [sys.executable, REPOSITORY / f"{script}.py", *words],
            capture_output=True,
            text=True,
            cwd=place.root,
            check=False,
        )
        assert_refused(Outcome(run.returncode, run.stderr), name)
        assert snapshot(place.root) == before


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_disturb_nothing(closed: str, place: Place) -> None:
    script, words = place.convert_command()
    quoted = " ".join(f"'{word}'" for word in [sys.executable, str(REPOSITORY / f"{script}.py"), *words])
    assert subprocess.run(["sh", "-c", f"{quoted} {closed}"], capture_output=True, check=False).returncode == 0
    assert (place.target / "config.json").exists()


@pytest.mark.parametrize(
    ("direction", "setting"),
    [
        ("convert", '"$@" >/dev/full'),
        ("revert", '"$@" >/dev/full 2>/dev/full'),
        ("convert", 'set -o pipefail; "$@" 2> >(true) | true'),
        ("revert", 'set -o pipefail; "$@" | true'),
    ],
)
def test_what_cannot_be_printed_changes_no_exit_status(direction: str, setting: str, place: Place) -> None:
    command = COMMANDS[direction](place)
    outcome = run_itself(place.root, command, setting)
    assert (outcome.status, outcome.sentences) == (0, [])
    assert len(contents(place.target)) > 2
    assert run_itself(place.root, command, setting).status == 1  # for want of --force


@pytest.mark.parametrize(("name", "encoding"), [("\u5f20\u91cf", "ascii"), ("a\udcff\udcfe", "utf-8:strict")])
def test_a_name_that_cannot_be_printed(name: str, encoding: str, place: Place) -> None:
    (place.root / name).mkdir()
    for command in (place.convert_command, place.revert_command):
        words = command("--verify", target=place.root / name / name)
        assert run_itself(place.root, words, '"$@"', PYTHONIOENCODING=encoding).status == 0
        shutil.rmtree(place.root / name / name)


def test_a_terminal_that_is_gone_does_not_end_a_run(place: Place) -> None:
    """The bar of progress is then written to nobody."""
    for command in (place.convert_command, place.revert_command):
        master, slave = os.openpty()
        script, words = command()
        with subprocess.Popen(
            [sys.executable, str(REPOSITORY / f"{script}.py"), *words],
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        ) as run:
            os.close(slave)
            os.close(master)
        assert run.returncode == 0
        shutil.rmtree(place.target)


def test_success_says_that_it_verified(place: Place) -> None:
    for command in (place.convert_command, place.revert_command):
        for flags, said in (([], False), (["--verify"], True)):
            outcome = run_script(*command(*flags))
            assert ("Verified: every tensor was read again and equals its source." in outcome.output) == said
            shutil.rmtree(place.target)
