"""What is to be copied: which windows of which tensors hold the same elements. Nothing here copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .views import Pair, StoredTensor

if TYPE_CHECKING:
    from .casting import Array


@dataclass(frozen=True)
class Move:
    """A full tensor and windows (of it, of parts) that together cover it exactly once.

    Where the types of part and full tensor differ, gathering casts. `transform` changes rows [n, ...] of the gathered
    tensor, in float32, before they are cast to the type that is written. Scattering does neither.
    With `back`, `full` is a rank's tensor and the windows are of full ones: reverting gathers it.
    With `source`, `full` lies in no file: it is what the move `source` would gather.
    """

    full: StoredTensor
    pairs: tuple[Pair, ...]
    transform: Callable[[Array], None] | None = None
    back: bool = False
    source: Move | None = None

    def __post_init__(self) -> None:
        covered = sum(math.prod(window.shape) for window, _ in self.pairs)
        if covered != math.prod(self.full.shape):
            raise ValueError(f"the parts of {self.full.name} hold {covered} elements, {self.full.shape} is expected")


Task = Sequence[Move]
"""Moves, at least one, that one worker runs in order."""
