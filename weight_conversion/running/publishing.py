"""Output that is either complete or not there.

    parent/.NAME.partial    everything is written here; a lock on the folder says that somebody still writes
    parent/NAME             appears by one rename, after every file has reached the disk
    parent/.NAME.replaced   with --force: what NAME was, between two renames, then removed

Whatever a killed run left behind is cleaned up, or put back, by the next run for the same target.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from ..errors import ConversionError, naming

SPARE_BYTES = 64 << 20
"""Room asked for beside the weights: tokenizer, code and the file system's own needs."""


class Publication:
    """A folder in the making for `target`. As a context manager: published on success, gone on failure."""

    def __init__(self, target: Path, *, force: bool, sources: tuple[Path, ...] = ()) -> None:
        self.target = Path(os.path.abspath(target))
        if not self.target.name:
            raise ConversionError(f"--tgt {target} is the root of all folders. Choose a folder in it.")
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self._replaced = self.target.with_name(f".{self.target.name}.replaced")
        self._force = force
        self._lock: int | None = None
        self._new_parents: list[Path] = []
        self._check_sources(sources)
        if os.path.lexists(self.folder) or os.path.lexists(self._replaced):
            self._clean_up()
        self._check_target()

    def _check_sources(self, sources: tuple[Path, ...]) -> None:
        real = Path(os.path.realpath(self.target))
        for source in (Path(os.path.realpath(source)) for source in sources):
            if source == real or real in source.parents:
                raise ConversionError(f"--tgt {self.target} is, or holds, the source {source}. Choose another folder.")

    def _check_target(self) -> None:
        for parent in self.target.parents:
            if os.path.lexists(parent) and not parent.is_dir():
                raise ConversionError(f"--tgt {self.target} is to lie in {parent}, which is no folder. Choose another.")
        if self.target.is_symlink() or (self.target.exists() and not self.target.is_dir()):
            raise ConversionError(f"--tgt {self.target} exists and is a link or a file. Choose another name.")
        if not self._force and self._is_filled():
            raise ConversionError(
                f"--tgt {self.target} exists and is not empty. Remove it, or replace it with --force."
            )

    def _is_filled(self) -> bool:
        return self.target.is_dir() and any(self.target.iterdir())

    def check_space(self, needed: int) -> None:
        """ConversionError where the disk has not `needed` bytes free."""
        parent = next(folder for folder in self.target.parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if free < needed + SPARE_BYTES:
            raise ConversionError(
                f"{parent} has {free / 1e9:.2f} GB free, {(needed + SPARE_BYTES) / 1e9:.2f} GB are needed. "
                "Make room, or choose a --tgt on another disk."
            )

    def __enter__(self) -> Path:
        self._new_parents = [parent for parent in self.target.parents if not parent.exists()]
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked_folder(self.folder)
            self._put_back()
            self._check_target()
        except BaseException:
            self._abandon()
            raise
        return self.folder

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            try:
                self._publish()
            except BaseException:
                self._abandon()
                raise
            self._unlock()
        else:
            self._abandon()

    def _publish(self) -> None:
        for path in [*self.folder.rglob("*"), self.folder]:
            _flush(path)
        self._check_target()
        if self._is_filled():
            self.target.rename(self._replaced)
        self.folder.rename(self.target)
        try:
            _flush(self.target.parent)
        except OSError as error:
            raise ConversionError(
                f"{self.target} is complete, but {error.filename} could not be flushed to the disk ({error.strerror}). "
                "Check the disk before you rely on it."
            ) from error
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _abandon(self) -> None:
        """Leaves things as they were before, and nothing of this run."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._put_back()
            self._unlock()
        for parent in self._new_parents:
            _remove_if_empty(parent)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _put_back(self) -> None:
        """What a run that ended between the two renames of --force left: the old folder, under its other name."""
        if self._is_filled():
            shutil.rmtree(self._replaced, ignore_errors=True)
        elif self._replaced.exists():
            self._replaced.rename(self.target)

    def _clean_up(self) -> None:
        """Removes or puts back what a killed run left; ConversionError where it is not dead."""
        lock = _locked_folder(self.folder)
        try:
            self._put_back()
            self.folder.rmdir()
        finally:
            os.close(lock)


def _locked_folder(folder: Path) -> int:
    """The descriptor that locks `folder`, made where it was not and emptied where it was; it is closed to unlock.

    ConversionError where another process has the lock, or had it and renamed or removed the folder meanwhile.
    """
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except BaseException:
        _remove_if_empty(folder)
        raise
    if not _try_lock(lock) or not folder.exists() or not os.path.samestat(os.fstat(lock), folder.stat()):
        os.close(lock)
        raise ConversionError(f"another run is writing {folder}. Wait for it to end, or choose another --tgt.")
    try:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except BaseException:
        _remove_if_empty(folder)
        os.close(lock)
        raise
    return lock


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty, in use by somebody else, or not there
        folder.rmdir()


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
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
