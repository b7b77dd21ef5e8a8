"""How training numbers the layers that it shares out over pipeline stages.

    2 stages, 4 layers                      the same in 2 interleaved chunks, chunk by chunk
    pp0: embedding, layers 0 1              pp0: 0.model.embedding, 0.model.layers.0 | 1.model.layers.0 (= 2)
    pp1: layers 0 1 (= 2 3), norm, head     pp1: 0.model.layers.0 (= 1)              | 1.model.layers.0 (= 3), ...

    in a V (pipeline mode ZBV), where chunk 1 goes back from the last stage to the first
    pp0: 0.model.embedding, 0.model.layers.0 | 1.model.layers.0 (= 3), 1.model.norm, 1.model.head
    pp1: 0.model.layers.0 (= 1)              | 1.model.layers.0 (= 2)

Layer numbers restart at 0 in every stage and chunk. Of layers that do not divide, the last stages (of a V, the last
that are passed) get one more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

TENSOR_NAME = re.compile(
    r"(?:(?P<chunk>[0-9]{1,6})\.)?(?P<prefix>model\.)?(?:(?P<stem>blocks|layers)\.(?P<layer>[0-9]{1,6})\.)?(?P<rest>.+)"
)

Place = tuple[int, int]
"""(chunk, stage)."""


@dataclass(frozen=True)
class SavedName:
    """A tensor's name in a shard: `layer` counts within chunk and stage; `stem` is empty where it is of no layer."""

    chunk: int
    stem: str
    layer: int
    rest: str
    prefixed: bool


def parsed(name: str) -> SavedName | None:
    found = TENSOR_NAME.fullmatch(name)
    if found is None:
        return None
    layer, chunk = int(found["layer"] or 0), int(found["chunk"] or 0)
    return SavedName(chunk, found["stem"] or "", layer, found["rest"], found["prefix"] is not None)


@dataclass(frozen=True)
class Numbering:
    """The places in the order in which a token passes them, and how many layers each has."""

    places: Sequence[Place]
    counts: Mapping[Place, int]

    @cached_property
    def first_layers(self) -> dict[Place, int]:
        """The number in the whole model of layer 0 of each place."""
        first, total = {}, 0
        for place in self.places:
            first[place] = total
            total += self.counts[place]
        return first

    @property
    def num_layers(self) -> int:
        return sum(self.counts.values())

    @property
    def chunks(self) -> int:
        return 1 + max(chunk for chunk, _ in self.places)

    def place_of(self, layer: int) -> Place:
        """Where a layer of the whole model is."""
        return next(place for place in self.places if 0 <= layer - self.first_layers[place] < self.counts[place])

    def whole_name(self, name: SavedName, stage: int) -> str:
        """The name in the whole model of a tensor that a shard of `stage` calls `name`."""
        if not name.stem:
            return name.rest
        return f"{name.stem}.{self.first_layers[name.chunk, stage] + name.layer}.{name.rest}"

    def saved_name(self, name: str, place: Place) -> str:
        """What a shard at `place` calls the tensor `name` of the whole model."""
        found, chunk = parsed(name), f"{place[0]}.model." if self.chunks > 1 else ""
        if found is None or not found.stem:
            return chunk + name
        return f"{chunk}{found.stem}.{found.layer - self.first_layers[place]}.{found.rest}"


def found_numbering(counts: Mapping[Place, int], *, v_shaped: bool) -> Numbering:
    """The numbering of places that were found to have so many layers."""
    return Numbering(sorted(counts, key=lambda place: _order(place, v_shaped)), counts)


def _order(place: Place, v_shaped: bool) -> Place:
    chunk, stage = place
    return (chunk, -stage if v_shaped and chunk % 2 else stage)


def shared_out(num_layers: int, stages: int, chunks: int = 1) -> Numbering:
    """How the framework shares layers out; ValueError where it would refuse to."""
    per_chunk, rest = divmod(num_layers, chunks)
    if rest:
        raise ValueError(f"{num_layers} layers do not divide into {chunks} chunks")
    size, over = divmod(per_chunk, stages)
    if size == 0:
        dealt = f" in {chunks} chunks" if chunks > 1 else ""
        raise ValueError(f"{num_layers} layers{dealt} are too few for {stages} stages")
    counts = {(chunk, stage): size + (stage >= stages - over) for chunk in range(chunks) for stage in range(stages)}
    return found_numbering(counts, v_shaped=False)
