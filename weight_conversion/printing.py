"""Printing that never decides how a run ends: what cannot be printed is escaped or given up."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def say(text: str, *, to_errors: bool = False) -> None:
    """Prints a line; nothing where the stream is closed, full, or nobody reads it any more."""
    stream = sys.stderr if to_errors else sys.stdout
    if stream is not None:  # None: closed before Python started
        write(stream, f"{text}\n")


def write(stream: TextIO, text: str) -> None:
    """Writes text at once; what the stream's encoding lacks, as in file names that are no text, is escaped."""
    try:
        try:
            stream.write(text)
        except UnicodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):
        _give_up(stream)


def _give_up(stream: TextIO) -> None:
    """Sends the rest nowhere: Python would try it again at its end, and fail with an exit status of its own."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Forgiving:
    """A stream for others to print to, which never raises."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        write(self._stream, text)
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def flush(self) -> None:
        """Everything is written at once."""
