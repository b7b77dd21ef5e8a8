"""Runs that are killed, interrupted or fail at a chosen moment, and what must hold then.

At every moment the target is as it was or complete and the source untouched, and the next run completes and leaves
nothing else. Functions here try many moments and say what they saw; AssertionError where a promise is broken.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.fault_harness import (
    TINY,
    Child,
    Conditions,
    Outcome,
    assert_refused,
    contents,
    convert_words,
    count_operations,
    revert_words,
    run_child,
    run_script,
    snapshot,
)
from tests.support.checkpoints import build

RUN_SECONDS = 0.04
"""About how long a run in a child takes."""

AS_BEFORE, COMPLETE, REFUSED = "as before", "complete", "refused"


@dataclass(frozen=True)
class Place:
    """A folder with a checkpoint of 2 x 2 shards, the same model as a Hugging Face folder, and a tokenizer."""

    root: Path
    family: str

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def hf(self) -> Path:
        return self.root / "hf"

    @property
    def target(self) -> Path:
        return self.root / "target"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.model"

    def convert_command(self, *more: str, target: Path | None = None) -> tuple[str, list[str]]:
        words = convert_words(self.source, target or self.target, self.tokenizer, "--max_shard", "20KB", *more)
        return f"convert2hf_{self.family}", words

    def revert_command(self, *more: str, target: Path | None = None) -> tuple[str, list[str]]:
        return f"revert_{self.family}", revert_words(self.hf, target or self.target, 2, *more)

    def reshard_command(self, *more: str, target: Path | None = None) -> tuple[str, list[str]]:
        """From the checkpoint to another, of an isp run."""
        sizes = ("--wp_size", "2", "--pp_size", "2")
        return f"revert_{self.family}", revert_words(self.source, target or self.target, 2, *sizes, *more)


def make_place(root: Path, family: str, tokenizer: Path) -> Place:
    place = Place(root, family)
    root.mkdir(exist_ok=True)
    shutil.copy(tokenizer, place.tokenizer)
    build(place.source, family, shape=TINY[family], tp=2, pp=2, bias=family == "internlm")
    outcome = run_script(*place.convert_command(target=place.hf))
    assert outcome.status == 0, outcome
    return place


Command = Callable[..., tuple[str, list[str]]]
COMMANDS: dict[str, Command] = {
    "convert": Place.convert_command,
    "revert": Place.revert_command,
    "reshard": Place.reshard_command,
}


@dataclass(frozen=True)
class Result:
    """What a run must leave: the files of the target as an undisturbed run writes them, and everything else."""

    files: dict[str, bytes]
    others: dict[str, Any]


def expected_result(place: Place, command: Command) -> Result:
    outcome = run_script(*command(place))
    assert outcome.status == 0, outcome
    files = contents(place.target)
    shutil.rmtree(place.target)
    return Result(files, others_of(place))


def others_of(place: Place) -> dict[str, Any]:
    """Everything but the target."""
    found = snapshot(place.root)
    return {name: found[name] for name in found if name != "." and not name.startswith("target")}


def killed_before_operations(place: Place, direction: str, force: bool, one_in: int) -> list[str]:
    """SIGKILL before one in so many file operations; how the target was left, moment by moment."""
    verdicts = []
    for outcome, complete in _disturbed(
        place, direction, force, one_in, lambda moment: Conditions(place.root, kill_at=moment)
    ):
        assert outcome.status == -signal.SIGKILL
        verdicts.append(COMPLETE if complete else AS_BEFORE)
    return verdicts


def signalled_before_operations(place: Place, direction: str, force: bool, number: int, one_in: int) -> list[str]:
    """A signal that asks the run to end: nothing of it may be left, and one sentence be said."""
    verdicts = []
    for outcome, complete in _disturbed(
        place, direction, force, one_in, lambda moment: Conditions(place.root, signal_at=moment, number=number)
    ):
        if outcome.status == 128 + number:
            assert len(outcome.sentences) == 1, outcome
            assert outcome.sentences[0].endswith("--tgt is as it was before, or complete")
        else:  # at the very end, when nothing is left to do
            assert complete, outcome
            assert outcome.status in (0, -number), outcome
        assert "Traceback" not in outcome.errors
        assert _hidden(place) == []
        verdicts.append(COMPLETE if complete else AS_BEFORE)
    return verdicts


def failing_at_operations(place: Place, direction: str, force: bool, error: int, one_in: int) -> list[str]:
    """The operation fails once with `error`. A run that cannot go on says where and why, and leaves nothing."""
    verdicts = []
    for outcome, complete in _disturbed(
        place, direction, force, one_in, lambda moment: Conditions(place.root, fail_at=moment, error=error)
    ):
        if outcome.status == 0:
            assert complete
            assert _hidden(place) in ([], [".target.partial"])  # only its removal, at the very end, may fail unseen
            verdicts.append(COMPLETE)
        else:
            assert_refused(outcome, str(place.root), *(["is complete, but"] if complete else [os.strerror(error)]))
            assert _hidden(place) == []
            verdicts.append(REFUSED)
    return verdicts


def signalled_at_random(place: Place, direction: str, number: int, runs: int, seed: int) -> list[str]:
    """A signal at random moments of a run; every second run is to replace an older target."""
    command, random = COMMANDS[direction], Random(seed)
    result, verdicts = expected_result(place, command), []
    for run in range(runs):
        force = bool(run % 2)
        before = _fill_target(place, direction, force)
        child = Child(*command(place, *(["--force"] if force else [])), Conditions(place.root))
        child.until("ready")
        time.sleep(random.uniform(0, RUN_SECONDS))
        child.send(number)
        outcome = child.end()
        complete = _assert_nothing_lost(place, before, result)
        assert outcome.status in (*([0] if complete else []), 128 + number, -number), outcome
        _assert_next_run_completes(place, command, result)
        verdicts.append(COMPLETE if complete else AS_BEFORE)
    return verdicts


def signalled_while_hanging(place: Place, direction: str, number: int, runs: int, seed: int) -> list[str]:
    """A file operation never returns, as on a disk that is gone, and a signal asks the run to end."""
    command, random = COMMANDS[direction], Random(seed)
    result, verdicts = expected_result(place, command), []
    operations = count_operations(*command(place), place.root)
    shutil.rmtree(place.target)
    for _ in range(runs):
        child = Child(*command(place), Conditions(place.root, wait_at=random.randint(1, operations)))
        child.until("waiting")
        child.send(number)
        outcome = child.end()
        complete = _assert_nothing_lost(place, {}, result)
        assert outcome.status == 128 + number, outcome
        assert outcome.sentences[-1].endswith("--tgt is as it was before, or complete"), outcome
        assert _hidden(place) == []
        shutil.rmtree(place.target, ignore_errors=True)
        verdicts.append(COMPLETE if complete else AS_BEFORE)
    return verdicts


def _disturbed(
    place: Place, direction: str, force: bool, one_in: int, conditions: Callable[[int], Conditions]
) -> Iterator[tuple[Outcome, bool]]:
    """Runs a command once for each chosen moment: how it ended, and whether the target is complete."""
    command = COMMANDS[direction]
    result = expected_result(place, command)
    more = ["--force"] if force else []
    _fill_target(place, direction, force)
    operations = count_operations(*command(place, *more), place.root)
    shutil.rmtree(place.target)
    for moment in range(1, operations + 1, one_in):
        before = _fill_target(place, direction, force)
        outcome = run_child(*command(place, *more), conditions(moment))
        yield outcome, _assert_nothing_lost(place, before, result)
        _assert_next_run_completes(place, command, result)


WEIGHTS = {"convert": "model.safetensors", "revert": "model_tp0_pp0.pt", "reshard": "model_tp0_wp0_pp0.pt"}
"""A name that a folder of the kind that each direction writes has."""


def _fill_target(place: Place, direction: str, force: bool) -> dict[str, bytes]:
    """With `force` a target that is to be replaced."""
    if force:
        place.target.mkdir()
        (place.target / WEIGHTS[direction]).write_text("old")
    return {WEIGHTS[direction]: b"old"} if force else {}


def _assert_nothing_lost(place: Place, before: dict[str, bytes], result: Result) -> bool:
    """The target is as it was or complete, the rest as it was; whether it is complete."""
    files = contents(place.target) if place.target.exists() else {}
    if files:
        assert files in (before, result.files)
    elif before:
        assert contents(place.root / ".target.partial" / "old") == before  # killed between the renames
    else:
        assert not place.target.exists()
    others = {name: value for name, value in others_of(place).items() if Path(name).parts[0] != ".target.partial"}
    assert others == result.others
    return files == result.files


def _assert_next_run_completes(place: Place, command: Command, result: Result) -> None:
    outcome = run_script(*command(place, "--force"))
    assert outcome.status == 0, outcome
    assert contents(place.target) == result.files
    assert others_of(place) == result.others
    shutil.rmtree(place.target)


def _hidden(place: Place) -> list[str]:
    return sorted(path.name for path in place.root.iterdir() if path.name.startswith("."))
