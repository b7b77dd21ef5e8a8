"""Work in another process: its values arrive, and whatever happens to the process, the work is done all the same.

Each program runs in a process of its own, since this one has threads and is never forked.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.fault_harness import contents, convert_words, run_script
from tests.support.checkpoints import build
from tests.support.tokenizer_fixture import train_tokenizer
from weight_conversion.running.meanwhile import Meanwhile

REPOSITORY = Path(__file__).resolve().parents[2]
PREAMBLE = """
import os, signal, sys, threading, time
from weight_conversion.errors import ConversionError
from weight_conversion.running.meanwhile import Meanwhile
from weight_conversion.signals import EndedBySignal, raised_once
here = os.getpid()
def work(tell):
    tell(("early", os.getpid() == here))
    return ("late", os.getpid() == here)
def wait_for_forks():  # one that died at once was taken away with the context
    try: os.waitpid(-1, 0)
    except ChildProcessError: pass
"""


def printed(program: str) -> list[str]:
    """The lines that a program prints; it must end well and say nothing else."""
    command = [sys.executable, "-W", "error", "-c", PREAMBLE + program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@contextmanager
def thread_that_sleeps() -> Iterator[None]:
    """So that this process is not forked, whatever ran in it before."""
    awake = threading.Event()
    thread = threading.Thread(target=awake.wait)
    thread.start()
    try:
        yield
    finally:
        awake.set()
        thread.join()


def test_both_values_come_from_the_other_process() -> None:
    program = "with Meanwhile(work) as other: print(other.early(), other.late(), other.early(), other.late())"
    early, late = "('early', False)", "('late', False)"
    assert printed(program) == [f"{early} {late} {early} {late}"]


def test_it_does_not_matter_that_the_system_takes_ended_processes_away() -> None:
    program = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with Meanwhile(work) as other: print(other.early(), other.late())
"""
    assert printed(program) == ["('early', False) ('late', False)"]


def test_large_values_arrive_whole() -> None:
    program = """
with Meanwhile(lambda tell: (tell(b"a" * 10**7), b"b" * 10**7)[1]) as other:
    print(other.early() == b"a" * 10**7, other.late() == b"b" * 10**7)
"""
    assert printed(program) == ["True True"]


def test_a_process_with_threads_is_not_forked() -> None:
    program = """
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
with Meanwhile(work) as other: print(other.early(), other.late())
"""
    assert printed(program) == ["('early', True) ('late', True)"]


def test_without_a_process_to_be_had_the_work_is_done_here() -> None:
    program = """
def none(): raise BlockingIOError(11, "no process")
os.fork = none
before = len(os.listdir("/proc/self/fd"))
with Meanwhile(work) as other: print(other.early(), other.late())
print(len(os.listdir("/proc/self/fd")) == before)
"""
    assert printed(program) == ["('early', True) ('late', True)", "True"]


@pytest.mark.parametrize("told", [False, True])
def test_what_a_killed_process_did_not_say_is_worked_out_here(told: bool) -> None:
    program = f"""
def work(tell):
    if {told}: tell(os.getpid() == here)
    if os.getpid() != here: os.kill(os.getpid(), signal.SIGKILL)
    if not {told}: tell(os.getpid() == here)
    return os.getpid() == here
with Meanwhile(work) as other: print(other.early(), other.late())
"""
    assert printed(program) == [f"{not told} True"]


@pytest.mark.parametrize("told", [False, True])
def test_an_error_of_the_work_is_raised_here(told: bool) -> None:
    program = f"""
def work(tell):
    if {told}: tell(1)
    raise ConversionError("what went wrong")
with Meanwhile(work) as other:
    try:
        print(other.early())
        other.late()
    except ConversionError as error:
        print(error)
"""
    assert printed(program) == [*(["1"] if told else []), "what went wrong"]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_what_crashed_a_process_is_not_done_again(number: signal.Signals, told: bool) -> None:
    program = f"""
def work(tell):
    if {told}: tell(1)
    os.kill(os.getpid(), {int(number)})
with Meanwhile(work) as other:
    try:
        print(other.early())
        other.late()
    except MemoryError as error:
        print(error)
"""
    *early, sentence = printed(program)
    assert early == ["1"] * told
    assert f"crashed ({number.name})" in sentence


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("error", ["MemoryError", "RuntimeError"])
def test_what_failed_under_a_limit_on_memory_is_not_done_again(error: str, limited: bool) -> None:
    program = f"""
import resource
if {limited}: resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
def work(tell):
    if os.getpid() != here: raise {error}
    return "here"
with Meanwhile(work) as other:
    try:
        print(other.late())
    except MemoryError as error:
        print(error)
"""
    sentence = "the process that prepares the tokenizer failed under the limit on memory"
    assert printed(program) == [sentence if limited else "here"]


def test_a_process_that_hangs_ends_with_the_context() -> None:
    program = """
with Meanwhile(lambda tell: (tell(1), time.sleep(600))) as other: other.early()
wait_for_forks()
print("ended")
"""
    assert printed(program) == ["ended"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_both_without_a_word_of_the_other(number: int) -> None:
    """To the group, as a terminal sends it, while this process waits for the other."""
    program = """
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with raised_once(), Meanwhile(lambda tell: (tell(os.getpid()), time.sleep(600))) as other:
        print(other.early(), flush=True)
        other.late()
except EndedBySignal as end: print(int(end.number))
"""
    command = [sys.executable, "-c", PREAMBLE + program]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        other = int(process.stdout.readline())
        os.killpg(process.pid, number)
        assert process.stdout.read() == f"{int(number)}\n"
        assert process.stderr.read() == ""
    assert process.returncode == 0
    while Path(f"/proc/{other}").exists():  # until the system has taken it away
        time.sleep(0.01)


def test_a_signal_while_the_other_is_made_leaves_none() -> None:
    program = """
fork = os.fork
def interrupted():
    number = fork()
    if number: os.kill(here, signal.SIGTERM)
    return number
os.fork = interrupted
try:
    with raised_once(), Meanwhile(lambda tell: time.sleep(600)) as other: print("not interrupted")
except EndedBySignal:
    wait_for_forks()
    print("ended")
"""
    assert printed(program) == ["ended"]


def test_who_reads_the_output_does_not_wait_for_the_other() -> None:
    """The other hangs, and the program is killed: its output ends all the same."""
    program = """
with Meanwhile(lambda tell: (tell(os.getpid()), time.sleep(600))) as other:
    print(other.early(), flush=True)
    os.kill(here, signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", PREAMBLE + program], cwd=REPOSITORY, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    os.kill(int(done.stdout), signal.SIGKILL)


def test_a_conversion_is_the_same_with_and_without(tmp_path: Path) -> None:
    build(tmp_path / "source", "internlm2")
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    script = "convert2hf_internlm2"
    command = [sys.executable, f"{script}.py", *convert_words(tmp_path / "source", tmp_path / "with", tokenizer)]
    subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)
    with thread_that_sleeps(), Meanwhile(lambda tell: tell(os.getpid())) as other:
        assert other.early() == os.getpid()
        words = convert_words(tmp_path / "source", tmp_path / "without", tokenizer)
        assert run_script(script, words).status == 0
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    assert "tokenizer.json" in contents(tmp_path / "with")
