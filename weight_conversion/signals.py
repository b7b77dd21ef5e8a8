"""The signals that end a run, raised where the run can clean up: an interrupt, a scheduler's, a closed terminal's.

Each is raised once. A second one, of either kind, does not disturb the cleaning up.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EndedBySignal(KeyboardInterrupt):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = signal.Signals(number)

    @property
    def status(self) -> int:
        """The exit status that shells give to what a signal ended."""
        return 128 + self.number


@contextmanager
def raised_once() -> Iterator[None]:
    """Within it the first ending signal raises EndedBySignal; those that are ignored (nohup, &) stay so."""
    heard = False

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        if not heard:
            heard = True
            raise EndedBySignal(number)

    with _handled(end, where=lambda handler: handler in (signal.SIG_DFL, signal.default_int_handler)):
        yield


@contextmanager
def held_back(ask: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """Within it a signal that would raise calls `ask` alone, and is raised at the end; yields whether one came.

    Raised at once it can strike the main thread within a lock's own Python code: the lock stays held, a worker waits
    for it, and the program hangs.
    """
    raisers = {number: signal.getsignal(number) for number in ENDING}
    heard: list[int] = []

    def hear(number: int, _frame: FrameType | None) -> None:
        heard.append(number)
        ask()

    with _handled(hear, where=callable):
        yield lambda: bool(heard)
    if heard:
        handler = raisers[signal.Signals(heard[0])]
        if callable(handler):
            handler(heard[0], None)
        raise KeyboardInterrupt  # the work was ended, whatever the handler thinks


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], where: Callable[[object], bool]) -> Iterator[None]:
    """`handler` for the ending signals whose handler is one that `where` says; they get theirs back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: found for number in ENDING if where(found := signal.getsignal(number))}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)
