"""Output that is either complete or not there.

    parent/.NAME.partial/                   locked while somebody writes
        written-by-weight-conversion        says that what lies here is ours to remove
        new/                                everything is written here
        old/                                with --force: what NAME was, between two renames
        trash/                              what NAME was, once the new NAME stands there
    parent/NAME                             appears by one rename, after every file has reached the disk

Whatever a killed run left behind is cleaned up, or put back, by the next run for the same target.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import ConversionError, listed, naming
from ..folders.model_folder import KINDS, Kind

SPARE_BYTES = 64 << 20
"""Room asked for beside the weights: tokenizer, code and the file system's own needs."""
MARK = "written-by-weight-conversion"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""How file systems of clusters answer that they are mounted without locks."""


class Publication:
    """A folder of a kind, in the making for `target`. As a context manager: published on success, gone on failure.

    `force` replaces a folder of the same kind only.
    `warn` is called with a sentence where the target is complete but something else is not as it should be.
    """

    def __init__(
        self,
        target: Path,
        kind: Kind,
        *,
        force: bool,
        sources: tuple[Path, ...] = (),
        warn: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        self.target = _followed(target)
        self._hidden = self.target.with_name(f".{self.target.name}.partial")
        self.folder = self._hidden / "new"
        self._old, self._trash, self._probe = (self._hidden / name for name in ("old", "trash", "probe"))
        self._kind = kind
        self._force = force
        self._warn = warn
        self._lock: int | None = None
        self._new_parents: list[Path] = []
        self._check_place(sources)
        if os.path.lexists(self._hidden):
            self._clean_up()
        self._check_target()

    def _check_place(self, sources: tuple[Path, ...]) -> None:
        """Never replaced, empty or not: where the user stands or lives, mounted disks, and the source."""
        if os.path.lexists(self.target) and not self.target.is_dir():
            raise ConversionError(f"--tgt {self.target} exists and is a link or a file. Choose another name.")
        for source in (Path(os.path.realpath(source)) for source in sources):
            if _holds(self.target, source):
                raise ConversionError(f"--tgt {self.target} is, or holds, the source {source}. Choose another folder.")
        for what, place in _kept_places():
            if _holds(self.target, place):
                raise ConversionError(
                    f"--tgt {self.target} is, or holds, {what} {place}, which no run replaces. Choose a folder in it, "
                    f"such as {self.target / 'model'}."
                )

    def _check_target(self) -> None:
        if not self._is_filled():
            return
        if not self._force:
            raise ConversionError(
                f"--tgt {self.target} exists and is not empty. Remove it, or replace it with --force."
            )
        for kind in KINDS:
            weights = kind.weight_files(self.target)
            if weights and kind is not self._kind:
                raise ConversionError(
                    f"--tgt {self.target} holds a {kind.name} ({listed(weights)}): --force of this script replaces a "
                    f"{self._kind.name} only. Choose another --tgt, or remove the folder yourself."
                )
        others = self._kind.other_files(self.target)
        if others or not self._kind.weight_files(self.target):
            raise ConversionError(
                f"--tgt {self.target} holds {listed(others) or 'no weights'}: --force replaces a folder of model files "
                "alone. Move away what you want to keep and remove the folder, or choose another --tgt."
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
            self._lock = _locked_folder(self._hidden)
            self._recover()
            self._check_target()
            self._check_renames()
            self.folder.mkdir()
        except BaseException:
            self._abandon()
            raise
        return self.folder

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            try:
                self._publish()
                self._remove_old()
            except BaseException:
                self._abandon()
                raise
            self._unlock()
        else:
            self._abandon()

    def _check_renames(self) -> None:
        """ConversionError where the last step would fail: the folder that is to be replaced cannot be moved.

        Tried as it will be done, but onto a folder that is not empty, which no file system allows: the error says
        whether that is the only obstacle. An empty folder need not be moved, so another layer of an overlay is none.
        """
        if not self.target.is_dir():
            return
        self._probe.mkdir()
        (self._probe / MARK).touch()
        try:
            self.target.rename(self._probe)
        except OSError as error:
            obstacles = {errno.ENOTEMPTY, errno.EEXIST} | (set() if self._is_filled() else {errno.EXDEV})
            if error.errno not in obstacles:
                raise ConversionError(
                    f"--tgt {self.target} cannot be replaced ({error.strerror}): it is a mount point, belongs to "
                    "another user, or lies in a layer that cannot be changed. Choose another name or a folder in it."
                ) from error
        else:
            self._probe.rename(self.target)
        (self._probe / MARK).unlink()  # not rmtree, whose errors name the file without its folder
        self._probe.rmdir()

    def _publish(self) -> None:
        for path in [*self.folder.rglob("*"), self.folder]:
            _flush(path)
        self._check_target()
        if self._is_filled():
            self.target.rename(self._old)
        self.folder.rename(self.target)
        try:
            _flush(self.target.parent)
        except OSError as error:
            raise ConversionError(
                f"{self.target} is complete, but {error.filename} could not be flushed to the disk ({error.strerror}). "
                "Check the disk before you rely on it."
            ) from error

    def _remove_old(self) -> None:
        """The target is complete: what it was goes, and the hidden folder."""
        try:
            self._put_back()
            self._remove_hidden()
        except OSError as error:
            self._warn(
                f"{self.target} is complete, but {self._hidden} and what was replaced in it could not be removed "
                f"({error.strerror}: {error.filename}). Remove it yourself."
            )

    def _abandon(self) -> None:
        """Leaves things as they were before, and nothing of this run; what cannot be removed, the next one removes."""
        if self._lock is not None:
            try:
                with contextlib.suppress(OSError):
                    self._put_back()
                    self._remove_hidden()
            finally:
                self._unlock()
        for parent in self._new_parents:
            _remove_if_empty(parent)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _recover(self) -> None:
        """Removes or puts back what a killed run left in the hidden folder; all but its mark."""
        try:
            self._put_back()
            self._remove_content()
        except OSError as error:
            raise ConversionError(
                f"{self._hidden}, left by a run for {self.target}, cannot be removed ({error.strerror}: "
                f"{error.filename}). Remove it yourself, and run again."
            ) from error

    def _put_back(self) -> None:
        """What a run that ended between the two renames of --force left: the old folder, under its other name."""
        if not os.path.lexists(self._old):
            return
        if self._is_filled():
            self._old.rename(self._trash)
            return
        try:
            self._old.rename(self.target)
        except OSError as error:
            raise ConversionError(
                f"{self._old} is what {self.target} was, and cannot be put back ({error.strerror}). Move it there "
                "yourself."
            ) from error

    def _clean_up(self) -> None:
        """Removes or puts back what a killed run left; ConversionError where it is not dead."""
        self._lock = _locked_folder(self._hidden)
        try:
            self._recover()
            self._remove_hidden()
        finally:
            self._unlock()

    def _remove_hidden(self) -> None:
        self._remove_content()
        (self._hidden / MARK).unlink(missing_ok=True)  # last: without it the rest would be nobody's
        self._hidden.rmdir()

    def _remove_content(self) -> None:
        for path in (self._trash, self.folder, self._probe):
            if os.path.lexists(path):
                shutil.rmtree(path)


def _followed(target: Path) -> Path:
    """Where a --tgt lies: absolute, links followed; ConversionError where that is no place for a folder."""
    try:
        parents = Path(os.path.abspath(target)).parents
        found = Path(os.path.realpath(target))
    except FileNotFoundError as error:
        raise ConversionError(
            f"--tgt {target} is to lie in the current folder, which does not exist any more."
        ) from error
    for parent in parents:
        if os.path.lexists(parent) and not parent.is_dir():
            raise ConversionError(f"--tgt {target} is to lie in {parent}, which is no folder. Choose another.")
    if target.is_symlink() and not found.is_dir():
        raise ConversionError(f"--tgt {target} exists and is a link or a file. Choose another name.")
    if not found.name:
        raise ConversionError(f"--tgt {target} is the root of all folders. Choose a folder in it.")
    return found


def _holds(folder: Path, place: Path) -> bool:
    return folder == place or folder in place.parents


def _kept_places() -> Iterator[tuple[str, Path]]:
    with contextlib.suppress(OSError):  # the current folder was removed
        yield "the current folder", Path.cwd()
    homes = {os.path.expanduser("~")}
    with contextlib.suppress(KeyError):  # a user id without an entry, as in containers
        homes.add(pwd.getpwuid(os.getuid()).pw_dir)
    for home in sorted(homes):
        if os.path.isabs(home):
            yield "the home folder", Path(os.path.realpath(home))
    for mount_point in _mount_points():
        yield "the mount point", mount_point


def _mount_points() -> list[Path]:
    """The places where disks are mounted, as the kernel lists them: bind mounts look like any folder otherwise."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []  # the rename tried before anything is written still finds them
    escaped = (line.split(b" ")[4] for line in lines)
    return [Path(os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), path))) for path in escaped]


def _locked_folder(folder: Path) -> int:
    """The descriptor that locks `folder`, made and marked where it was not; it is closed to unlock.

    ConversionError where another process has the lock, or had it and renamed or removed the folder meanwhile, and
    where the folder is not one of ours.
    """
    lock, others = None, False
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if folder.is_symlink() or not folder.is_dir():
            raise _not_ours(folder)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        others = not (_try_lock(lock, folder) and folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()))
        if others:
            raise ConversionError(f"another run is writing {folder}. Wait for it to end, or choose another --tgt.")
        if any(folder.iterdir()) and not (folder / MARK).exists():
            raise _not_ours(folder)
        (folder / MARK).touch()
    except BaseException:
        if not others:
            _remove_if_empty(folder)
        if lock is not None:
            os.close(lock)
        raise
    return lock


def _not_ours(folder: Path) -> ConversionError:
    return ConversionError(
        f"{folder} is where this run would write, but no run of these scripts made it. Move it away, or choose another "
        "--tgt."
    )


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty, in use by somebody else, or not there
        folder.rmdir()


def _try_lock(descriptor: int, folder: Path) -> bool:
    """Whether the lock was free. On a file system without locks a folder with content may be another run's."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if any(folder.iterdir()):
            raise ConversionError(
                f"{folder} is there, and its file system has no locks to tell whether another run is writing it. "
                "Remove it if none is."
            ) from error
    return True


def _flush(path: Path) -> None:
    """Returns when the file or folder is on the disk, so that the rename after it cannot overtake it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
