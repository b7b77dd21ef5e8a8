"""Matches the tensors of a folder with the entries of a table: every one used once, every one found, every shape right.

The result is moves: which windows of which tensors hold the same elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConversionError, shown
from ..files.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from ..files.moves import Move
from ..files.views import StoredTensor, TensorSpec
from ..folders.grid import Grid, Group
from ..folders.internevo_folder import TrainingCheckpoint
from .rules import IndivisibleError, ModelShape, Rule
from .table import Entry, Layout, Table

WEIGHT_DTYPES = (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)


Parts = Sequence[Sequence[StoredTensor]]
"""The tensors of each part of an entry, by training name."""


@dataclass(frozen=True)
class Match:
    """An entry with its tensors: `fulls` by Hugging Face name, `copies` of all its parts, at least one."""

    entry: Entry
    fulls: Sequence[StoredTensor]
    copies: Sequence[Parts]

    def moves(self, shape: ModelShape) -> list[Move]:
        """One move per full tensor and copy."""
        fulls = [full.view() for full in self.fulls]
        moves = []
        for copy in self.copies:
            parts = [[tensor.view() for tensor in part] for part in copy]
            pairs = list(self.entry.rule.pairs(fulls, parts, shape))
            moves += [Move(full, tuple(pair for pair in pairs if pair[0].tensor is full)) for full in self.fulls]
        return moves

    def moves_back(self, shape: ModelShape) -> list[Move]:
        """The moves of reverting: where fewer tensors hold a rank's part than there are full ones, one per tensor."""
        moves = self.moves(shape)
        if len(self.entry.training) >= len(self.fulls):
            return moves
        pairs = [pair for move in moves for pair in move.pairs]
        tensors = dict.fromkeys(part.tensor for _, part in pairs)
        return [
            Move(tensor, tuple((part, full) for full, part in pairs if part.tensor is tensor), back=True)
            for tensor in tensors
        ]


def copies_of(rule: Rule, grid: Grid) -> list[list[int]]:
    """For each copy of a tensor that is cut by `rule`, the members of the grid that hold its parts, in order."""
    size = grid.size(rule.over)
    holders: dict[int, list[int]] = {}
    for member, rank in enumerate(grid.ranks(rule.over)):
        part = rule.part_of(rank, size)
        if part is not None:
            holders.setdefault(part, []).append(member)
    count = max(len(members) for members in holders.values())
    return [[holders[part][min(copy, len(holders[part]) - 1)] for part in sorted(holders)] for copy in range(count)]


def match_training(
    checkpoint: TrainingCheckpoint, table: Table, layout: Layout, shape: ModelShape
) -> list[tuple[Entry, list[Parts]]]:
    """Every entry with the copies of its parts; ConversionError names what does not fit."""
    entries = table.entries(layout, shape)
    found = {name: tensor for name in checkpoint.tensors if (tensor := checkpoint.first(name))}
    _refuse_unknown(found, {name for entry in entries for name in entry.training}, table)
    return [(entry, _copies_found(entry, checkpoint, shape)) for entry in entries]


def _copies_found(entry: Entry, checkpoint: TrainingCheckpoint, shape: ModelShape) -> list[Parts]:
    grid = checkpoint.grid
    group, size = entry.rule.over, grid.size(entry.rule.over)
    holders = copies_of(entry.rule, grid)
    holding = {member for copy in holders for member in copy}
    by_member: dict[int, list[StoredTensor]] = {member: [] for member in holding}
    given = f" by {checkpoint.config_file} (--config)" if checkpoint.is_of_hf_class else ""
    for name, expected in zip(entry.training, part_shapes(entry, grid, shape), strict=True):
        for member, tensor in enumerate(checkpoint.tensors.get(name, [None] * len(grid.members))):
            if member not in holding:
                if tensor is not None:
                    rank = grid.ranks(group)[member]
                    raise ConversionError(f"{tensor.path}: tensor {shown(tensor.name)} is not expected on rank {rank}.")
                continue
            if tensor is None:
                raise ConversionError(
                    f"{checkpoint.folder}: tensor {shown(name)} (layers counted through the pipeline) is in none of "
                    f"{grid.name(grid.members[member], '*')}, expected on each of {len(holding)} {group.value} ranks. "
                    "The checkpoint is incomplete or no model of this family."
                )
            missing = "; shards of the other ranks are missing" if _is_part(tensor.shape, expected) else ""
            _check(tensor, expected, f"on each of {size} {group.value} ranks{given}{missing}")
            by_member[member].append(tensor)
    _check_same_dtype([tensor for tensors in by_member.values() for tensor in tensors])
    return [[by_member[member] for member in copy] for copy in holders]


def _is_part(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether more ranks than there are would make up the expected shape."""
    if len(found) != len(expected):
        return False
    different = [(a, b) for a, b in zip(found, expected, strict=True) if a != b]
    return len(different) == 1 and 0 < different[0][0] < different[0][1] and different[0][1] % different[0][0] == 0


def match_hf(
    tensors: Mapping[str, StoredTensor], table: Table, layout: Layout, shape: ModelShape, where: str
) -> list[tuple[Entry, list[StoredTensor]]]:
    """Every entry with its Hugging Face tensors; ConversionError names what does not fit."""
    if shape.num_layers > len(tensors):
        raise ConversionError(
            f"{where} holds {len(tensors)} tensors, which cannot be the {shape.num_layers} layers of its config.json."
        )
    entries = table.entries(layout, shape)
    _refuse_unknown(tensors, {name for entry in entries for name in entry.hf}, table)
    matched = []
    for entry in entries:
        fulls = []
        for name, expected in zip(entry.hf, entry.hf_shapes, strict=True):
            if name not in tensors:
                raise ConversionError(f"{where} lacks tensor {shown(name)}, which a model of its config.json has.")
            _check(tensors[name], expected, "from config.json")
            fulls.append(tensors[name])
        _check_same_dtype(fulls)
        matched.append((entry, fulls))
    return matched


def part_shapes(entry: Entry, grid: Grid, shape: ModelShape) -> list[tuple[int, ...]]:
    """Shapes of a rank's tensors of `entry`; ConversionError where the grid does not divide them."""
    group, size = entry.rule.over, grid.size(entry.rule.over)
    try:
        return entry.rule.part_shapes(entry.hf_shapes, size, shape)
    except ValueError as error:
        remedy = f"Choose a {group.value} size that divides {DIVIDED_BY[group]}."
        by_rows = isinstance(error, IndivisibleError) and error.by_rows
        if by_rows and entry.hf_shapes[0] == (shape.vocab_size, shape.hidden_size):
            remedy = (
                f"Choose a {group.value} size that divides the vocabulary of {shape.vocab_size} and "
                f"{DIVIDED_BY[group]}, or enlarge it before: model.resize_token_embeddings(pad_to_multiple_of={size}), "
                "then save_pretrained."
            )
        raise ConversionError(
            f"tensor {shown(entry.training[0])} cannot be split over {size} {group.value} ranks: {error}. {remedy}"
        ) from error


DIVIDED_BY = {
    Group.TENSOR: "the key/value heads, the hidden and the intermediate size",
    Group.WEIGHT: "the hidden and the intermediate size and the rows of the attention",
}


def part_specs(entry: Entry, fulls: Sequence[StoredTensor], grid: Grid, shape: ModelShape) -> list[TensorSpec]:
    """The tensors that a rank which holds a part of `entry` is to have, under the names of the whole model."""
    shapes = part_shapes(entry, grid, shape)
    return [TensorSpec(name, sizes, fulls[0].dtype) for name, sizes in zip(entry.training, shapes, strict=True)]


def _refuse_unknown(found: Mapping[str, StoredTensor], expected: set[str], table: Table) -> None:
    unknown = sorted(name for name in found if name not in expected and not table.is_ignored(name))
    if unknown:
        first, more = found[unknown[0]], len(unknown) - 1
        raise ConversionError(
            f"{first.path}: tensor {shown(first.name)}{f' and {more} more' if more else ''} is not expected in this "
            "model. Nothing may get lost, so nothing is done. InternLM and InternLM2 each have their own script."
        )


def _check(tensor: StoredTensor, expected: tuple[int, ...], why: str) -> None:
    if tensor.shape != expected:
        raise ConversionError(
            f"{tensor.path}: tensor {shown(tensor.name)} has shape {shown(list(tensor.shape))}, "
            f"expected {shown(list(expected))} {why}."
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        raise ConversionError(
            f"{tensor.path}: tensor {shown(tensor.name)} is of type {tensor.dtype}, expected a floating-point weight."
        )
    if not tensor.is_contiguous:
        raise ConversionError(
            f"{tensor.path}: tensor {shown(tensor.name)} is not stored row by row. Save it contiguous."
        )


def _check_same_dtype(tensors: Sequence[StoredTensor]) -> None:
    for tensor in tensors[1:]:
        if tensor.dtype != tensors[0].dtype:
            raise ConversionError(
                f"{tensor.path}: tensor {shown(tensor.name)} is of type {tensor.dtype}, but "
                f"{shown(tensors[0].name)} in {tensors[0].path} is of type {tensors[0].dtype}. They are parts "
                "of one; save them alike."
            )
