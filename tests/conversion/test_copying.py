"""What copying promises beside the right bytes: the disk works meanwhile, and checksums are those of zlib."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weight_conversion.files import open_files
from weight_conversion.files.copying import Copier
from weight_conversion.files.dtypes import FLOAT32
from weight_conversion.files.moves import Move
from weight_conversion.files.views import StoredTensor, contiguous_strides

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20
Range = tuple[Path, int, int]


def stored(path: Path, name: str, offset: int, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, path, offset, FLOAT32, shape, contiguous_strides(shape))


def halves(folder: Path, dim: int) -> list[Move]:
    """Two tensors [1536, 1024] of 6 MiB in one file, of which each rank's file holds a half along `dim`."""
    moves = []
    for number in range(2):
        full = stored(folder / "full", f"full{number}", 64 + number * 6 * MIB, (1536, 1024))
        part_shape = (768, 1024) if dim == 0 else (1536, 512)
        parts = [stored(folder / f"rank{r}", f"part{number}", 128 + number * 3 * MIB, part_shape) for r in range(2)]
        pairs = zip(full.view().chunk(2, dim), (part.view() for part in parts), strict=True)
        moves.append(Move(full, tuple(pairs)))
    return moves


def fill(tensors: list[StoredTensor]) -> None:
    for path, group in itertools.groupby(tensors, lambda tensor: tensor.path):
        path.write_bytes(os.urandom(max(tensor.offset + tensor.nbytes for tensor in group)))


def make_files(moves: list[Move]) -> None:
    fill([move.full for move in moves])
    for rank in range(2):
        fill([move.pairs[rank][1].tensor for move in moves])


def content(tensor: StoredTensor) -> bytes:
    return tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def assert_gathered(moves: list[Move], dim: int) -> None:
    for move in moves:
        full, *parts = (
            torch.frombuffer(bytearray(content(tensor)), dtype=torch.int32).view(tensor.shape)
            for tensor in (move.full, *(part.tensor for _, part in move.pairs))
        )
        assert torch.equal(full, torch.cat(parts, dim))


def recorded_advice(monkeypatch: pytest.MonkeyPatch) -> list[Range]:
    """What posix_fadvise is called with from here on."""
    ranges: list[Range] = []

    def advise(descriptor: int, offset: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        ranges.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), offset, offset + count))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return ranges


def joined(ranges: list[Range]) -> list[Range]:
    """Ranges that touch made one; ValueError where two overlap."""
    result: list[Range] = []
    for path, begin, end in sorted(ranges):
        if result and result[-1][0] == path and begin < result[-1][2]:
            raise ValueError(f"byte {begin} of {path} twice")
        if result and result[-1][0] == path and begin == result[-1][2]:
            result[-1] = (path, result[-1][1], end)
        else:
            result.append((path, begin, end))
    return result


@pytest.mark.parametrize("dim", [0, 1])
def test_every_byte_is_handed_to_the_disk_once(dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "WRITE_BEHIND_BYTES", 2 * MIB)
    moves = halves(tmp_path, dim)
    make_files(moves)
    ranges = recorded_advice(monkeypatch)
    Copier(lambda _: None).gather([[move] for move in moves])
    assert len(ranges) > len(moves)  # not only when a tensor is complete
    assert joined(ranges) == [(tmp_path / "full", 64, 64 + 12 * MIB)]

    ranges.clear()
    Copier(lambda _: None).scatter([[move] for move in moves])
    assert len(ranges) > 2 * len(moves)
    assert joined(ranges) == [(tmp_path / f"rank{rank}", 128, 128 + 6 * MIB) for rank in range(2)]


@pytest.mark.parametrize("dim", [0, 1])
def test_a_file_system_without_advice_gets_the_same_bytes(
    dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    moves = halves(tmp_path, dim)
    make_files(moves)
    Copier(lambda _: None).gather([[move] for move in moves])
    assert_gathered(moves, dim)


@pytest.mark.parametrize("dim", [0, 1])
def test_checksums_are_those_of_zlib(dim: int, tmp_path: Path) -> None:
    moves = halves(tmp_path, dim)
    make_files(moves)
    checksums = Copier(lambda _: None).scatter([[move] for move in moves])
    tensors = [part.tensor for move in moves for _, part in move.pairs]
    assert {(t.path, t.name): zlib.crc32(content(t)) for t in tensors} == {
        (path, name): value for path, names in checksums.items() for name, value in names.items()
    }


def test_without_isal_the_checksums_are_zlibs() -> None:
    program = (
        "import sys; sys.modules['isal'] = None; from weight_conversion.files.checksums import crc32; print(crc32)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "<built-in function crc32>"


@pytest.mark.parametrize("method", [Copier.gather, Copier.scatter])
def test_a_disk_that_fails_ends_the_copying_with_the_path(
    method: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = halves(tmp_path, 0)
    make_files(moves)
    written: list[int] = []
    pwrite = os.pwrite

    def fail_at_third(descriptor: int, data: memoryview, offset: int) -> int:
        written.append(offset)
        if len(written) >= 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fail_at_third)
    with pytest.raises(OSError, match="Input/output error") as raised:
        method(Copier(lambda _: None), [[move] for move in moves])
    assert Path(str(raised.value.filename)).parent == tmp_path


def test_an_interrupt_while_the_disk_is_slow_does_not_wait_for_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when everything is copied, and the disk still has to begin with most of it."""
    monkeypatch.setattr(open_files, "WRITE_BEHIND_BYTES", MIB)
    moves = halves(tmp_path, 0)
    make_files(moves)
    begun: list[int] = []
    copied = 0

    def advise(_descriptor: int, offset: int, _count: int, _advice: int) -> None:
        begun.append(offset)
        while copied < 12 * MIB:  # what the disk is slow with
            time.sleep(0.01)
        if len(begun) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # for the main thread to hear it

    def progress(count: int) -> None:
        nonlocal copied
        copied += count

    monkeypatch.setattr(os, "posix_fadvise", advise)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Copier(progress).gather([moves])
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(begun) == 1  # of twelve ranges


@pytest.mark.parametrize("dim", [0, 1])
def test_without_a_thread_for_the_disk_the_bytes_are_copied(
    dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def only_from_main(thread: threading.Thread) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("can't start new thread")
        start(thread)

    moves = halves(tmp_path, dim)
    make_files(moves)
    ranges = recorded_advice(monkeypatch)
    monkeypatch.setattr(threading.Thread, "start", only_from_main)
    Copier(lambda _: None).gather([[move] for move in moves])
    assert not ranges
    assert_gathered(moves, dim)


def test_a_full_tensor_that_lies_in_no_file_is_gathered_block_by_block(tmp_path: Path) -> None:
    """From the halves of its rows to the halves of its columns; a part that is not what its source says is told."""
    rows, columns = tmp_path / "rows", tmp_path / "columns"
    for folder in (rows, columns):
        folder.mkdir()
    fulls = [stored(tmp_path, f"full{number}", 0, (1536, 1024)) for number in range(2)]
    sources = [Move(full, move.pairs) for full, move in zip(fulls, halves(rows, 0), strict=True)]
    targets = [Move(one.full, halves(columns, 1)[n].pairs, source=one) for n, one in enumerate(sources)]
    fill([part.tensor for n in range(2) for _, part in halves(rows, 0)[n].pairs])
    for rank in range(2):
        (columns / f"rank{rank}").write_bytes(bytes(128 + 2 * 3 * MIB))
    tasks = [[move] for move in targets]
    checksums = Copier(lambda _: None).scatter(tasks)
    for number in range(2):
        halves_of_rows = [torch_of(rows / f"rank{r}", number, (768, 1024)) for r in range(2)]
        halves_of_columns = [torch_of(columns / f"rank{r}", number, (1536, 512)) for r in range(2)]
        assert torch.equal(torch.cat(halves_of_rows, 0), torch.cat(halves_of_columns, 1))
        for rank, part in enumerate(halves_of_columns):
            assert checksums[columns / f"rank{rank}"][f"part{number}"] == zlib.crc32(part.numpy().tobytes())
    assert Copier(lambda _: None).differences(tasks) == []
    content = bytearray((columns / "rank1").read_bytes())
    content[128 + 5 * MIB] ^= 1
    (columns / "rank1").write_bytes(content)
    assert Copier(lambda _: None).differences(tasks) == [targets[1]]


def torch_of(path: Path, number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A part as unsigned numbers, which are equal where their bits are."""
    content = path.read_bytes()[128 + number * 3 * MIB :][: 3 * MIB]
    return torch.frombuffer(bytearray(content), dtype=torch.int32).view(shape)
