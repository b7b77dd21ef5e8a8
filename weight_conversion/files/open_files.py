"""Files that several threads read and write at positions, and a disk that works meanwhile.

    worker --write--> page cache        range complete --> queue --> a thread of its own --advice--> disk

Left to itself the kernel writes most bytes when they are flushed at the end, and everybody waits for the disk. Asking
for it waits too, as soon as the disk's queue is full: so a thread of its own asks, range by range, and the workers go
on. Only bytes that are already in the page cache wait in its queue, which is as long as the kernel lets it be.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConversionError, naming

BLOCK_BYTES = 1 << 20
"""What is read or written at a time: half of a current core's second-level cache, in which it stays between the two."""

WRITE_BEHIND_BYTES = 16 << 20
"""Length of the ranges that are handed to the disk while the next ones are written."""

MOST_OPEN_FILES = 256
"""A checkpoint may have more shards than a process may open files: those used longest ago are closed."""


class OpenFiles:
    """Open files by path, for positioned reads and writes by several threads; a bounded number at a time."""

    def __init__(self, writable: Iterable[Path]) -> None:
        # File systems let one thread at a time write to a file and have the others wait for it on a busy core.
        self._turns = {path: threading.Lock() for path in writable}
        self._open: dict[Path, _OpenFile] = {}  # the one used last is the last one
        self._most = _most_open_files()
        self._lock = threading.Lock()

    def close(self) -> None:
        for file in self._open.values():
            os.close(file.descriptor)
        self._open.clear()

    @contextmanager
    def opened(self, path: Path) -> Iterator[int]:
        """The descriptor of a file, which stays open meanwhile."""
        with self._lock:
            file = self._open.pop(path, None) or self._newly_opened(path)
            self._open[path] = file
            file.users += 1
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1

    def _newly_opened(self, path: Path) -> _OpenFile:
        idle = (other for other, file in list(self._open.items()) if not file.users)
        while len(self._open) >= self._most and (other := next(idle, None)):
            os.close(self._open.pop(other).descriptor)
        return _OpenFile(os.open(path, os.O_RDWR if path in self._turns else os.O_RDONLY))

    def read(self, path: Path, offset: int, target: memoryview) -> None:
        done = 0
        with self.opened(path) as descriptor:
            while done < len(target):
                with naming(path):
                    count = os.preadv(descriptor, [target[done:]], offset + done)
                if count == 0:
                    raise ConversionError(f"{path} ends at byte {offset + done}: it was cut while it was being read.")
                done += count

    def write(self, path: Path, offset: int, source: memoryview) -> None:
        done = 0
        with self.opened(path) as descriptor:
            while done < len(source):
                with naming(path), self._turns[path]:
                    done += os.pwrite(descriptor, source[done:], offset + done)

    def start_writing(self, path: Path, begin: int, end: int) -> None:
        """Has the disk begin with bytes [begin, end) of a file; waits while its queue is full.

        Of cached pages that are no longer needed the kernel starts to write the changed ones at once.
        """
        with suppress(OSError), self.opened(path) as descriptor:  # advice, which a file system may not take
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


@dataclass
class _OpenFile:
    descriptor: int
    users: int = 0


def _most_open_files() -> int:
    """Half of what the system allows, and no more than a few hundred."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(MOST_OPEN_FILES, limit // 2) if limit != resource.RLIM_INFINITY else MOST_OPEN_FILES


class WriteBehind:
    """One worker's view of the files: what it writes is handed to the disk by another thread, while it goes on."""

    def __init__(self, files: OpenFiles, start_writing: Callable[[Path, int, int], object]) -> None:
        """`start_writing` has another thread do what OpenFiles.start_writing does, and does not wait for it."""
        self._files = files
        self._start_writing = start_writing
        self._ranges: dict[Path, tuple[int, int]] = {}  # written and not handed over, the last one of each file

    def read(self, path: Path, offset: int, target: memoryview) -> None:
        self._files.read(path, offset, target)

    def write(self, path: Path, offset: int, source: memoryview) -> None:
        self._files.write(path, offset, source)
        self._written(path, offset, offset + len(source))

    def hand_over(self) -> None:
        """What is left, at the end of a task."""
        for path, (begin, end) in self._ranges.items():
            self._start(path, begin, end)
        self._ranges.clear()

    def _written(self, path: Path, begin: int, end: int) -> None:
        start, stop = self._ranges.get(path, (begin, begin))
        if stop != begin:
            self._start(path, start, stop)
            start = begin
        if end - start >= WRITE_BEHIND_BYTES:
            self._start(path, start, end)
            start = end
        self._ranges[path] = (start, end)

    def _start(self, path: Path, begin: int, end: int) -> None:
        if begin < end:  # no length would mean all the rest of the file
            self._start_writing(path, begin, end)
