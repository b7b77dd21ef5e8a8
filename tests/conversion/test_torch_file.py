"""The format of torch.save: what torch writes is found, what is written torch reads, and no pickle runs anything."""

from __future__ import annotations

import io
import itertools
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.fault_harness import quick_folder
from tests.faults.hostile_pickles import HOSTILE, hostile_surroundings, in_dict, load_carelessly, write_archive
from tests.support.tensors import load, our_type, random_tensor, same, torch_type
from weight_conversion.errors import ConversionError, shown
from weight_conversion.files import dtypes
from weight_conversion.files.torch_file import (
    TorchFileWriter,
    check_records,
    read_plain_dict,
    read_state_dict,
    write_plain_dict,
)
from weight_conversion.files.views import TensorSpec

DTYPES = [dtype for dtype in dtypes.DTYPES if dtype.storage]


def saved(tmp_path: Path, content: object, **options: Any) -> Path:
    torch.save(content, tmp_path / "file.pt", **options)
    return tmp_path / "file.pt"


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_torch_saved_are_found(dtype: dtypes.DType, tmp_path: Path) -> None:
    shapes = [(3, 5), (7,), (1, 1), (), (0,), (2, 0, 3), (2, 3, 4)]
    state = {f"t{i}": random_tensor(shape, torch_type(dtype), i) for i, shape in enumerate(shapes)}
    found = read_state_dict(saved(tmp_path, state))
    assert list(found) == list(state)
    assert all(same(load(found[name]), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    state = OrderedDict(a=torch.randn(3), b=torch.nn.Parameter(torch.randn(2, 2)))
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    found = read_state_dict(saved(tmp_path, state, pickle_protocol=protocol))
    assert all(same(load(found[name]), tensor.detach()) for name, tensor in state.items())


def test_windows_on_one_storage_are_found(tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    state = {"rows": whole[2:4], "columns": whole[:, 3:5], "turned": whole.T, "again": whole, "one": whole[5, 7]}
    found = read_state_dict(saved(tmp_path, state))
    assert all(same(load(found[name]), tensor) for name, tensor in state.items())


def test_settings_are_plain_values(tmp_path: Path) -> None:
    settings_saved = {"hidden_size": 64, "eps": 1e-5, "dtype": torch.bfloat16, "nested": {"size": torch.Size([2])}}
    found = read_plain_dict(saved(tmp_path, settings_saved))
    assert found == {**settings_saved, "dtype": dtypes.BFLOAT16}
    write_plain_dict(tmp_path / "again.pt", found)
    assert torch.load(tmp_path / "again.pt", weights_only=True) == settings_saved


# ---------------------------------------------------------------------------------------------------------- writing


def write(path: Path, state: dict[str, torch.Tensor]) -> TorchFileWriter:
    writer = TorchFileWriter(path, [TensorSpec(name, tuple(t.shape), our_type(t.dtype)) for name, t in state.items()])
    writer.create()
    checksums = {}
    with path.open("r+b") as file:
        for name, tensor in state.items():
            content = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
            file.seek(writer.tensors[name].offset)
            file.write(content)
            checksums[name] = zlib.crc32(content)
    writer.seal(checksums)
    return writer


TENSORS = st.dictionaries(
    st.text(max_size=40).filter(lambda name: name.isprintable()),
    st.builds(
        random_tensor,
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.sampled_from([torch_type(dtype) for dtype in DTYPES]),
        st.integers(0, 99),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(TENSORS)
def test_torch_reads_what_is_written(state: dict[str, torch.Tensor]) -> None:
    with quick_folder() as folder:
        path = folder / "model_tp0_pp0.pt"
        writer = write(path, state)
        assert path.stat().st_size == writer.size
        check_records(path)
        found = read_state_dict(path)
        assert found == writer.tensors
        assert all(tensor.offset % 64 == 0 for tensor in found.values())
        for options in ({}, {"mmap": True}):
            by_torch = torch.load(path, weights_only=True, **options)
            assert list(by_torch) == list(state)
            assert all(same(by_torch[name], tensor) for name, tensor in state.items())
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in by_torch.values())
            del by_torch


def test_the_same_tensors_give_the_same_file(tmp_path: Path) -> None:
    state = {"a": torch.randn(5, 3), "b": torch.randn(2)}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    paths = [tmp_path / folder / "model_tp0_pp0.pt" for folder in ("one", "two")]
    for path in paths:
        write(path, state)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_tensors_and_positions_beyond_4_gib(tmp_path: Path) -> None:
    """In a sparse file: the bytes between the marks are never stored."""
    size = (1 << 32) + 4096
    specs = [
        TensorSpec("large", (size,), dtypes.BY_NAME["uint8"]),
        TensorSpec("exactly", ((1 << 32) - 1,), dtypes.BY_NAME["uint8"]),
        TensorSpec("behind", (3,), dtypes.FLOAT32),
    ]
    path = tmp_path / "model_tp0_pp0.pt"
    writer = TorchFileWriter(path, specs)
    writer.create()
    with path.open("r+b") as file:
        file.seek(writer.tensors["large"].offset + size - 1)
        file.write(b"\x2a")
        file.seek(writer.tensors["behind"].offset)
        file.write(struct.pack("<3f", 1.0, 2.0, 3.0))
    writer.seal({"large": 1, "exactly": 2, "behind": zlib.crc32(struct.pack("<3f", 1.0, 2.0, 3.0))})
    assert read_state_dict(path) == writer.tensors
    by_torch = torch.load(path, weights_only=True, mmap=True)
    assert by_torch["large"].numel() == size
    assert by_torch["large"][-1] == 0x2A
    assert by_torch["exactly"].numel() == (1 << 32) - 1
    assert by_torch["behind"].tolist() == [1.0, 2.0, 3.0]
    with zipfile.ZipFile(path) as archive:
        assert archive.read(f"{path.stem}/data/2") == struct.pack("<3f", 1.0, 2.0, 3.0)


def test_more_records_than_16_bits_count(tmp_path: Path) -> None:
    path = tmp_path / "model_tp0_pp0.pt"
    specs = [TensorSpec(f"t{i}", (1,), dtypes.BY_NAME["uint8"]) for i in range(66000)]
    writer = TorchFileWriter(path, specs)
    writer.create()
    writer.seal(dict.fromkeys(writer.tensors, zlib.crc32(b"\0")))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 66003
        assert archive.read(f"{path.stem}/data/65999") == b"\0"


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture
def quick_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "model_tp0_pp0.pt"


def test_a_file_cut_anywhere_is_refused(quick_path: Path) -> None:
    path = quick_path
    torch.save({"a": torch.randn(2, 3), "b": torch.randn(4)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConversionError, match=r"model_tp0_pp0\.pt is not a whole torch\.save file"):
            read_state_dict(path)


def test_a_byte_changed_anywhere_is_found_or_changes_nothing(quick_path: Path) -> None:
    path, state = quick_path, {"a": torch.randn(2, 3), "b": torch.randn(4)}
    write(path, state)
    whole = bytearray(path.read_bytes())
    told = 0
    for position, mask in itertools.product(range(len(whole)), (0x01, 0xFF)):
        whole[position] ^= mask
        path.write_bytes(whole)
        try:
            found = read_state_dict(path)
            check_records(path)
        except ConversionError:
            told += 1
        else:
            assert all(same(load(found[name]), tensor) for name, tensor in state.items()), position
        whole[position] ^= mask
    assert told > len(whole)  # of two changes of each byte


def test_a_directory_that_swaps_two_records_is_refused(tmp_path: Path) -> None:
    """Both have the same size, so that only their names tell."""
    path = tmp_path / "model_tp0_pp0.pt"
    write(path, {"a": torch.zeros(16), "b": torch.ones(16)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        places = [archive.getinfo(f"{path.stem}/data/{i}").header_offset for i in (0, 1)]
    first, second = (content.rindex(f"{path.stem}/data/{i}".encode()) - 4 for i in (0, 1))  # offsets stand before names
    assert [int.from_bytes(content[at : at + 4], "little") for at in (first, second)] == places
    content[first : first + 4], content[second : second + 4] = content[second : second + 4], content[first : first + 4]
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="not where the directory says"):
        read_state_dict(path)


def pickled_tensor(**changes: Any) -> tuple[bytes, dict[str, bytes]]:
    """A pickle of {"a": 6 floats as [2, 3]} with some of its parts changed, and its storage."""
    parts = {"kind": "storage", "type": torch.FloatStorage, "key": "0", "numel": 6}
    parts |= {"offset": 0, "shape": (2, 3), "strides": (3, 1), **changes}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> Any:
            marked = isinstance(value, str) and value == "the storage"
            return (parts["kind"], parts["type"], parts["key"], "cpu", parts["numel"]) if marked else None

        def reducer_override(self, value: object) -> Any:
            if type(value) is not _Rebuilt:
                return NotImplemented
            storage = parts.get("storage", "the storage")
            arguments = (storage, parts["offset"], parts["shape"], parts["strides"], False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({parts.get("name", "a"): _Rebuilt()})
    return buffer.getvalue(), {"0": b"\0" * 24}


class _Rebuilt:
    """Stands for the tensor while it is pickled."""


def test_the_unchanged_pickle_is_read(tmp_path: Path) -> None:
    assert read_state_dict(write_archive(tmp_path / "file.pt", *pickled_tensor()))["a"].shape == (2, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"numel": 5},
        {"numel": 7},
        {"numel": -1},
        {"numel": 6.0},
        {"numel": 1 << 80},
        {"key": "1"},
        {"key": 0},
        {"key": []},
        {"kind": "weights"},
        {"type": torch.float32.__class__.__name__},
        {"shape": (2, 4)},
        {"shape": (2, -3)},
        {"shape": (6,)},
        {"shape": ("2", "3")},
        {"shape": 6},
        {"shape": (10**4500, 0)},
        {"shape": (True, 6)},
        {"strides": (4, 1)},
        {"strides": (-3, 1)},
        {"strides": (3, 1 << 70)},
        {"strides": None},
        {"offset": 1},
        {"offset": -1},
        {"offset": None},
        {"offset": 1 << 64},
        {"storage": "a text"},
        {"storage": OrderedDict()},
        {"storage": None},
        {"name": 1},
        {"name": ("a",) * 1000},
    ],
    ids=shown,
)
def test_a_tensor_that_cannot_be_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write_archive(tmp_path / "file.pt", *pickled_tensor(**changes))
    with pytest.raises(ConversionError) as refused:
        read_state_dict(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("content", [[1, 2], "text", 5, None, torch.float32, torch.zeros(2)], ids=repr)
def test_what_is_no_dict_is_refused(content: object, tmp_path: Path) -> None:
    for read in (read_state_dict, read_plain_dict):
        with pytest.raises(ConversionError, match=r"file\.pt holds a \w+, expected a dict of"):
            read(saved(tmp_path, content))


def test_a_tensor_that_is_the_negative_of_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.complex(torch.ones(2), torch.ones(2)).conj().imag}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match=r"makes a tensor with \{'neg': True\}"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("value", [1, None, "text", [torch.zeros(2)], {"inner": torch.zeros(2)}], ids=str)
def test_a_state_dict_holds_only_tensors(value: object, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="under 'b', expected only tensors by name"):
        read_state_dict(saved(tmp_path, {"a": torch.zeros(1), "b": value}))


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))


def twice(path: Path) -> None:
    write_archive(path, pickle.dumps({}))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/version", "3")


def without_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", "3")


def old_format(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (compressed, "compressed"),
        (twice, "once"),
        (without_pickle, "data.pkl"),
        (old_format, "before torch 1.6"),
        (lambda path: write_archive(path, pickle.dumps({}), byteorder=b"big"), "big-endian"),
        (lambda path: write_archive(path, b""), "trusted"),
        (lambda path: write_archive(path, b"\x80\x02}"), "trusted"),
        (lambda path: write_archive(path, b"]" * 100000 + b"."), "holds a list"),
        (lambda path: write_archive(path, b"\x8e" + b"\xff" * 8 + b"."), "trusted"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"text"), "truncated"),
        (lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)), "data.pkl"),
    ],
)
def test_an_archive_of_another_kind_is_refused(make: Callable[[Path], Any], word: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    make(path)
    with pytest.raises(ConversionError, match=word) as refused:
        read_state_dict(path)
    assert str(path) in str(refused.value)


# ----------------------------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("payload", HOSTILE)
def test_no_pickle_runs_anything(payload: str, tmp_path: Path) -> None:
    with hostile_surroundings(tmp_path, on_import=payload.startswith("import")) as marker:
        for number, pickled in enumerate((HOSTILE[payload](marker), in_dict(HOSTILE[payload](marker)))):
            path = write_archive(tmp_path / f"{number}.pt", pickled)
            for read in (read_state_dict, read_plain_dict):
                with pytest.raises(ConversionError, match="Nothing in it was run"):
                    read(path)
            assert not marker.exists()
            load_carelessly(pickled)  # the payload is alive: an ordinary unpickler runs it
            assert marker.exists()
            marker.unlink()


REBUILD, STATE_DICT, FLOAT = (
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nfloat32\n",
)
SETTING = b"}X\x09\x00\x00\x00_functionctorch\nSize\nsb."  # a state {"_function": torch.Size}, given to BUILD
SLOTS = b"N" + SETTING[:-2] + b"\x86b."  # the same as (None, state), which BUILD sets attribute by attribute


@pytest.mark.parametrize(
    "pickled",
    [known + setting for known in (REBUILD, STATE_DICT, FLOAT) for setting in (SETTING, SLOTS)],
    ids=lambda pickled: str(pickled[:30]),
)
def test_a_pickle_changes_none_of_the_known_names(pickled: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConversionError):
        read_state_dict(write_archive(tmp_path / "hostile.pt", pickled))
    state = {"a": torch.randn(2)}
    assert same(load(read_state_dict(saved(tmp_path, state))["a"]), state["a"])


def test_a_pickle_changes_no_tensor_that_it_made(tmp_path: Path) -> None:
    pickled, storages = pickled_tensor()
    assert pickled[-5:-3] == b"Rq"  # the call that makes the tensor and its memo; then come SETITEM and STOP
    for setting in (b"}X\x06\x00\x00\x00offsetJ\xff\xff\xff\x7fsb", b"N}X\x06\x00\x00\x00offsetK\x05s\x86b"):
        changed = pickled[:-4] + setting + b"s."
        with pytest.raises(ConversionError):
            read_state_dict(write_archive(tmp_path / "hostile.pt", changed, storages))
