"""A training checkpoint as its family reads it, the same for both directions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConversionError, shown
from ..files.copying import Copier
from ..files.moves import Move
from ..folders.internevo_folder import TrainingCheckpoint
from ..mapping.family import Family
from ..mapping.form import hold_biases
from ..mapping.matching import Parts, match_training
from ..mapping.rules import ModelShape
from ..mapping.sizes import training_shape
from ..mapping.table import Entry, Layout, Table
from ..mapping.training_settings import check_settings


@dataclass(frozen=True)
class Understood:
    """A checkpoint: its layout, its sizes, and of every entry of the table the copies of its parts."""

    checkpoint: TrainingCheckpoint
    layout: Layout
    shape: ModelShape
    parts: Sequence[tuple[Entry, list[Parts]]]

    @property
    def has_bias(self) -> bool:
        return hold_biases(name for entry, _ in self.parts for name in entry.hf)


def understood(
    family: Family, table: Table, checkpoint: TrainingCheckpoint, version: int | None, warn: Callable[[str], None]
) -> Understood:
    """`table` says what the Hugging Face tensors are; ConversionError where the checkpoint is none of the family."""
    check_settings(checkpoint.config, checkpoint.config_file, warn)
    experts = [name for name in checkpoint.tensors if "moe" in name or "expert" in name]
    if experts:
        raise ConversionError(
            f"{checkpoint.folder} is a mixture of experts (MoE, tensor {shown(experts[0])}): not supported."
        )
    layout = family.layout_found(checkpoint, version, warn)
    shape = training_shape(checkpoint, table, layout)
    family.check_heads(shape, checkpoint.config_file)
    return Understood(checkpoint, layout, shape, match_training(checkpoint, table, layout, shape))


def check_replicas(source: Understood) -> None:
    """Copies of a tensor must be the same on every rank, byte for byte."""
    tasks = []
    for _, (first, *others) in source.parts:
        twins = itertools.chain.from_iterable(
            zip(itertools.chain(*first), itertools.chain(*other), strict=True) for other in others
        )
        moves = [Move(one, ((one.view(), twin.view()),)) for one, twin in twins if twin is not one]
        tasks += [moves] if moves else []
    for move in Copier(lambda _: None).differences(tasks):
        other = move.pairs[0][1].tensor
        raise ConversionError(
            f"{other.path}: tensor {shown(other.name)} differs from that of {move.full.path}, though every "
            "rank of its group should hold the same. Shards of different runs or steps seem to be mixed."
        )
