"""Matches the tensors of a folder with the entries of a table: every one used once, every one found, every shape right.

The result is moves: which windows of which tensors hold the same elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import ConversionError, shown
from ..files.copying import Move
from ..files.views import StoredTensor, TensorSpec
from ..folders.internevo_folder import TrainingCheckpoint, shard_name
from .rules import ModelShape
from .table import Entry, Layout, Table

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Match:
    """An entry with its tensors: `fulls` by Hugging Face name, `parts` by rank and training name."""

    entry: Entry
    fulls: Sequence[StoredTensor]
    parts: Sequence[Sequence[StoredTensor]]

    def moves(self, shape: ModelShape) -> list[Move]:
        """One move per full tensor; of a replicated tensor one per rank, each of which holds all of it."""
        fulls, parts = (
            [full.view() for full in self.fulls],
            [[part.view() for part in rank] for rank in self.parts],
        )
        if self.entry.rule.replicated:
            return [Move(self.fulls[0], (pair,)) for pair in self.entry.rule.pairs(fulls, parts, shape)]
        pairs = list(self.entry.rule.pairs(fulls, parts, shape))
        return [Move(full, tuple(pair for pair in pairs if pair[0].tensor is full)) for full in self.fulls]


def match_training(
    checkpoint: TrainingCheckpoint, table: Table, layout: Layout, shape: ModelShape
) -> list[tuple[Entry, list[list[StoredTensor]]]]:
    """Every entry with the tensors of each rank that holds it; ConversionError names what does not fit."""
    entries = table.entries(layout, shape)
    found = {name: tensor for name in checkpoint.tensors if (tensor := checkpoint.first(name))}
    _refuse_unknown(found, {name for entry in entries for name in entry.training}, table)
    return [(entry, _parts_of(entry, checkpoint, shape)) for entry in entries]


def _parts_of(entry: Entry, checkpoint: TrainingCheckpoint, shape: ModelShape) -> list[list[StoredTensor]]:
    tp_size = checkpoint.tp_size
    shapes = part_shapes(entry, tp_size, shape)
    holders = entry.rule.holders(tp_size)
    parts: list[list[StoredTensor]] = [[] for _ in holders]
    for name, expected in zip(entry.training, shapes, strict=True):
        ranks = checkpoint.tensors.get(name, [None] * tp_size)
        for rank, tensor in enumerate(ranks):
            if rank not in holders:
                if tensor is not None:
                    raise ConversionError(f"{tensor.path}: tensor {tensor.name!r} is not expected on rank {rank}.")
                continue
            if tensor is None:
                raise ConversionError(
                    f"{checkpoint.folder}: tensor {name!r} (layers counted through the pipeline) is in none of "
                    f"{shard_name(rank, '*')}, expected on each of {len(holders)} tensor-parallel ranks. The "
                    "checkpoint is incomplete or no model of this family."
                )
            _check(tensor, expected, f"on each of {tp_size} tensor-parallel ranks")
            parts[rank].append(tensor)
    _check_same_dtype([tensor for rank in parts for tensor in rank])
    return parts


def match_hf(
    tensors: Mapping[str, StoredTensor], table: Table, layout: Layout, shape: ModelShape, where: str
) -> list[tuple[Entry, list[StoredTensor]]]:
    """Every entry with its Hugging Face tensors; ConversionError names what does not fit."""
    entries = table.entries(layout, shape)
    _refuse_unknown(tensors, {name for entry in entries for name in entry.hf}, table)
    matched = []
    for entry in entries:
        fulls = []
        for name, expected in zip(entry.hf, entry.hf_shapes, strict=True):
            if name not in tensors:
                raise ConversionError(f"{where} lacks tensor {name!r}, which a model of its config.json has.")
            _check(tensors[name], expected, "from config.json")
            fulls.append(tensors[name])
        _check_same_dtype(fulls)
        matched.append((entry, fulls))
    return matched


def part_shapes(entry: Entry, tp_size: int, shape: ModelShape) -> list[tuple[int, ...]]:
    """Shapes of a rank's tensors of `entry`; ConversionError where `tp_size` does not divide them."""
    try:
        return entry.rule.part_shapes(entry.hf_shapes, tp_size, shape)
    except ValueError as error:
        raise ConversionError(
            f"tensor {entry.training[0]!r} cannot be split over {tp_size} tensor-parallel ranks: {error}. "
            "Choose a tensor-parallel size that divides the key/value heads, the hidden and the intermediate size."
        ) from error


def part_specs(entry: Entry, fulls: Sequence[StoredTensor], tp_size: int, shape: ModelShape) -> list[TensorSpec]:
    """The tensors that a rank which holds `entry` is to have."""
    shapes = part_shapes(entry, tp_size, shape)
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
            f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, expected {list(expected)} {why}."
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        raise ConversionError(
            f"{tensor.path}: tensor {tensor.name!r} is of type {tensor.dtype}, expected a floating-point weight."
        )
    if not tensor.is_contiguous:
        raise ConversionError(f"{tensor.path}: tensor {tensor.name!r} is not stored row by row. Save it contiguous.")


def _check_same_dtype(tensors: Sequence[StoredTensor]) -> None:
    for tensor in tensors[1:]:
        if tensor.dtype != tensors[0].dtype:
            raise ConversionError(
                f"{tensor.path}: tensor {tensor.name!r} is of type {tensor.dtype}, but {tensors[0].name!r} in "
                f"{tensors[0].path} is of type {tensors[0].dtype}. They are parts of one; save them alike."
            )
