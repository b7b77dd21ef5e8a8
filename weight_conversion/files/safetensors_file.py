"""The safetensors format: one file of tensors that can be mapped into memory.

    [ 8 bytes: header length n, little endian ][ n bytes: JSON header, padded with spaces ][ tensors, back to back ]
    header: {"__metadata__": {"format": "pt"}, name: {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}}

Offsets count from the end of the header. Files are laid out as the safetensors library does it (element types from
wide to narrow, then by name), so they are the same to the byte as `save_pretrained` writes.
Source: the format's documentation in the safetensors project.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import LONGEST, ConversionError, naming, shown
from .dtypes import DTYPES
from .kinds import check_regular
from .views import MAX_DIMENSIONS, StoredTensor, TensorSpec, contiguous_strides

BY_SAFETENSORS_NAME = {dtype.safetensors: dtype for dtype in DTYPES}

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000
"""The limit of the safetensors library: a larger header is a damaged file."""
MAX_TENSORS = 100_000
"""No model has more: a file that says so is refused before time goes into reading it."""
ALIGNMENT = 8


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; ConversionError where the header does not describe the file to the byte."""
    check_regular(path)
    size = path.stat().st_size
    with naming(path), path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(MAX_HEADER, size - LENGTH_BYTES):
            raise _broken(path, f"its header of {length} bytes does not fit a file of {size} bytes")
        text = file.read(length)
    if text.count(b"{") > MAX_TENSORS:
        raise _broken(path, f"its header describes more than {MAX_TENSORS} tensors")
    try:
        header = json.loads(text, object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({error!s:.{LONGEST}})") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    start = LENGTH_BYTES + length
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    _check_coverage(path, list(tensors.values()), start, size)
    return tensors


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = BY_SAFETENSORS_NAME[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"the entry of tensor {shown(name)} is not one of a tensor: {shown(entry)}") from error
    if len(shape) > MAX_DIMENSIONS:
        raise _broken(path, f"tensor {shown(name)} has {len(shape)} dimensions")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
        raise _broken(path, f"tensor {shown(name)} has a negative or fractional size or offset: {shown(entry)}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _broken(
            path, f"tensor {shown(name)} of shape {shown(list(shape))} and {dtype} does not fill {end - begin} bytes"
        )
    return StoredTensor(name, path, start + begin, dtype, shape, contiguous_strides(shape))


def _check_coverage(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """The tensors must fill the file from the header to its end, back to back."""
    position = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            raise _broken(path, f"tensor {shown(tensor.name)} starts at byte {tensor.offset}, expected {position}")
        position += tensor.nbytes
    if position != size:
        raise _broken(path, f"its tensors end at byte {position}, the file at byte {size}: it is truncated or damaged")


def _broken(path: Path, what: str) -> ConversionError:
    return ConversionError(f"{path} is not a whole safetensors file: {what}. Copy or download it again.")


class SafetensorsWriter:
    """A safetensors file whose layout is known before its tensors are written.

    `tensors` says where each one goes.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for spec in ordered:
            end = position + spec.nbytes
            entries[spec.name] = {
                "dtype": spec.dtype.safetensors,
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            position = end
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % ALIGNMENT)
        start = LENGTH_BYTES + len(header)
        self.path = path
        self.size = start + position
        self._header = len(header).to_bytes(LENGTH_BYTES, "little") + header
        self.tensors = {
            spec.name: StoredTensor(
                spec.name,
                path,
                start + entries[spec.name]["data_offsets"][0],
                spec.dtype,
                spec.shape,
                contiguous_strides(spec.shape),
            )
            for spec in ordered
        }

    def create(self) -> None:
        """Makes the file at its full size and writes the header."""
        with naming(self.path), self.path.open("xb") as file:
            file.truncate(self.size)
            file.write(self._header)
