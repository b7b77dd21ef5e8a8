"""Output that is either complete or not there.

    parent/.NAME.partial    everything is written here; a lock on the folder says that somebody still writes
    parent/NAME             appears by one rename, after every file has reached the disk
    parent/.NAME.replaced   with --force: what NAME was, between two renames, then removed

Whatever a killed run left behind is cleaned up, or put back, by the next run for the same target.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from .errors import ConversionError

SPARE_BYTES = 64 << 20
"""Room asked for beside the weights: tokenizer, code and the file system's own needs."""


class Publication:
    """A folder in the making for `target`. As a context manager: published on success, gone on failure."""

    def __init__(self, target: Path, *, force: bool, sources: tuple[Path, ...] = ()) -> None:
        self.target = Path(os.path.abspath(target))
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self._replaced = self.target.with_name(f".{self.target.name}.replaced")
        self._lock: int | None = None
        self._check_target(force, sources)

    def _check_target(self, force: bool, sources: tuple[Path, ...]) -> None:
        real = self.target.resolve()
        for source in sources:
            if source.resolve() == real or real in source.resolve().parents:
                raise ConversionError(f"--tgt {self.target} is, or holds, the source {source}. Choose another folder.")
        if self.target.is_symlink() or (self.target.exists() and not self.target.is_dir()):
            raise ConversionError(f"--tgt {self.target} exists and is not a folder. Choose another name.")
        if self.target.exists() and any(self.target.iterdir()) and not force:
            raise ConversionError(
                f"--tgt {self.target} exists and is not empty. Remove it, or replace it with --force."
            )

    def check_space(self, needed: int) -> None:
        """ConversionError where the disk has not `needed` bytes free beside what a killed run left."""
        parent = next(folder for folder in self.target.parents if folder.exists())
        free = shutil.disk_usage(parent).free + _size_of(self.folder)
        if free < needed + SPARE_BYTES:
            raise ConversionError(
                f"{parent} has {free / 1e9:.2f} GB free, {(needed + SPARE_BYTES) / 1e9:.2f} GB are needed. "
                "Make room, or choose a --tgt on another disk."
            )

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked_folder(self.folder)
        self._recover()
        return self.folder

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._publish()
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def _recover(self) -> None:
        """What a run killed between the two renames of --force left: the old folder, under its other name."""
        if self._replaced.exists():
            if self.target.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self.target)

    def _publish(self) -> None:
        try:
            for path in [*self.folder.rglob("*"), self.folder]:
                _flush(path)
            if self.target.exists() and any(self.target.iterdir()):
                self.target.rename(self._replaced)
            self.folder.rename(self.target)
            _flush(self.target.parent)
        except BaseException:
            self._recover()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        shutil.rmtree(self._replaced, ignore_errors=True)


def _locked_folder(folder: Path) -> int:
    """Makes `folder`, empty and locked by this process; what nobody holds any more is removed first."""
    for _ in range(2):
        try:
            folder.mkdir()
        except FileExistsError:
            lock = os.open(folder, os.O_RDONLY)
            held = _try_lock(lock)
            if held:
                shutil.rmtree(folder)
            os.close(lock)
            if not held:
                break
        else:
            lock = os.open(folder, os.O_RDONLY)
            if _try_lock(lock):
                return lock
            os.close(lock)
            break
    raise ConversionError(f"another run is writing {folder}. Wait for it to end, or choose another --tgt.")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _flush(path: Path) -> None:
    """Returns when the file or folder is on the disk, so that the rename after it cannot overtake it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size_of(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) if folder.is_dir() else 0
