"""The file format of torch.save (.pt, .bin): a zip archive of a pickle and of the bytes of its tensors.

    [ local header | stem/data.pkl     ]  pickle: name -> _rebuild_tensor_v2(storage id, offset, shape, strides)
    [ local header | stem/byteorder    ]  "little"
    [ local header | pad | stem/data/0 ]  the elements of storage 0, stored (never compressed), 64-byte aligned
    [ ...                              ]
    [ local header | stem/version      ]  "3"
    [ central directory: name, CRC-32, size, position of every record ][ end records ]

Reading runs no pickled code (plain_pickle). Tensors are found, not loaded.
Sources: the zip application note (APPNOTE 6.3), torch's notes on serialization.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LONGEST, ConversionError, naming, shown
from .checksums import crc32
from .kinds import check_regular
from .open_files import BLOCK_BYTES
from .plain_pickle import PickledStorage, PickledTensor, PickleError, dumps, dumps_state_dict, loads
from .views import MAX_DIMENSIONS, StoredTensor, TensorSpec, contiguous_strides

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
ZIP64_END = struct.Struct("<4sQ2H2I4Q")
ZIP64_LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")
ZIP64_LIMIT = 0xFFFFFFFF
UTF8_NAMES = 0x800
EARLIEST_DATE = 0x21
"""1 January 1980: a fixed date keeps the same tensors the same file."""
TENSOR_ALIGNMENT = 64
LARGEST = (1 << 63) - 1
"""No file position, size or stride is larger."""


# ---------------------------------------------------------------------------------------------------------- reading


def read_state_dict(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a saved state dict by name; ConversionError where the file holds anything else."""
    content, records = _read_pickle(path)
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected a dict of tensors by name.")
    return {name: _stored(path, name, value, records) for name, value in content.items()}


def read_plain_dict(path: Path) -> dict[str, Any]:
    """A saved dict of plain values (a model configuration); ConversionError where the file holds anything else."""
    content, _ = _read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected a dict of settings by name.")
    return dict(content)


def check_records(path: Path) -> None:
    """Reads every record and compares its CRC-32; ConversionError names the first that differs."""
    try:
        with naming(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
            damaged = next((info.filename for info in archive.infolist() if _checksum(file, info) != info.CRC), None)
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises many kinds of errors
        raise ConversionError(
            f"{path} is damaged ({error!s:.{LONGEST}}). Copy it again from where it was saved."
        ) from error
    if damaged is not None:
        raise ConversionError(
            f"{path} is damaged: the checksum of its record {shown(damaged)} does not fit. Copy it again."
        )


def _checksum(file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """CRC-32 of a record as it lies in the file."""
    position, left = _locate(file, info)
    file.seek(position)
    block, value = memoryview(bytearray(min(left, BLOCK_BYTES))), 0
    while left:
        count = file.readinto(block[:left])
        if not count:
            raise zipfile.BadZipFile(f"record {shown(info.filename)} ends before its size")
        value, left = crc32(block[:count], value), left - count
    return value


class _Record(NamedTuple):
    position: int
    size: int


def _read_pickle(path: Path) -> tuple[Any, dict[str, _Record]]:
    """The unpickled content and the tensor storages by key."""
    check_regular(path)
    try:
        with naming(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            located = {info.filename: _locate(file, info) for info in infos}
            pickles = [info.filename for info in infos if info.filename.split("/", 1)[-1] == "data.pkl"]
            if len(located) != len(infos) or len(pickles) != 1:
                raise zipfile.BadZipFile("it has not each record once, data.pkl among them")
            prefix = pickles[0].removesuffix("data.pkl")
            content = archive.read(pickles[0])
            if prefix + "byteorder" in located and archive.read(prefix + "byteorder") != b"little":
                raise ConversionError(f"{path} was saved on a big-endian machine, which is not supported.")
            data = prefix + "data/"
            records = {name.removeprefix(data): at for name, at in located.items() if name.startswith(data)}
    except (ConversionError, OSError, MemoryError):
        raise
    except Exception as error:  # a damaged archive raises many kinds of errors
        raise _unreadable(path, error) from error
    try:
        return loads(content), records
    except PickleError as error:
        raise ConversionError(
            f"{path} is not a file of tensors or settings that can be trusted: {error}. Nothing in it was run."
        ) from error


def _unreadable(path: Path, error: Exception) -> ConversionError:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x80\x02":
        return ConversionError(
            f"{path} is in the format that torch.save had before torch 1.6. Save it again with a newer torch."
        )
    return ConversionError(
        f"{path} is not a whole torch.save file ({str(error)[:LONGEST] or type(error).__name__}): it is empty, "
        "truncated or damaged. Copy it again from where it was saved."
    )


def _locate(file: io.BufferedReader, info: zipfile.ZipInfo) -> _Record:
    """Where a stored record's bytes lie: behind its local header, which repeats its name."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise zipfile.BadZipFile(f"record {shown(info.filename)} is compressed")
    if info.header_offset < 0:
        raise zipfile.BadZipFile(f"record {shown(info.filename)} starts before the file")
    file.seek(info.header_offset)
    fields = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    name = file.read(fields[-2]).decode("utf-8" if fields[2] & UTF8_NAMES else "cp437")
    position = info.header_offset + LOCAL_HEADER.size + fields[-2] + fields[-1]
    found = fields[0] == b"PK\x03\x04" and name == info.orig_filename
    if not found or position + info.file_size > os.fstat(file.fileno()).st_size:
        raise zipfile.BadZipFile(f"record {shown(info.filename)} is not where the directory says")
    return _Record(position, info.file_size)


def _stored(path: Path, name: object, value: object, records: Mapping[str, _Record]) -> StoredTensor:
    if not isinstance(name, str) or type(value) is not PickledTensor:
        raise ConversionError(f"{path} holds {shown(value)} under {shown(name)}, expected only tensors by name.")
    storage, dtype = value.storage, value.storage.dtype
    numbers = (value.offset, *value.shape, *value.strides, storage.numel)
    well_formed = all(type(number) is int and 0 <= number <= LARGEST for number in numbers)
    if not well_formed or len(value.shape) > MAX_DIMENSIONS or len(value.shape) != len(value.strides):
        raise ConversionError(f"{path}: tensor {shown(name)} has a shape or position that no tensor has.")
    record = records.get(storage.key)
    if record is None or record.size != storage.numel * dtype.itemsize:
        found = "no record" if record is None else f"a record of {record.size} bytes"
        raise ConversionError(
            f"{path}: tensor {shown(name)} needs {storage.numel * dtype.itemsize} bytes in storage "
            f"{shown(storage.key)}, found {found}. The file is damaged; copy it again."
        )
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.strides, strict=True))
    if 0 not in value.shape and value.offset + last >= storage.numel:
        raise ConversionError(
            f"{path}: tensor {shown(name)} reaches beyond its storage. The file is damaged; copy it again."
        )
    offset = record.position + value.offset * dtype.itemsize
    return StoredTensor(name, path, offset, dtype, value.shape, value.strides)


# ---------------------------------------------------------------------------------------------------------- writing


def write_plain_dict(path: Path, content: Mapping[str, Any]) -> None:
    """Saves a dict of plain values as torch.save does; a DType becomes torch's."""
    writer = TorchFileWriter(path, (), dumps(dict(content)))
    writer.create()
    writer.seal({})


@dataclass
class _Entry:
    """One record of the archive that is being written; `content` is None where the tensor's bytes go."""

    name: bytes
    size: int
    content: bytes | None
    header: int = 0
    data: int = 0
    crc: int = 0

    def place(self, position: int, alignment: int) -> int:
        """Fixes where header and data lie, from `position` on; returns the record's end."""
        self.header = position
        data = position + LOCAL_HEADER.size + len(self.name) + len(self._zip64()) + 4
        self.data = data + -data % alignment
        return self.data + self.size

    def _zip64(self, with_position: bool = False) -> bytes:
        sizes = (self.size, self.size) if self.size >= ZIP64_LIMIT else ()
        numbers = (*sizes, self.header) if with_position and self.header >= ZIP64_LIMIT else sizes
        return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""

    def local_header(self) -> bytes:
        zip64 = self._zip64()
        fixed = LOCAL_HEADER.size + len(self.name) + len(zip64) + 4
        padding = self.data - self.header - fixed
        extra = zip64 + struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        size = min(self.size, ZIP64_LIMIT)
        return (
            LOCAL_HEADER.pack(
                b"PK\x03\x04",
                45,
                UTF8_NAMES,
                0,
                0,
                EARLIEST_DATE,
                self.crc,
                size,
                size,
                len(self.name),
                len(extra),
            )
            + self.name
            + extra
        )

    def central_header(self) -> bytes:
        extra = self._zip64(with_position=True)
        size, position = min(self.size, ZIP64_LIMIT), min(self.header, ZIP64_LIMIT)
        fields = (
            45,
            45,
            UTF8_NAMES,
            0,
            0,
            EARLIEST_DATE,
            self.crc,
            size,
            size,
            len(self.name),
            len(extra),
            0,
            0,
            0,
        )
        return CENTRAL_HEADER.pack(b"PK\x01\x02", *fields, 0, position) + self.name + extra


def _state_dict(specs: Sequence[TensorSpec], second_names: Mapping[str, str]) -> bytes:
    """The pickle of tensors that each fill a storage of their own, some of them under a second name too."""
    storages = (PickledStorage(str(i), spec.dtype, spec.numel) for i, spec in enumerate(specs))
    tensors = {
        spec.name: PickledTensor(storage, 0, spec.shape, contiguous_strides(spec.shape))
        for spec, storage in zip(specs, storages, strict=True)
    }
    return dumps_state_dict(tensors | {second: tensors[name] for name, second in second_names.items()})


class TorchFileWriter:
    """A torch.save file whose layout is known before its tensors are written.

    `tensors` says where each one goes; `seal` adds the checksums of what was written there and closes the archive.
    A tensor may be saved under a second name as well, for the same bytes: `content` has both.
    """

    def __init__(
        self,
        path: Path,
        specs: Sequence[TensorSpec],
        pickled: bytes | None = None,
        second_names: Mapping[str, str] | None = None,
    ) -> None:
        """`pickled` is what the file says; by default a state dict of `specs`, with the second names of some."""
        stem = path.stem
        names = {spec.name for spec in specs}
        seconds = {name: second for name, second in (second_names or {}).items() if name in names}
        pickled = _state_dict(specs, seconds) if pickled is None else pickled
        first = [self._small(stem, "data.pkl", pickled), self._small(stem, "byteorder", b"little")]
        data = [_Entry(f"{stem}/data/{i}".encode(), spec.nbytes, None) for i, spec in enumerate(specs)]
        self._entries = [*first, *data, self._small(stem, "version", b"3\n")]
        self._records = {spec.name: entry for spec, entry in zip(specs, data, strict=True)}
        position = 0
        for entry in self._entries:
            position = entry.place(position, TENSOR_ALIGNMENT if entry.content is None else 1)
        self._directory = position
        self.path = path
        self.size = position + len(self._closing())
        self.tensors = {
            spec.name: StoredTensor(spec.name, path, entry.data, spec.dtype, spec.shape, contiguous_strides(spec.shape))
            for spec, entry in zip(specs, data, strict=True)
        }
        again = {second: replace(self.tensors[name], name=second) for name, second in seconds.items()}
        self.content = self.tensors | again

    @staticmethod
    def _small(stem: str, name: str, content: bytes) -> _Entry:
        return _Entry(f"{stem}/{name}".encode(), len(content), content, crc=crc32(content))

    def create(self) -> None:
        """Makes the file at its full size."""
        with naming(self.path), self.path.open("xb") as file:
            file.truncate(self.size)

    def seal(self, checksums: Mapping[str, int]) -> None:
        """Writes the headers and the directory; `checksums` has the CRC-32 of every tensor's bytes by name."""
        for name, entry in self._records.items():
            entry.crc = checksums[name]
        with naming(self.path), self.path.open("r+b") as file:
            for entry in self._entries:
                file.seek(entry.header)
                file.write(entry.local_header() + (entry.content or b""))
            file.seek(self._directory)
            file.write(self._closing())

    def _closing(self) -> bytes:
        """The central directory and the end records, the 64-bit ones always: one form for every size."""
        directory = b"".join(entry.central_header() for entry in self._entries)
        count, size, start = len(self._entries), len(directory), self._directory
        end64 = ZIP64_END.pack(b"PK\x06\x06", ZIP64_END.size - 12, 45, 45, 0, 0, count, count, size, start)
        locator = ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
        short_count, short_start = min(count, 0xFFFF), min(start, ZIP64_LIMIT)
        end = END.pack(b"PK\x05\x06", 0, 0, short_count, short_count, size, short_start, 0)
        return directory + end64 + locator + end
