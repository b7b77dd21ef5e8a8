"""What the user sees of a run: progress by bytes, notes, a summary."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ..errors import ConversionError
from ..files.copying import Progress


class Reporter:
    """Progress and warnings go to the error stream, the summary to the output."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def warn(self, sentence: str) -> None:
        print(f"warning: {sentence}", file=sys.stderr)

    def note(self, sentence: str) -> None:
        print(sentence)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Progress]:
        """A bar of `total` bytes; the function it gives may be called by several threads."""
        lock = threading.Lock()
        hidden = None if sys.stderr else True  # None: hidden where the error stream is no terminal
        with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=hidden) as bar:

            def advance(count: int) -> None:
                with lock:
                    bar.update(count)

            yield advance

    def summary(self, tensors: int, nbytes: int, target: Path) -> None:
        """What was written, and how long the whole run took."""
        seconds = time.monotonic() - self._start
        try:
            files = sorted(path.name for path in target.iterdir())
            print(
                f"{tensors} tensors, {nbytes / 1e9:.3f} GB, {seconds:.1f} s. Wrote {target}: {', '.join(files)}",
                flush=True,
            )
        except OSError as error:
            raise ConversionError(f"{target} is complete, but no summary of it can be given: {error}.") from error
