"""What is no regular file is refused by its kind, before it is opened: opening a FIFO waits, a device has no end."""

from __future__ import annotations

import stat
from pathlib import Path

from ..errors import ConversionError

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path) -> None:
    """ConversionError where `path` is something else than a file; OSError where there is nothing."""
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise ConversionError(f"{path} is {KINDS.get(kind, 'of another kind')}, expected a file. Copy the file there.")
