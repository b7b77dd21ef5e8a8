"""Pickles of plain values and of tensors kept outside, as torch.save makes them: read and written without running any.

A pickle is a program for a machine with a stack. Reading knows the opcodes that plain values need, and these names:

    collections.OrderedDict, internlm.*.Config       a dict
    torch.float32, torch.FloatStorage, ...           a DType
    torch.Size                                       a tuple
    torch._utils._rebuild_tensor_v2, _parameter      a PickledTensor

Whatever else a pickle asks for is refused before it is looked up. Keys are simple values, so that hashing one ends, and
nothing lies deeper than MAX_DEPTH, so that whoever walks through the result comes to an end.

Writing gives what Python's own pickler gives for the same values in protocol 2, to the byte.
Sources: Python's pickletools documentation of the opcodes; torch's notes on serialization.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import shown
from .dtypes import DTYPES, DType

MAX_DEPTH = 32
"""Of lists, tuples and dicts in each other. A checkpoint needs three."""
KEY_TYPES = (str, bytes, int, float, bool, type(None))


class PickleError(ValueError):
    """A pickle that is damaged, or that asks for something that no checkpoint needs."""


class PickledStorage(NamedTuple):
    """The bytes of a tensor, kept outside the pickle under `key`."""

    key: str
    dtype: DType
    numel: Any


class PickledTensor(NamedTuple):
    """A window on a storage. Offset, shape and strides are what the pickle says, unchecked."""

    storage: PickledStorage
    offset: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


# ---------------------------------------------------------------------------------------------------------- reading


class _Function:
    """What a pickle may call."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __repr__(self) -> str:
        return "a function"


def _dict(*arguments: object) -> dict[Any, Any]:
    if arguments:  # an OrderedDict starts empty and is filled by opcodes
        raise PickleError("it fills a dict in a way that torch.save does not")
    return {}


def _size(values: object = ()) -> tuple[Any, ...]:
    if not isinstance(values, tuple | list):
        raise PickleError(f"it makes a size of {shown(values)}")
    return tuple(values)


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _requires_grad: object = False,
    _hooks: object = None,
    notes: object = None,
) -> PickledTensor:
    if notes:  # {"neg": True}: its elements are the negatives of what the storage holds
        raise PickleError(f"it makes a tensor with {shown(notes)}, which no checkpoint needs")
    if type(storage) is not PickledStorage:
        raise PickleError(f"it makes a tensor of {shown(storage)}, which is no tensor storage")
    return PickledTensor(storage, offset, _size(shape), _size(strides))


def _parameter(tensor: object, *_unused: object) -> object:
    return tensor


DICT = _Function(_dict)
NAMES: dict[tuple[str, str], _Function | DType] = {
    ("collections", "OrderedDict"): DICT,
    ("torch", "Size"): _Function(_size),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    **{("torch", dtype.name): dtype for dtype in DTYPES if dtype.storage},
    **{("torch", dtype.storage): dtype for dtype in DTYPES if dtype.storage},
}


def loads(content: bytes) -> Any:
    """The value of a pickle; PickleError where it is anything but plain values and tensors."""
    try:
        value = _Reader(content).read()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, TypeError, ValueError) as error:
        if isinstance(error, PickleError):
            raise
        raise PickleError("it is damaged") from error
    _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    """PickleError where containers lie too deep in each other. Level by level, each once: no value is too large."""
    level: dict[int, Any] = {id(value): value} if isinstance(value, dict | list | tuple) else {}
    for _ in range(MAX_DEPTH):
        inner: dict[int, Any] = {}
        for found in level.values():
            members = found.values() if isinstance(found, dict) else found
            inner.update((id(member), member) for member in members if isinstance(member, dict | list | tuple))
        if not inner:
            return
        level = inner
    raise PickleError(f"its values lie more than {MAX_DEPTH} deep in each other")


class _Reader:
    """The machine that a pickle is a program for."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        stop = ord(".")
        while (opcode := self._content[self._at]) != stop:
            self._at += 1
            action = OPCODES.get(opcode)
            if action is None:
                raise PickleError(f"it has the opcode {opcode:#04x}, which no checkpoint needs")
            action(self)
        return self._stack.pop()

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def pop_last(self, count: int) -> list[Any]:
        last = self._stack[-count:]
        if len(last) != count:
            raise PickleError("it takes more from its stack than there is")
        del self._stack[-count:]
        return last

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def pop_marked(self) -> list[Any]:
        """What lies above the last mark."""
        marked, self._stack = self._stack, self._below.pop()
        return marked

    def take(self, count: int) -> bytes:
        begin, end = self._at, self._at + count
        if end > len(self._content):
            raise PickleError("it is cut off")
        self._at = end
        return self._content[begin:end]

    def skip(self, count: int) -> None:
        self.take(count)

    def number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> str:
        end = self._content.index(b"\n", self._at)
        line, self._at = self._content[self._at : end], end + 1
        return line.decode()

    def remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise PickleError(f"it appends to {shown(self._stack[-1])}")
        self._stack[-1].extend(values)

    def set_items(self, items: list[Any]) -> None:
        found = self._stack[-1]
        if type(found) is not dict:
            raise PickleError(f"it sets an item of {shown(found)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in KEY_TYPES:
                raise PickleError(f"it has {shown(key)} for a key")
            found[key] = value

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError(f"it asks for {shown(name)} of {shown(module)}")
        if name == "Config" and module.split(".", 1)[0] == "internlm":
            self.push(DICT)
        elif (module, name) in NAMES:
            self.push(NAMES[module, name])
        else:
            raise PickleError(f"it asks for {shown(f'{module}.{name}')}, which no checkpoint needs")

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not _Function or type(arguments) is not tuple:
            raise PickleError(f"it calls {shown(function)}")
        self.push(function.call(*arguments))

    def build(self) -> None:
        """A state dict's attributes (`_metadata`, module versions) are no weights; nothing else has any."""
        self.pop()
        if type(self._stack[-1]) is not dict:
            raise PickleError(f"it sets attributes of {shown(self._stack[-1])}")

    def storage(self) -> None:
        value = self.pop()
        if type(value) is not tuple or len(value) != 5:
            raise PickleError(f"it refers to {shown(value)}, which is no tensor storage")
        kind, dtype, key, _location, numel = value
        if type(kind) is not str or kind != "storage" or type(dtype) is not DType or type(key) is not str:
            raise PickleError(f"it refers to {shown(value)}, which is no tensor storage")
        self.push(PickledStorage(key, dtype, numel))

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"))

    def protocol(self) -> None:
        version = self.number(1)
        if version > 5:
            raise PickleError(f"it is of protocol {version}")


OPCODES: dict[int, Callable[[_Reader], None]] = {
    0x80: _Reader.protocol,  # PROTO
    0x95: lambda reader: reader.skip(8),  # FRAME, and its length
    ord("("): _Reader.mark,  # MARK
    ord("N"): lambda reader: reader.push(None),  # NONE
    0x88: lambda reader: reader.push(True),  # NEWTRUE
    0x89: lambda reader: reader.push(False),  # NEWFALSE
    ord("K"): lambda reader: reader.push(reader.number(1)),  # BININT1
    ord("M"): lambda reader: reader.push(reader.number(2)),  # BININT2
    ord("J"): lambda reader: reader.push(reader.number(4, signed=True)),  # BININT
    0x8A: lambda reader: reader.push(reader.number(reader.number(1), signed=True)),  # LONG1
    0x8B: lambda reader: reader.push(reader.number(reader.number(4), signed=True)),  # LONG4
    ord("G"): lambda reader: reader.push(*struct.unpack(">d", reader.take(8))),  # BINFLOAT
    ord("X"): lambda reader: reader.text(reader.number(4)),  # BINUNICODE
    0x8C: lambda reader: reader.text(reader.number(1)),  # SHORT_BINUNICODE
    0x8D: lambda reader: reader.text(reader.number(8)),  # BINUNICODE8
    ord("B"): lambda reader: reader.push(reader.take(reader.number(4))),  # BINBYTES
    ord("C"): lambda reader: reader.push(reader.take(reader.number(1))),  # SHORT_BINBYTES
    0x8E: lambda reader: reader.push(reader.take(reader.number(8))),  # BINBYTES8
    ord("]"): lambda reader: reader.push([]),  # EMPTY_LIST
    ord("a"): lambda reader: reader.extend(reader.pop_last(1)),  # APPEND
    ord("e"): lambda reader: reader.extend(reader.pop_marked()),  # APPENDS
    ord(")"): lambda reader: reader.push(()),  # EMPTY_TUPLE
    0x85: lambda reader: reader.push(tuple(reader.pop_last(1))),  # TUPLE1
    0x86: lambda reader: reader.push(tuple(reader.pop_last(2))),  # TUPLE2
    0x87: lambda reader: reader.push(tuple(reader.pop_last(3))),  # TUPLE3
    ord("t"): lambda reader: reader.push(tuple(reader.pop_marked())),  # TUPLE
    ord("}"): lambda reader: reader.push({}),  # EMPTY_DICT
    ord("s"): lambda reader: reader.set_items(reader.pop_last(2)),  # SETITEM
    ord("u"): lambda reader: reader.set_items(reader.pop_marked()),  # SETITEMS
    ord("q"): lambda reader: reader.remember(reader.number(1)),  # BINPUT
    ord("r"): lambda reader: reader.remember(reader.number(4)),  # LONG_BINPUT
    0x94: _Reader.memoize,  # MEMOIZE
    ord("h"): lambda reader: reader.recall(reader.number(1)),  # BINGET
    ord("j"): lambda reader: reader.recall(reader.number(4)),  # LONG_BINGET
    ord("c"): lambda reader: reader.name(reader.line(), reader.line()),  # GLOBAL
    0x93: lambda reader: reader.name(*reader.pop_last(2)),  # STACK_GLOBAL
    ord("R"): _Reader.call,  # REDUCE
    0x81: _Reader.call,  # NEWOBJ
    ord("b"): _Reader.build,  # BUILD
    ord("Q"): _Reader.storage,  # BINPERSID
}


# ---------------------------------------------------------------------------------------------------------- writing

BATCH = 1000
"""Items that the pickler of Python hands over at a time."""


def dumps(value: object) -> bytes:
    """The pickle of a plain value, DTypes among them; TypeError for any other, OverflowError for an endless number."""
    writer = _Writer(PLAIN_SAVERS)
    writer.save(value)
    return b"\x80\x02" + bytes(writer.out) + b"."


def dumps_state_dict(state: Mapping[str, PickledTensor]) -> bytes:
    """The pickle of an OrderedDict."""
    writer = _Writer(PLAIN_SAVERS | {PickledTensor: _Writer.tensor})
    writer.ordered_dict(state)
    return b"\x80\x02" + bytes(writer.out) + b"."


class _Writer:
    def __init__(self, savers: Savers) -> None:
        self.out = bytearray()
        self._savers = savers
        self._memo: dict[object, int] = {}  # names by their spelling, values by id()
        self._kept: list[object] = []  # an id is one value's while the value lives

    def save(self, value: object) -> None:
        if isinstance(value, str | tuple | list | dict) and id(value) in self._memo:
            self._recall(id(value))
            return
        if type(value) not in self._savers:
            raise TypeError(f"a {type(value).__name__} is no plain value")
        self._savers[type(value)](self, value)

    def constant(self, opcode: bytes) -> None:
        self.out += opcode

    def number(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += b"K" + value.to_bytes(1, "little")
        elif 0 <= value < 1 << 16:
            self.out += b"M" + value.to_bytes(2, "little")
        elif -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + value.to_bytes(4, "little", signed=True)
        else:
            size = value.bit_length() // 8 + 1
            self.out += b"\x8a" + size.to_bytes(1, "little") + value.to_bytes(size, "little", signed=True)

    def text(self, value: str) -> None:
        content = value.encode("utf-8", "surrogatepass")
        self.out += b"X" + len(content).to_bytes(4, "little") + content
        self._remember(value)

    def tuple_(self, value: tuple[object, ...]) -> None:
        if len(value) > 3:
            self.out += b"("
        for member in value:
            self.save(member)
        self.out += (b")", b"\x85", b"\x86", b"\x87", b"t")[min(len(value), 4)]
        if value:
            self._remember(value)

    def list_(self, value: list[object]) -> None:
        self.out += b"]"
        self._remember(value)
        for begin in range(0, len(value), BATCH):
            self._batch(value[begin : begin + BATCH], b"a", b"e", 1)

    def dict_(self, value: Mapping[Any, object]) -> None:
        self.out += b"}"
        self._remember(value)
        self._items(value)

    def ordered_dict(self, value: Mapping[Any, object]) -> None:
        self._name("collections", "OrderedDict")
        self.out += b")R"
        self._remember(value)
        self._items(value)

    def dtype(self, value: DType) -> None:
        self._name("torch", value.name)

    def tensor(self, value: PickledTensor) -> None:
        """A call that rebuilds it: storage, offset, shape, strides, no gradient, no backward hooks."""
        self._name("torch._utils", "_rebuild_tensor_v2")
        self.out += b"("
        self._storage(value.storage)
        for member in (value.offset, value.shape, value.strides, False):
            self.save(member)
        self.ordered_dict({})
        self.out += b"t"
        self._remember(object())  # the arguments
        self.out += b"R"
        self._remember(value)

    def _storage(self, storage: PickledStorage) -> None:
        if storage.dtype.storage is None:
            raise TypeError(f"torch has no storage of its own for {storage.dtype}")
        self.out += b"("
        self.save("storage")
        self._name("torch", storage.dtype.storage)
        for member in (storage.key, "cpu", storage.numel):
            self.save(member)
        self.out += b"t"
        self._remember(object())  # the identity of the storage
        self.out += b"Q"

    def _items(self, value: Mapping[Any, object]) -> None:
        flat = [member for item in value.items() for member in item]
        for begin in range(0, len(flat), 2 * BATCH):
            self._batch(flat[begin : begin + 2 * BATCH], b"s", b"u", 2)

    def _batch(self, members: list[object], one: bytes, several: bytes, size: int) -> None:
        single = len(members) == size
        self.out += b"" if single else b"("
        for member in members:
            self.save(member)
        self.out += one if single else several

    def _name(self, module: str, name: str) -> None:
        spelling = f"c{module}\n{name}\n".encode()
        if spelling in self._memo:
            self._recall(spelling)
        else:
            self.out += spelling
            self._remember(spelling, key=spelling)

    def _recall(self, key: object) -> None:
        index = self._memo[key]
        self.out += b"h" + index.to_bytes(1, "little") if index < 256 else b"j" + index.to_bytes(4, "little")

    def _remember(self, value: object, key: object = None) -> None:
        index = len(self._memo)
        self._memo[id(value) if key is None else key] = index
        self._kept.append(value)
        self.out += b"q" + index.to_bytes(1, "little") if index < 256 else b"r" + index.to_bytes(4, "little")


Savers = Mapping[type, Callable[[_Writer, Any], None]]
PLAIN_SAVERS: dict[type, Callable[[_Writer, Any], None]] = {
    type(None): lambda writer, _: writer.constant(b"N"),
    bool: lambda writer, value: writer.constant(b"\x88" if value else b"\x89"),
    int: _Writer.number,
    float: lambda writer, value: writer.constant(b"G" + struct.pack(">d", value)),
    str: _Writer.text,
    tuple: _Writer.tuple_,
    list: _Writer.list_,
    dict: _Writer.dict_,
    DType: _Writer.dtype,
}
