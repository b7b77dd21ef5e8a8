"""Moves bytes between files in blocks of rows. Knows windows on tensors; neither their names' meaning nor file formats.

A Move pairs the windows of one full tensor with windows of parts. It runs in either direction, block by block:

    gather    parts --read--> scratch --strided copy, cast--> block --write--> full      (converting)
    scatter   full  --read--> block --strided copy--> scratch --write--> parts           (reverting)
              A full tensor that lies in no file is gathered, block by block, where it would be read.

    A block is a run of whole rows of the full tensor that fits the processor's cache, so memory stays constant and
    every byte is read once and written once. Where a part lies in the full tensor in one piece, of the same type, it
    needs no scratch. (The kernel's own copying from file to file took longer: it works through small pipes, and holds
    up the other threads that write to the file.)

Where several full tensors lie in turns in one part (q, k and v in wqkv), reverting gathers too: the part from them.

Comparing is gathering again and looking at what the full tensor holds.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from ..errors import ConversionError
from ..signals import held_back
from .casting import Array, Cast, Loss, unsigned
from .checksums import crc32
from .dtypes import FLOAT32, DType
from .moves import Move, Task
from .open_files import BLOCK_BYTES, OpenFiles, WriteBehind
from .runs import Run, as_run
from .views import StoredTensor

MAX_WORKERS = 4
"""More threads do not help: two saturate a disk, and four the memory bus of most machines."""
THREAD_NAMES = "copying"
POLL_SECONDS, PATIENCE_SECONDS = 0.25, 1.0
"""How often the main thread looks whether it is to end, and how long it then waits for threads that hang."""

Progress = Callable[[int], None]
Result = TypeVar("Result")


class Copier:
    """Runs tasks on a few threads, each with a few small buffers of its own."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stop = _Stop()

    def gather(self, tasks: Sequence[Task]) -> dict[str, Loss]:
        """Writes every full tensor from its parts; returns what casts lost, by the name of the full tensor."""
        done = self._on_each(tasks, _gather, writable={move.full.path for task in tasks for move in task})
        return {name: loss for losses in done for name, loss in losses.items() if loss != Loss()}

    def scatter(self, tasks: Sequence[Task]) -> dict[Path, dict[str, int]]:
        """Writes the parts of every full tensor; returns the CRC-32 of each part by file and name."""
        moves = [move for task in tasks for move in task]
        writable = {part.tensor.path for move in moves if not move.back for _, part in move.pairs}
        writable |= {move.full.path for move in moves if move.back}
        checksums: dict[Path, dict[str, int]] = {path: {} for path in writable}
        for done in self._on_each(tasks, _scatter, writable):
            for tensor, checksum in done.items():
                checksums[tensor.path][tensor.name] = checksum.value
        return checksums

    def differences(self, tasks: Sequence[Task]) -> list[Move]:
        """The moves whose full tensor does not hold what its parts say."""
        return [move for found in self._on_each(tasks, _differing, writable=set()) for move in found]

    def _on_each(
        self, tasks: Sequence[Task], work: Callable[[_Worker, Task], Result], writable: set[Path]
    ) -> list[Result]:
        """`work` on every task."""
        workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        pool, disk = (ThreadPoolExecutor(count, thread_name_prefix=THREAD_NAMES) for count in (workers, 1))
        files = OpenFiles(writable)

        def start_writing(path: Path, begin: int, end: int) -> None:
            if not self._stop.asked:  # many may wait for a slow disk when the user interrupts
                files.start_writing(path, begin, end)

        def hand_over(path: Path, begin: int, end: int) -> None:
            with suppress(RuntimeError):  # no thread to be had: the disk begins later
                disk.submit(start_writing, path, begin, end)

        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            free.put(_Worker(WriteBehind(files, hand_over), self._progress, self._stop))

        def with_worker(task: Task) -> Result:
            worker = free.get()
            try:
                return work(worker, task)
            finally:
                free.put(worker)

        with _ended_between_blocks(self._stop):
            try:
                futures = [_submitted(pool, with_worker, task) for task in _schedule(tasks)]
                return self._results(futures)
            except BaseException:
                self._stop.asked = True
                raise
            finally:
                for executor in (pool, disk):
                    executor.shutdown(wait=False, cancel_futures=self._stop.asked)
                if self._threads_end():  # else one of them may still use a file
                    files.close()

    def _results(self, futures: Sequence[Future[Result]]) -> list[Result]:
        """What the tasks return; raises what the first that fails raises, or _StoppedError when asked to end."""
        while True:
            finished, running = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            if not running:
                return [future.result() for future in futures]
            if self._stop.asked:
                raise _StoppedError

    def _threads_end(self) -> bool:
        """Waits for the threads; False where one that was asked to end hangs in a read or write that never returns."""
        patience = PATIENCE_SECONDS
        for thread in copying_threads():
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                patience -= POLL_SECONDS if self._stop.asked else 0
                if patience < 0:
                    return False
        return True


def copying_threads() -> list[threading.Thread]:
    """The threads that copy. One that hangs in a read keeps Python from ending: the program must end without it."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAMES)]


def _submitted(pool: ThreadPoolExecutor, work: Callable[[Task], Result], task: Task) -> Future[Result]:
    try:
        return pool.submit(work, task)
    except RuntimeError as error:
        raise ConversionError(
            f"{error}: no thread is to be had to copy with. Raise the limits on processes and memory (ulimit -u, "
            "ulimit -v), or end other programs."
        ) from error


def _schedule(tasks: Sequence[Task]) -> list[Task]:
    """The largest first, so that the threads end together; files in turn, so that two threads seldom meet in one."""
    seen: Counter[tuple[int, Path]] = Counter()

    def place(task: Task) -> tuple[int, int]:
        size, path = sum(move.full.nbytes for move in task), task[0].full.path
        seen[size, path] += 1
        return -size, seen[size, path]

    return sorted(tasks, key=place)


class _StoppedError(Exception):
    """Another worker failed or the user interrupted."""


@dataclass
class _Stop:
    """Whether the workers are to end at their next block."""

    asked: bool = False

    def ask(self) -> None:
        self.asked = True


@contextmanager
def _ended_between_blocks(stop: _Stop) -> Iterator[None]:
    """A signal asks the workers to end; it is raised when they have."""
    with held_back(stop.ask) as heard:
        try:
            yield
        except _StoppedError:
            if not heard():
                raise


# ------------------------------------------------------------------------------------------------------------- work


class _Block(NamedTuple):
    """The same memory as elements [n] of a tensor, unsigned integers of their size, and as bytes."""

    elements: Array
    bytes: memoryview

    def window(self, run: Run, strides: Sequence[int], start: int = 0) -> Array:
        """Elements in the sizes of a run, with `strides`, from element `start` on."""
        itemsize = self.elements.itemsize
        in_bytes = [stride * itemsize for stride in strides]
        return np.ndarray(run.sizes, self.elements.dtype, self.elements.data, start * itemsize, in_bytes)


class _Buffer:
    """Bytes that are used again for every block; grows to the largest one."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, count: int, dtype: DType) -> _Block:
        needed = count * dtype.itemsize
        if needed > len(self._bytes):
            self._bytes = bytearray(needed)
        elements = np.ndarray((count,), unsigned(dtype.itemsize), self._bytes)
        return _Block(elements, memoryview(self._bytes)[:needed])


@dataclass
class _Checksum:
    """CRC-32 of a tensor that is written from its start to its end."""

    value: int = 0
    position: int = 0

    def add(self, offset: int, data: memoryview) -> None:
        if offset != self.position:
            raise ValueError(f"checksummed bytes out of order: at {offset}, expected {self.position}")
        self.value = crc32(data, self.value)
        self.position += len(data)


@dataclass
class _Worker:
    """One thread's files and buffers."""

    files: WriteBehind
    progress: Progress
    stop: _Stop
    block: _Buffer = field(default_factory=_Buffer)
    kept: _Buffer = field(default_factory=_Buffer)
    scratch: _Buffer = field(default_factory=_Buffer)
    uncast: _Buffer = field(default_factory=_Buffer)
    wide: _Buffer = field(default_factory=_Buffer)
    casts: dict[tuple[DType, DType], Cast] = field(default_factory=dict)

    def advance(self, count: int) -> None:
        """Reports bytes of the full tensors done; raises _StoppedError when there is no use in going on."""
        self.progress(count)
        if self.stop.asked:
            raise _StoppedError

    def read_part(self, run: Run, block: _Block, begin: int) -> None:
        """Fills what a run covers of a block, elements from `begin` on of a full tensor, from the run's part."""
        part, itemsize = run.tensor, run.tensor.dtype.itemsize
        start, offset = run.full - begin, part.offset + run.part * itemsize
        if run.in_one_piece:
            self.files.read(part.path, offset, block.bytes[start * itemsize : (start + run.numel) * itemsize])
            return
        scratch = self.scratch.take(run.part_span, part.dtype)
        self.files.read(part.path, offset, scratch.bytes)
        source = scratch.window(run, [axis.part for axis in run.axes])
        np.copyto(block.window(run, [axis.full for axis in run.axes], start), source)

    def write_part(self, run: Run, block: _Block, begin: int, checksum: _Checksum) -> None:
        """Writes what a run covers of a block, elements from `begin` on of a full tensor, into the run's part."""
        part, itemsize = run.tensor, run.tensor.dtype.itemsize
        start = run.full - begin
        if run.in_one_piece:
            content = block.bytes[start * itemsize : (start + run.numel) * itemsize]
        else:
            if run.part_span != run.numel:
                raise ValueError(f"rows of {part.name} do not lie in one piece")
            scratch = self.scratch.take(run.numel, part.dtype)
            source = block.window(run, [axis.full for axis in run.axes], start)
            np.copyto(scratch.window(run, [axis.part for axis in run.axes]), source)
            content = scratch.bytes
        checksum.add(run.part * itemsize, content)
        self.files.write(part.path, part.offset + run.part * itemsize, content)

    def gathered(self, move: Move, runs: Sequence[Run], begin: int, end: int) -> tuple[_Block, Loss]:
        """Elements [begin, end) of the full tensor as parts, transform and cast give them."""
        source, target = runs[0].tensor.dtype, move.full.dtype
        block = self.block.take(end - begin, target)
        as_they_are = source is target and move.transform is None
        gathered = block if as_they_are else self.uncast.take(end - begin, source)
        for run in runs:
            for piece in run.within(begin, end):
                self.read_part(piece, gathered, begin)
        if as_they_are:
            return block, Loss()
        if move.transform is None:
            return block, self.cast(source, target)(gathered.elements, block.elements)
        wide = self.wide.take(end - begin, FLOAT32).elements
        loss = self.cast(source, FLOAT32)(gathered.elements, wide)
        move.transform(wide.view(np.float32).reshape(-1, *move.full.shape[1:]))
        return block, loss + self.cast(FLOAT32, target)(wide, block.elements)

    def cast(self, source: DType, target: DType) -> Cast:
        if (source, target) not in self.casts:
            self.casts[source, target] = Cast(source, target)
        return self.casts[source, target]


def _blocks(move: Move, dtype: DType) -> Iterator[tuple[int, int]]:
    """Element ranges of the full tensor: whole rows, about BLOCK_BYTES each as `dtype`."""
    total = math.prod(move.full.shape)
    row = total // move.full.shape[0] if total else 1
    rows = max(1, BLOCK_BYTES // (row * dtype.itemsize))
    for begin in range(0, total, rows * row):
        yield begin, min(total, begin + rows * row)


def _gather(worker: _Worker, task: Task) -> dict[str, Loss]:
    losses: dict[str, Loss] = {}
    for move in task:
        for _, _, loss in _gathered_blocks(worker, move):
            losses[move.full.name] = losses.get(move.full.name, Loss()) + loss
    worker.files.hand_over()
    return losses


def _gathered_blocks(worker: _Worker, move: Move) -> Iterator[tuple[int, memoryview, Loss]]:
    """Writes a full tensor from its parts; (offset in it, bytes, what casting lost) of each block that was written."""
    full, runs = move.full, [as_run(pair) for pair in move.pairs]
    for begin, end in _blocks(move, runs[0].tensor.dtype):
        block, loss = worker.gathered(move, runs, begin, end)
        offset = begin * full.dtype.itemsize
        worker.files.write(full.path, full.offset + offset, block.bytes)
        yield offset, block.bytes, loss
        worker.advance(len(block.bytes))


def _scatter(worker: _Worker, task: Task) -> dict[StoredTensor, _Checksum]:
    checksums: dict[StoredTensor, _Checksum] = {}
    for move in task:
        if move.back:
            checksum = checksums.setdefault(move.full, _Checksum())
            for offset, written, _ in _gathered_blocks(worker, move):
                checksum.add(offset, written)
            continue
        runs = [as_run(pair) for pair in move.pairs]
        for begin, end, block in _full_blocks(worker, move):
            for run in runs:
                for piece in run.within(begin, end):
                    worker.write_part(piece, block, begin, checksums.setdefault(run.tensor, _Checksum()))
            worker.advance(len(block.bytes))
    worker.files.hand_over()
    return checksums


def _full_blocks(worker: _Worker, move: Move) -> Iterator[tuple[int, int, _Block]]:
    """The blocks of a full tensor: read, or gathered where it lies in no file."""
    full, source = move.full, move.source
    runs = [] if source is None else [as_run(pair) for pair in source.pairs]
    for begin, end in _blocks(move, full.dtype):
        if source is not None:
            yield begin, end, worker.gathered(source, runs, begin, end)[0]
            continue
        block = worker.block.take(end - begin, full.dtype)
        worker.files.read(full.path, full.offset + begin * full.dtype.itemsize, block.bytes)
        yield begin, end, block


def _differing(worker: _Worker, task: Task) -> list[Move]:
    return [move for move in task if not _holds_its_parts(worker, move)]


def _holds_its_parts(worker: _Worker, move: Move) -> bool:
    """Whether a full tensor, as it lies in its file or as it would be gathered, is what its parts say."""
    runs = [as_run(pair) for pair in move.pairs]
    for begin, end, full in _full_blocks(worker, move):
        worker.block, worker.kept = worker.kept, worker.block
        parts, _ = worker.gathered(move, runs, begin, end)
        worker.advance(len(full.bytes))
        if not np.array_equal(full.elements, parts.elements):  # as bits: NaN equals itself
            return False
    return True
