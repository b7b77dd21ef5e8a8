"""Pickles that run something when an ordinary unpickler loads them: they make a marker file.

`HOSTILE` has one of every way in which a pickle reaches code: calling a function, importing a module, building an
object from a class of the attacker's choice, setting attributes, and the older opcodes for the same.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODULE = "module_that_leaves_a_mark"
SOURCE = """
import os
from pathlib import Path

def mark():
    Path(os.environ["MARKER"]).touch()

class Marks:
    def __setstate__(self, state):
        mark()

    def __setitem__(self, key, value):
        mark()

if os.environ.get("MARK_ON_IMPORT"):
    mark()
"""


class _Call:
    """Pickles as the call `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._parts = function, arguments

    def __reduce__(self) -> Any:
        return self._parts


def _global(name: str) -> bytes:
    return f"c{MODULE}\n{name}\n".encode()


def _marks() -> bytes:
    """An object of the class Marks on the stack."""
    return _global("Marks") + b")\x81"  # NEWOBJ without arguments


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda marker: pickle.dumps(_Call(os.system, f"touch {marker}")),
    "os.system, protocol 0": lambda marker: pickle.dumps(_Call(os.system, f"touch {marker}"), 0),
    "os.system, INST": lambda marker: f"(S'touch {marker}'\nios\nsystem\n.".encode(),
    "os.system, OBJ": lambda marker: b"(cos\nsystem\n" + _text(f"touch {marker}") + b"o.",
    "os.system, STACK_GLOBAL": lambda marker: (
        b"\x80\x04" + _text("os") + _text("system") + b"\x93" + _text(f"touch {marker}") + b"\x85R."
    ),
    "subprocess": lambda marker: pickle.dumps(_Call(subprocess.call, ["touch", str(marker)])),
    "eval": lambda marker: pickle.dumps(_Call(eval, f"open({str(marker)!r}, 'w').close()")),
    "exec": lambda marker: pickle.dumps(_Call(exec, f"open({str(marker)!r}, 'w').close()")),
    "open": lambda marker: pickle.dumps(_Call(open, str(marker), "w")),
    "dotted name": lambda marker: (
        b"\x80\x04" + _text("pathlib") + _text("Path.touch") + b"\x93" + _pickled(marker) + b"\x85R."
    ),
    "import, GLOBAL": lambda marker: _global("mark") + b".",
    "import, call": lambda marker: pickle.dumps(_Call(importlib.import_module, MODULE)),
    "call of its module": lambda marker: _global("mark") + b")R.",
    "BUILD": lambda marker: _marks() + b"}b.",
    "SETITEM": lambda marker: _marks() + _text("a") + _text("b") + b"s.",
}


_DOUBLED = b")" + b"2\x86" * 60
"""A tuple of itself twice, sixty times over: small in memory, without end for all that walks through it."""

EXHAUSTING: dict[str, Callable[[Path], bytes]] = {
    "a million tuples in each other": lambda marker: b"\x80\x02)" + b"\x85" * 10**6 + b".",
    "a million lists in each other": lambda marker: b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
    "a tuple that doubles itself": lambda marker: b"\x80\x02" + _DOUBLED + b".",
    "a tuple that doubles itself, as a key": lambda marker: b"\x80\x02}" + _DOUBLED + b"Ns.",
    "a tuple that doubles itself, as a size": lambda marker: b"\x80\x02}" + _text("num_layers") + _DOUBLED + b"s.",
    "a number of a million digits": lambda marker: (
        b"\x80\x02}" + _text("num_layers") + b"\x8b" + (415_000).to_bytes(4, "little") + b"\x11" * 415_000 + b"s."
    ),
}
"""Pickles that crash or hang what hashes, compares or prints what they build. They need no marker."""


def _text(text: str) -> bytes:
    content = text.encode()
    return b"X" + len(content).to_bytes(4, "little") + content


def _pickled(value: object) -> bytes:
    """The opcodes that put a value on the stack, without those that start and end a pickle."""
    return pickle.dumps(value, 2)[2:-1]


@contextmanager
def hostile_surroundings(folder: Path, *, on_import: bool) -> Iterator[Path]:
    """The marker's path, while the attacker's module can be imported."""
    marker = folder / "marker"
    (folder / f"{MODULE}.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    os.environ["MARKER"] = str(marker)
    if on_import:
        os.environ["MARK_ON_IMPORT"] = "1"
    try:
        yield marker
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(MODULE, None)
        os.environ.pop("MARKER")
        os.environ.pop("MARK_ON_IMPORT", None)


def write_archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **records: bytes) -> Path:
    """A file in the format of torch.save with this pickle, these storages and records."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in {"byteorder": b"little", "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def in_dict(pickled: bytes) -> bytes:
    """The pickle of {"norm.weight": what `pickled` builds}."""
    body = pickled[2:] if pickled[:1] == b"\x80" else pickled
    body = body[9:] if body[:1] == b"\x95" else body  # a frame's length would no longer fit
    return b"\x80\x04}" + _text("norm.weight") + body[:-1] + b"s."


def load_carelessly(pickled: bytes) -> Any:
    """What an ordinary unpickler does, in a process that has not seen the attacker's module yet."""
    sys.modules.pop(MODULE, None)
    return pickle.Unpickler(io.BytesIO(pickled)).load()
