"""What goes wrong in a way that the user can mend."""

import reprlib
from collections.abc import Sequence
from pathlib import Path

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


class ConversionError(Exception):
    """A sentence for the user: which file and tensor, what was found, what was expected, what to do."""


class naming:  # noqa: N801 - a context manager, used as a word
    """Puts the path into an OSError of an open file, which knows only a number."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self._path)


def shown(value: object) -> str:
    """A value from a file, short enough for a sentence, whatever it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no whole number of more than 4300 digits
        return f"a {type(value).__name__} too long to print"


def listed(names: Sequence[str]) -> str:
    """Names for a sentence: the first few, and how many more."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


NAMED = 4
"""How many names a sentence lists."""
