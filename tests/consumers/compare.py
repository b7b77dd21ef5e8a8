"""A tool's answers about one folder beside ours: what agrees, and a word about what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

BOUND = 5e-5
"""Of the norm of a difference over the norm: what float32 leaves of these models, added up in another order."""

LONGEST = 300
"""Characters of an error that are kept."""


@dataclass
class Result:
    """What came of one folder: relative differences of arrays, "16/16" of lists; `wrong` is "" if all is right."""

    agreed: dict[str, str] = field(default_factory=dict)
    wrong: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Result:
    """Every answer of the tool beside ours.

    Raises:
        ValueError: the tool answered nothing.
    """
    if "error" in found:
        return Result(wrong=f"stops: {found['error'].strip().splitlines()[0][:LONGEST]}")
    result, complaints = Result(), []
    for name, answer in found.items():
        text, right = COMPARISONS[name](answer, expected.get(name))
        result.agreed[name] = text
        if not right:
            complaints.append(f"{name} {text}")
    if not result.agreed:
        raise ValueError("The tool answered nothing.")
    result.wrong = ", ".join(complaints)
    return result


def _array(found: Any, expected: Any) -> tuple[str, bool]:
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if found.shape != expected.shape:
        return f"of shape {list(found.shape)}, not {list(expected.shape)}", False
    difference = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return f"{difference:.0e}", difference < BOUND


def _pair(found: Any, _: Any) -> tuple[str, bool]:
    """What a tool was asked to set beside another answer by itself: no other program has it."""
    return _array(*found)


def _rows(found: Any, expected: Any) -> tuple[str, bool]:
    """Lists of ids of several prompts: all tokens that are the same from the first on."""
    same = sum(_prefix(one, other) for one, other in zip(found, expected, strict=True))
    total = sum(map(len, expected))
    return f"{same}/{total}", list(map(list, found)) == list(map(list, expected))


def _prefix(one: list[int], other: list[int]) -> int:
    return next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


def _texts(found: Any, expected: Any) -> tuple[str, bool]:
    same = sum(list(one) == list(other) for one, other in zip(found, expected, strict=True))
    return f"{same}/{len(expected)}", same == len(expected)


def _chat(found: Any, expected: Any) -> tuple[str, bool]:
    right = found == expected["text" if isinstance(found, str) else "ids"]
    return ("same" if right else f"is {found!r}"), right


def _equal(found: Any, expected: Any) -> tuple[str, bool]:
    right = found == expected
    return ("same" if right else f"is {found!r}, not {expected!r}"), right


COMPARISONS = {
    "logits": _array,
    "scores": _array,
    "likelihood": _array,
    "embeddings": _array,
    "dequantized": _pair,
    "assistant_loss": _array,
    "greedy": _rows,
    "tokens": _texts,
    "chat": _chat,
    "completion": _equal,
    "ends": _equal,
}
