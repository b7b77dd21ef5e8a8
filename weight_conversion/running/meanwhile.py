"""Work that another process does meanwhile.

    this process    imports, reads headers ......... early()  copies weights ......... late()  writes what was made
    a fork of it    work(tell): ........... tell(early value) ........ returns the late value

Threads of this process would share its interpreter, and copying would wait for them. The fork is only ever a help: a
process that already has threads is not forked, because a lock that one of them holds would stay locked in the fork;
and whatever happens to the fork, the work is then done here, which raises what the work raises. Unless it crashed, or
failed otherwise under a limit on memory: libraries that get none end a process without a word.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, Generic, NoReturn, TypeVar

from ..errors import ConversionError
from ..signals import ENDING

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
"""How a library ends a process, mostly where it gets no memory."""
FAILED = 1
"""Exit status of a fork whose work raised what no work means to raise. A library may end it with another."""

Early = TypeVar("Early")
Late = TypeVar("Late")


class Meanwhile(Generic[Early, Late]):
    """`work` in another process while the context lasts, or here when its first value is asked for.

    `work` is called with a function that it tells its early value, once, and returns its late value.
    """

    def __init__(self, work: Callable[[Callable[[Early], None]], Late]) -> None:
        self._work = work
        self._fork: int | None = None
        self._pipe: BinaryIO | None = None
        self._early: list[Early] = []
        self._late: list[Late] = []

    def __enter__(self) -> Meanwhile[Early, Late]:
        if _is_alone():
            try:
                with _signals_held_off():
                    self._start()
            except BaseException:  # a signal that came meanwhile
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        with _signals_held_off():
            if self._pipe is not None:
                self._pipe.close()
            if self._fork is not None:
                _end(self._fork, is_done=bool(self._late))

    def early(self) -> Early:
        """What the work told; raises what it raised before, or MemoryError where it crashed."""
        if not self._early:
            self._receive(self._early)
        return self._early[0]

    def late(self) -> Late:
        """What the work returned, or raised; MemoryError where it crashed."""
        if not self._late:
            self._receive(self._late)
        return self._late[0]

    def _receive(self, values: list[Early] | list[Late]) -> None:
        """Puts the next value from the pipe into `values`; without one, does the work here."""
        if self._pipe is not None:
            try:
                values.append(pickle.load(self._pipe))
                return
            except (EOFError, pickle.UnpicklingError):  # the fork ended before its time
                self._pipe.close()
                self._pipe = None
                self._check_end()
        self._late.append(self._work(self._early.append))

    def _check_end(self) -> None:
        """Raises MemoryError where the fork, which has ended, ended in a way that would end this process."""
        with suppress(ChildProcessError):  # as in _end
            _, status = os.waitpid(self._fork or 0, 0)
            limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) in CRASHES:
                how = f"crashed ({signal.Signals(os.WTERMSIG(status)).name}), as libraries do without memory"
            elif limited and os.WIFEXITED(status) and os.WEXITSTATUS(status):
                how = "failed under the limit on memory"
            else:
                return
            raise MemoryError(f"the process that prepares the tokenizer {how}")

    def _start(self) -> None:
        """Forks this process; where none is to be had, all is done here."""
        with suppress(OSError):
            read, write = os.pipe()
            try:
                self._fork = os.fork()
                if self._fork == 0:
                    _work_in_fork(self._work, read, write)
                self._pipe = os.fdopen(read, "rb")
            finally:
                os.close(write)
                if self._pipe is None:
                    os.close(read)


@contextmanager
def _signals_held_off() -> Iterator[None]:
    """A signal that would end the run is raised at the end, when nothing can be left behind."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_alone() -> bool:
    """Whether this process has one thread, those of libraries counted; not believed where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _work_in_fork(work: Callable[[Callable[[Early], None]], Late], read: int, write: int) -> NoReturn:
    """Sends both values and ends the process; a signal ends it at once and without a word, as does an error."""
    status = FAILED
    try:
        for number in ENDING:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        os.close(read)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):  # who reads what this program says does not wait for the fork
            os.dup2(nothing, standard)
        with os.fdopen(write, "wb") as pipe:

            def tell(value: Early) -> None:
                pickle.dump(value, pipe)
                pipe.flush()

            pickle.dump(work(tell), pipe)
        status = 0
    except (ConversionError, OSError):  # raised again where the work is done again
        status = 0
    finally:
        os._exit(status)


def _end(fork: int, *, is_done: bool) -> None:
    """Ends a fork, and waits for it where that is short: one that hangs in a read does not die at once."""
    with suppress(ChildProcessError):  # the system has taken it away, as it does where SIGCHLD is ignored
        if os.waitpid(fork, os.WNOHANG) == (0, 0):
            os.kill(fork, signal.SIGKILL)
            os.waitpid(fork, 0 if is_done else os.WNOHANG)
