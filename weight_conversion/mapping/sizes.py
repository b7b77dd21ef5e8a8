"""The sizes of a model, from config.json or from a training checkpoint, and numbers of either's settings, checked."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConversionError, shown
from ..folders.internevo_folder import TrainingCheckpoint
from .rules import AttentionHeads, AttentionRows, InPieces, ModelShape, Split
from .table import LAYER, Layout, Table

LARGEST_SIZE = (1 << 31) - 1
"""No model has a larger one; it keeps arithmetic with sizes from a damaged file small."""

INTERMEDIATE_MULTIPLE = 256
"""The training framework rounds the intermediate size up to a multiple of this."""


def training_shape(checkpoint: TrainingCheckpoint, table: Table, layout: Layout) -> ModelShape:
    """The model's sizes: from model_config.pt, and from the shards what it does not say or says differently.

    Defaults are those of the training framework for keys that its configuration leaves out.
    """
    config, where = checkpoint.config, checkpoint.config_file
    if config.get("num_layers") not in (None, checkpoint.num_layers):
        raise ConversionError(
            f"{where} says num_layers = {shown(config['num_layers'])}, but the shards in {checkpoint.folder} hold "
            f"{checkpoint.num_layers} layers. Shards are missing, or of another run."
        )
    heads = positive_integer(config, "num_attention_heads", where)
    hidden_size = positive_integer(config, "hidden_size", where)
    kv_heads = _kv_heads_found(checkpoint, table, layout, heads, hidden_size)
    shape = ModelShape(
        hidden_size=hidden_size,
        intermediate_size=_size_found("intermediate_size", checkpoint, table, layout),
        vocab_size=_size_found("vocab_size", checkpoint, table, layout),
        num_layers=checkpoint.num_layers,
        num_heads=heads,
        num_kv_heads=positive_integer(config, "num_kv_attention_heads", where, kv_heads),
    )
    return checked_shape(shape, where)


def _kv_heads_found(checkpoint: TrainingCheckpoint, table: Table, layout: Layout, heads: int, hidden_size: int) -> int:
    """The key/value heads that the rows of q, k and v leave; as many as heads where that is no whole number."""
    row = next(row for row in table.rows_for(layout) if isinstance(row.rule, AttentionHeads | AttentionRows | InPieces))
    first = [checkpoint.first(name.replace(LAYER, "0")) for name in row.training]
    rows = sum(tensor.shape[0] for tensor in first if tensor is not None and tensor.shape)
    kv_rows = (rows * checkpoint.grid.size(row.rule.over) - hidden_size) * heads
    found, rest = divmod(kv_rows, 2 * hidden_size)
    return found if rest == 0 and found > 0 else heads


def _size_found(size: str, checkpoint: TrainingCheckpoint, table: Table, layout: Layout) -> int:
    """A size as the first tensor that has it shows it; ConversionError where model_config.pt says otherwise."""
    names = []
    for row in table.rows_for(layout):
        if not isinstance(row.rule, Split) or size not in row.dims[0]:
            continue
        names.append(row.training[0].replace(LAYER, "0"))
        tensor, dim = checkpoint.first(names[-1]), row.dims[0].index(size)
        if tensor is None or len(tensor.shape) != len(row.dims[0]):
            continue
        found = tensor.shape[dim] * (checkpoint.grid.size(row.rule.over) if dim == row.rule.dim else 1)
        if checkpoint.config.get(size) not in (None, found):
            raise ConversionError(
                f"{checkpoint.config_file} says {size} = {shown(checkpoint.config[size])}, but tensor "
                f"{shown(tensor.name)} of shape {shown(list(tensor.shape))} in {tensor.path} makes it {found}. "
                "Shards are missing, or the file belongs to another checkpoint."
            )
        return found
    raise ConversionError(
        f"{checkpoint.folder}: none of the tensors {', '.join(map(repr, names))} is there, or it has not the number of "
        "dimensions that it should have. The checkpoint is incomplete, or no model of this family: InternLM and "
        "InternLM2 each have their own script."
    )


def hf_shape(config: Mapping[str, Any], where: Path) -> ModelShape:
    """The model's sizes from config.json."""
    heads = positive_integer(config, "num_attention_heads", where)
    shape = ModelShape(
        hidden_size=positive_integer(config, "hidden_size", where),
        intermediate_size=positive_integer(config, "intermediate_size", where),
        vocab_size=positive_integer(config, "vocab_size", where),
        num_layers=positive_integer(config, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=positive_integer(config, "num_key_value_heads", where, heads),
    )
    return checked_shape(shape, where)


def checked_shape(shape: ModelShape, where: Path) -> ModelShape:
    if shape.hidden_size % shape.num_heads or shape.head_dim % 2 or shape.num_heads % shape.num_kv_heads:
        raise ConversionError(
            f"{where}: hidden size {shape.hidden_size}, {shape.num_heads} heads and {shape.num_kv_heads} key/value "
            "heads do not divide into heads of one even size."
        )
    return shape


def positive_integer(config: Mapping[str, Any], key: str, where: Path, default: int | None = None) -> int:
    """A setting, or `default` where it is absent or None; ConversionError where that is no positive whole number."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= LARGEST_SIZE:
        raise ConversionError(f"{where}: {key} is {shown(value)}, expected a positive whole number.")
    return value


def positive_number(config: Mapping[str, Any], key: str, where: Path, default: float | None = None) -> float:
    """A setting, or `default` where it is absent or None; ConversionError where that is no positive finite number."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ConversionError(f"{where}: {key} is {shown(value)}, expected a positive number that a float can hold.")
    return value


def builds_intermediate_size(shape: ModelShape, ratio: object, multiple: int) -> bool:
    """Whether the training framework computes exactly this intermediate size from mlp_ratio and multiple_of.

    It builds `multiple * ceil(int(hidden_size * ratio) / multiple)`.
    """
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio <= LARGEST_SIZE:
        return False
    return -(-int(shape.hidden_size * ratio) // multiple) * multiple == shape.intermediate_size


def mlp_ratio(shape: ModelShape) -> float:
    """A ratio from which the training framework computes exactly this intermediate size, with a multiple_of of it."""
    size = shape.intermediate_size
    ratio = size / shape.hidden_size
    if int(shape.hidden_size * ratio) < size:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return ratio
