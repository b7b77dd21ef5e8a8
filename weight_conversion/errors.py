"""What goes wrong in a way that the user can mend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

LONGEST = 200
"""Characters of a value that a sentence shows."""


class ConversionError(Exception):
    """A sentence for the user: which file and tensor, what was found, what was expected, what to do."""


class UndecidedError(ConversionError):
    """A checkpoint does not tell something that the user has to say."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path into an OSError of an open file, which knows only a number."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def shown(value: object) -> str:
    """A value from a file as a sentence can have it, whatever it is: short, on one line, without control characters."""
    text = _text(value, depth=3)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _text(value: object, depth: int) -> str:
    """A text of bounded length, made in bounded time."""
    if isinstance(value, str | bytes):
        return repr(value[:LONGEST]) + ("..." if len(value) > LONGEST else "")
    if isinstance(value, int) and value.bit_length() > 2 * LONGEST:  # Python prints none of more than 4300 digits
        return f"a whole number of about {int(value.bit_length() * 0.30103) + 1} digits"
    if isinstance(value, list | tuple | dict):
        return _members(value, depth)
    return repr(value)


def _members(value: list[object] | tuple[object, ...] | dict[object, object], depth: int) -> str:
    begin, end = ("[", "]") if isinstance(value, list) else ("{", "}") if isinstance(value, dict) else ("(", ")")
    if not depth:
        return f"{begin}...{end}"
    members = [_text(member, depth - 1) for member in islice(value, 8)]
    if isinstance(value, dict):
        inner = (_text(member, depth - 1) for member in islice(value.values(), 8))
        members = [f"{key}: {member}" for key, member in zip(members, inner, strict=True)]
    if len(value) > 8:
        members.append("...")
    return f"{begin}{', '.join(members)}{end}"


def listed(names: Sequence[str]) -> str:
    """Names for a sentence: the first few, and how many more."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


NAMED = 4
"""How many names a sentence lists."""
