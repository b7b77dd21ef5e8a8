"""What the user sees of a run: progress by bytes, notes, a summary."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files.copying import Progress
from ..printing import Forgiving, say


class Reporter:
    """Progress and warnings go to the error stream, the summary to the output."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def warn(self, sentence: str) -> None:
        say(f"warning: {sentence}", to_errors=True)

    def note(self, sentence: str) -> None:
        say(sentence)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Progress]:
        """A bar of `total` bytes; the function it gives may be called by several threads."""
        if not sys.stderr or not sys.stderr.isatty():
            yield lambda _: None
            return
        from tqdm import tqdm  # only here: it takes as long to import as Python to start

        lock = threading.Lock()
        with tqdm(total=total, desc=what, unit="B", unit_scale=True, file=Forgiving(sys.stderr)) as bar:

            def advance(count: int) -> None:
                with lock:
                    bar.update(count)

            yield advance

    def summary(self, tensors: int, nbytes: int, target: Path, *, verified: bool, rounded: str = "") -> None:
        """What was written, and how long the whole run took; `rounded` says from which types to which."""
        seconds = time.monotonic() - self._start
        try:
            wrote = f"{target}: {', '.join(sorted(path.name for path in target.iterdir()))}"
        except OSError as error:  # the work is done: no reason to end with another status
            wrote = f"{target}, whose files cannot be listed now ({error.strerror})"
        equals = "equals its source" + (", rounded" if rounded else "")
        checked = f" Verified: every tensor was read again and {equals}." if verified else ""
        how = f", {rounded}" if rounded else ""
        say(f"{tensors} tensors, {nbytes / 1e9:.3f} GB{how}, {seconds:.1f} s. Wrote {wrote}.{checked}")
