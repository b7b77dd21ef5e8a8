"""Runs the scripts as a user does: in this process, or in a child that is killed, limited or given faults.

A child is forked from a server that has torch imported already, so that hundreds of runs fit into a test. In it every
file operation under one folder is counted: opening, making, renaming, removing, listing, and positioned reads, writes,
advice and flushes. Before the n-th of them the child can die, fail or wait, so that every moment has a number.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import sentencepiece

from tests.support.checkpoints import Shape
from weight_conversion.signals import ENDING

TINY = {
    "internlm": Shape(hidden=16, layers=2, heads=4, kv_heads=4, vocab=128),
    "internlm2": Shape(hidden=16, layers=2, heads=4, kv_heads=2, vocab=128),
}
TIME_LIMIT = 120
REPOSITORY = Path(__file__).resolve().parents[2]


def train_quick_tokenizer(path: Path) -> Path:
    """A SentencePiece model that gets no tokenizer.json, whose comparison would take most of a run's time."""
    words = ("river", "stone", "bridge", "garden", "window", "station", "lines of code", "ten trains", "an honest hour")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 8),
        model_prefix=str(path.with_suffix("")),
        model_type="unigram",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    return path.with_suffix(".model")


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder to work in, in memory where the system has such: flushing to a disk is most of a small run's time."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if usable else None) as folder:
        yield Path(folder)


def convert_words(source: Path, target: Path, tokenizer: Path, *more: str) -> list[str]:
    return ["--src", str(source), "--tgt", str(target), "--tokenizer", str(tokenizer), "--dtype", "float32", *more]


def revert_words(source: Path, target: Path, tp: int = 2, *more: str) -> list[str]:
    return ["--src", str(source), "--tgt", str(target), "--tp_size", str(tp), *more]


# --------------------------------------------------------------------------------------------------- in this process


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `status` is negative for a signal."""

    status: int
    errors: str
    output: str = ""

    @property
    def sentences(self) -> list[str]:
        return [line for line in self.errors.splitlines() if not line.startswith("warning: ")]


def run_script(script: str, words: Sequence[str]) -> Outcome:
    """Runs `python script.py words`, without the start of a process."""
    errors, output = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [f"{script}.py", *words]),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            status = importlib.import_module(script).main()
        except SystemExit as end:  # argparse ends so
            status = end.code
    return Outcome(status, errors.getvalue(), output.getvalue())


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Exit status 1 and one sentence, in which all `words` stand."""
    assert outcome.status == 1, outcome
    assert len(outcome.sentences) == 1, outcome.errors
    sentence = outcome.sentences[0]
    assert sentence.startswith("error: "), sentence
    assert sentence.endswith("."), sentence
    missing = [word for word in words if word not in sentence]
    assert not missing, f"{missing} not in: {sentence}"


def snapshot(folder: Path, *, times: bool = True) -> dict[str, tuple[Any, ...]]:
    """Everything in `folder`, and the folder: kind and mode, content or link, and with `times` when it was changed."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (status.st_mode, content, status.st_mtime_ns if times else None)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """The files in `folder` by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------- as a program


def run_itself(folder: Path, command: tuple[str, list[str]], setting: str, **environment: str) -> Outcome:
    """The script in a shell in `folder`, its words in "$@", in `setting`; with what was said on the error stream."""
    script, words = command
    run = subprocess.run(
        ["bash", "-c", setting, "bash", sys.executable, str(REPOSITORY / f"{script}.py"), *words],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        cwd=folder,
        check=False,
    )
    return Outcome(run.returncode, run.stderr)


# -------------------------------------------------------------------------------------------------------- in a child

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["tests.faults.fault_harness", "weight_conversion.running.convert", "weight_conversion.running.revert"]
)


@dataclass(frozen=True)
class Conditions:
    """What a child meets. Operations are counted from 1; 0 is none of them."""

    root: Path
    """Operations on files under this folder count."""
    kill_at: int = 0
    fail_at: int = 0
    error: int = 0
    signal_at: int = 0
    number: int = signal.SIGINT
    """The signal that the child sends itself then."""
    wait_at: int = 0
    file_size: int = 0
    """Largest file that the child may write, in bytes; 0: any."""
    user: int = 0
    """User id that the child takes; 0: none."""
    open_files: int = 0
    """How many files the child may have open; 0: as many as this process."""


class Child:
    """A script running in a process of its own."""

    def __init__(self, script: str, words: Sequence[str], conditions: Conditions) -> None:
        self._folder = tempfile.TemporaryDirectory()
        os.chmod(self._folder.name, 0o777)  # a child with another user id reports here too
        self._report = Path(self._folder.name)
        self._process = _SERVER.Process(target=_run, args=(script, list(words), conditions, self._report))
        self._process.start()

    def until(self, word: str) -> None:
        """Returns when the child is `ready` to run the script, or is `waiting` at its `wait_at`-th operation."""
        limit = time.monotonic() + TIME_LIMIT
        while not (self._report / word).exists():
            assert time.monotonic() < limit, f"the child was never {word}"
            assert self._process.is_alive(), (self._report / "errors").read_text()
            time.sleep(0.0005)

    def go_on(self) -> None:
        (self._report / "go").touch()

    def send(self, number: int) -> None:
        """Sends a signal; none where the child has ended."""
        if self._process.is_alive() and self._process.pid is not None:
            with suppress(ProcessLookupError):  # it may end just now
                os.kill(self._process.pid, number)

    def end(self) -> Outcome:
        self._process.join(TIME_LIMIT)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError("the child hangs")
        errors = (self._report / "errors").read_text(errors="replace")
        tally = self._report / "operations"
        self.operations = int(tally.read_text()) if self._process.exitcode == 0 else 0
        self._folder.cleanup()
        return Outcome(self._process.exitcode, errors)


def run_child(script: str, words: Sequence[str], conditions: Conditions) -> Outcome:
    """Runs a script in a child to its end."""
    return Child(script, words, conditions).end()


def count_operations(script: str, words: Sequence[str], root: Path) -> int:
    """How many file operations under `root` a run takes that nothing disturbs."""
    child = Child(script, words, Conditions(root))
    outcome = child.end()
    assert outcome.status == 0, outcome
    return child.operations


def _run(script: str, words: list[str], conditions: Conditions, report: Path) -> None:
    """What a child does; its exit status is the script's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs started in the background ignore it
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)  # tqdm's lock then leaves nothing behind when killed
    operations = _Operations(conditions, report)
    with (report / "errors").open("w", buffering=1) as errors, redirect_stderr(errors), redirect_stdout(io.StringIO()):
        operations.watch()
        if conditions.file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (conditions.file_size, conditions.file_size))
        if conditions.open_files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (conditions.open_files, conditions.open_files))
        if conditions.user:
            os.setgroups([])
            os.setgid(conditions.user)
            os.setuid(conditions.user)
        sys.argv = [f"{script}.py", *words]
        main = importlib.import_module(script).main
        try:
            (report / "ready").touch()
            status = main()
            for number in ENDING:
                signal.signal(number, signal.SIG_IGN)
        except KeyboardInterrupt:  # before or after what the script itself handles
            status = 130
        except BaseException:  # a fault of the script, for the test to see
            traceback.print_exc(file=errors)
            status = 3
    operations.stop()
    (report / "operations").write_text(str(operations.count))
    sys.exit(status)


_PATH_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}
_DESCRIPTOR_CALLS = ("pwrite", "preadv", "posix_fadvise", "fsync")


class _Operations:
    """Counts the file operations of this process, and disturbs the chosen one before it happens."""

    def __init__(self, conditions: Conditions, report: Path) -> None:
        self.count = 0
        self._conditions = conditions
        self._report = report
        self._lock = threading.Lock()
        self._running = True

    def watch(self) -> None:
        """From here on operations count. An audit hook cannot be taken back, hence `stop`."""
        sys.addaudithook(self._audit)
        for name in _DESCRIPTOR_CALLS:
            setattr(os, name, self._counted(getattr(os, name)))

    def stop(self) -> None:
        self._running = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._running or event not in _PATH_EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        relative_to_descriptor = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # shutil.rmtree
        if relative_to_descriptor or path.startswith(str(self._conditions.root)):
            self._step(path)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self._step(None)
            return call(*arguments)

        return counted

    def _step(self, path: str | None) -> None:
        with self._lock:
            self.count += 1
            count = self.count
        chosen = self._conditions
        if count == chosen.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if count == chosen.signal_at:
            os.kill(os.getpid(), chosen.number)
        if count == chosen.wait_at:
            (self._report / "waiting").touch()
            while not (self._report / "go").exists():
                time.sleep(0.001)
        if count == chosen.fail_at:
            reason = os.strerror(chosen.error)
            raise OSError(chosen.error, reason, path) if path else OSError(chosen.error, reason)
