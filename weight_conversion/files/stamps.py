"""Whether files are what they were when their headers were read.

Training that goes on, or a copy that is not finished, writes into a checkpoint while it is being read: what comes out
would be of two steps. Size and time of the last change tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import ConversionError

Stamps = Mapping[Path, tuple[int, int]]
"""Of each file its size in bytes and the time of its last change in nanoseconds."""


def stamps_of(paths: Iterable[Path]) -> Stamps:
    """The stamps before anything is read; OSError where there is no such file."""
    return {path: _stamp(path) for path in paths}


def check_unchanged(stamps: Stamps) -> None:
    """ConversionError for the first file that was changed since, or is gone."""
    for path, stamp in stamps.items():
        if not path.exists() or _stamp(path) != stamp:
            raise ConversionError(
                f"{path} was changed while it was being read. Run again when nobody writes to it any more."
            )


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
