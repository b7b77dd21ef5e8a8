"""The safetensors format: both ways against the safetensors library, and every header that lies is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.faults.fault_harness import quick_folder
from tests.support.tensors import load, our_type, random_tensor, same, torch_type
from weight_conversion.errors import ConversionError
from weight_conversion.files.dtypes import DTYPES
from weight_conversion.files.safetensors_file import MAX_HEADER, SafetensorsWriter, read_header
from weight_conversion.files.views import TensorSpec

TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=30).filter(lambda name: name != "__metadata__"),
    st.builds(
        random_tensor,
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.sampled_from([torch_type(dtype) for dtype in DTYPES if "float8" not in dtype.name]),
        st.integers(0, 99),
    ),
    max_size=6,
)


def write(path: Path, state: dict[str, torch.Tensor]) -> SafetensorsWriter:
    writer = SafetensorsWriter(path, [TensorSpec(name, tuple(t.shape), our_type(t.dtype)) for name, t in state.items()])
    writer.create()
    with path.open("r+b") as file:
        for name, tensor in state.items():
            file.seek(writer.tensors[name].offset)
            file.write(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))
    return writer


@settings(max_examples=60, deadline=None)
@given(TENSORS)
def test_what_the_library_saved_is_found(state: dict[str, torch.Tensor]) -> None:
    with quick_folder() as folder:
        save_file(state, folder / "model.safetensors")
        found = read_header(folder / "model.safetensors")
        assert found.keys() == state.keys()
        assert all(same(load(found[name]), tensor) for name, tensor in state.items())


@settings(max_examples=60, deadline=None)
@given(TENSORS)
def test_the_library_reads_what_is_written(state: dict[str, torch.Tensor]) -> None:
    with quick_folder() as folder:
        path = folder / "model.safetensors"
        writer = write(path, state)
        assert path.stat().st_size == writer.size
        assert read_header(path) == writer.tensors
        by_library = load_file(path)
        assert by_library.keys() == state.keys()
        assert all(same(by_library[name], tensor) for name, tensor in state.items())
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@settings(max_examples=60, deadline=None)
@given(TENSORS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_file_of_one_type_is_the_library_s_to_the_byte(state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    with quick_folder() as folder:
        write(folder / "ours.safetensors", state)
        save_file(state, folder / "theirs.safetensors", metadata={"format": "pt"})
        assert (folder / "ours.safetensors").read_bytes() == (folder / "theirs.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------ damaged files

A, B = ("a", [2, 3], [0, 24]), ("b", [4], [24, 40])


def header(*entries: tuple[str, list[int], list[int]], **more: Any) -> dict[str, Any]:
    named = {name: {"dtype": "F32", "shape": shape, "data_offsets": offsets} for name, shape, offsets in entries}
    return named | more


def file_of(path: Path, content: dict[str, Any] | bytes, nbytes: int = 40, length: int | None = None) -> Path:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(nbytes))
    return path


def entry(**changes: Any) -> dict[str, Any]:
    """The header of A and B with some parts of A's entry changed."""
    found = header(A, B)
    found["a"] |= changes
    return found


def test_the_unchanged_header_is_read(tmp_path: Path) -> None:
    assert read_header(file_of(tmp_path / "f", header(A, B)))["b"].shape == (4,)
    assert read_header(file_of(tmp_path / "f", header(B, A, __metadata__={"a": "b"}))).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("content", "nbytes", "words"),
    [
        (header(A, ("b", [4], [20, 36])), 40, ["'b'", "starts at byte", "expected"]),  # overlapping
        (header(A, ("b", [6], [0, 24])), 40, ["starts at byte"]),  # the same bytes twice
        (header(A, ("b", [4], [28, 44])), 44, ["'b'", "starts at byte"]),  # a hole
        (header(A, ("b", [8], [24, 56])), 40, ["end at byte", "truncated"]),  # too long
        (header(A, ("b", [4], [24, 1 << 62])), 40, ["'b'", "does not fill"]),
        (header(A, ("b", [1 << 60], [24, 24 + (1 << 62)])), 40, ["end at byte"]),
        (header(A), 40, ["end at byte"]),  # too short for the file
        (header(A, B), 39, ["truncated"]),
        (header(A, B), 41, ["truncated or damaged"]),
        (header(A, B), 0, ["truncated"]),
        (header(), 1, ["end at byte"]),
        (entry(data_offsets=[24, 0]), 40, ["does not fill"]),
        (entry(data_offsets=[-24, 0]), 40, ["negative"]),
        (entry(data_offsets=[0, 24, 40]), 40, ["'a'"]),
        (entry(data_offsets=[0.0, 24.0]), 40, ["fractional"]),
        (entry(data_offsets="24"), 40, ["'a'"]),
        (entry(data_offsets=None), 40, ["'a'"]),
        (entry(data_offsets={}), 40, ["'a'"]),
        (entry(data_offsets=[0, 10**4000]), 40, ["'a'"]),
        (entry(shape=[3, 3]), 40, ["does not fill 24 bytes"]),
        (entry(shape=[-2, -3]), 40, ["negative"]),
        (entry(shape=[True, 6]), 40, ["fractional"]),
        (entry(shape="ab"), 40, ["'a'"]),
        (entry(shape=6), 40, ["'a'"]),
        (entry(shape=[[2], 3]), 40, ["'a'"]),
        (entry(dtype="F33"), 40, ["F33"]),
        (entry(dtype="BF16"), 40, ["does not fill"]),
        (entry(dtype=["F32"]), 40, ["'a'"]),
        (entry(dtype=None), 40, ["'a'"]),
        ({"a": {}}, 0, ["'a'"]),
        ({"a": []}, 0, ["'a'"]),
        ({"a": 1}, 0, ["'a'"]),
        ({"a": None}, 0, ["'a'"]),
    ],
)
def test_a_header_that_lies_is_refused(content: dict[str, Any], nbytes: int, words: list[str], tmp_path: Path) -> None:
    path = file_of(tmp_path / "model.safetensors", content, nbytes)
    with pytest.raises(ConversionError) as refused:
        read_header(path)
    message = str(refused.value)
    assert message.startswith(f"{path} is not a whole safetensors file")
    assert all(word in message for word in words), message
    assert len(message) < 600 + len(str(path))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"1", "object"),
        (b"null", "object"),
        (b'{"a": 1} {}', "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100000, "JSON"),
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "'a'"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": {}}', "twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 4]}}', "twice"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "twice"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_header_that_is_no_table_of_tensors_is_refused(text: bytes, word: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=word):
        read_header(file_of(tmp_path / "model.safetensors", text, 4))


@pytest.mark.parametrize("length", [200, MAX_HEADER + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file_or_the_limit_is_not_read(length: int, tmp_path: Path) -> None:
    path = file_of(tmp_path / "model.safetensors", header(A, B), 40, length)
    if length == MAX_HEADER + 1:
        with path.open("r+b") as file:
            file.truncate(MAX_HEADER + 100)  # sparse
    with pytest.raises(ConversionError, match=f"its header of {length} bytes does not fit"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\0", b"\0" * 7, b"\0" * 8, b"PK\x03\x04 and more"])
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match="not a whole safetensors file"):
        read_header(tmp_path / "model.safetensors")


def test_a_file_cut_anywhere_is_refused() -> None:
    with quick_folder() as folder:
        path = folder / "model.safetensors"
        save_file({"a": torch.randn(2, 3), "b": torch.randn(4)}, path)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ConversionError):
                read_header(path)


def test_a_byte_of_the_header_changed_moves_no_tensor() -> None:
    """A change that is not told may concern a name, a type or the metadata, but never where the tensors lie."""
    with quick_folder() as folder:
        path = folder / "model.safetensors"
        save_file({"a": torch.randn(2, 3), "b": torch.randn(4)}, path, metadata={"format": "pt"})
        whole = bytearray(path.read_bytes())
        before = read_header(path)
        positions = range(8 + int.from_bytes(whole[:8], "little"))
        for position, mask in itertools.product(positions, (0x01, 0x04, 0x10, 0xFF)):
            whole[position] ^= mask
            path.write_bytes(whole)
            whole[position] ^= mask
            try:
                found = read_header(path)
            except ConversionError:
                continue
            places = sorted((tensor.offset, tensor.nbytes) for tensor in found.values())
            assert places == sorted((tensor.offset, tensor.nbytes) for tensor in before.values()), position
