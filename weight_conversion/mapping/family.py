"""What a model family is to a conversion: its table, its configuration on both sides, its code and its tokenizer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConversionError, shown
from ..folders.grid import FileNames, Grid, Group
from ..folders.internevo_folder import WORD_EMBEDDINGS, TrainingCheckpoint
from ..tokenizer.specs import TokenizerSpec
from . import llama
from .form import Form, Rope, check_computation, check_settings
from .rules import (
    AttentionHeads,
    AttentionRows,
    HeadLayout,
    InPieces,
    JoinedHalves,
    ModelShape,
    OnRankZero,
    Replicated,
    Rule,
    Separate,
    Split,
)
from .table import LAYER, Column, Entry, Layout, Row, Table

REPOSITORY = Path(__file__).resolve().parents[2]

LARGEST_SIZE = (1 << 31) - 1
"""No model has a larger one; it keeps arithmetic with sizes from a damaged file small."""

INTERMEDIATE_MULTIPLE = 256
"""The training framework rounds the intermediate size up to a multiple of this."""


@dataclass(frozen=True)
class Family:
    """A model family. The functions differ between families, the flows that call them do not."""

    name: str
    model_type: str
    package: str
    table: Table
    tokenizer: TokenizerSpec
    layout_found: Callable[[TrainingCheckpoint, int | None, Callable[[str], None]], Layout]
    """(checkpoint, --version or None, warn) -> the choices that its tensors were saved under."""
    layout_written: Callable[[Layout, int, Layout], Layout]
    """(choices of either family, --version, those that the source was saved under) -> all that reverting writes."""
    hf_config: Callable[[Rope], dict[str, Any]]
    """Keys of config.json that only this family has."""
    training_config: Callable[[ModelShape, Mapping[str, Any], Rope], dict[str, Any]]
    """(shape, config.json, rope) -> keys of model_config.pt that only this family has."""

    shares_kv_heads: bool = True
    """Whether there may be fewer key/value heads than query heads."""

    @property
    def code(self) -> Path:
        return REPOSITORY / self.package

    @cached_property
    def forms(self) -> dict[str, Form]:
        """The forms that a Hugging Face folder may have, by their `model_type`; the family's own one first."""
        own = Form(self.name, self.model_type, self.code, self.table, self.tokenizer, self._own_config, _check_own)
        return {form.model_type: form for form in (own, llama.llama_form(self.table, self.tokenizer))}

    def _own_config(self, shape: ModelShape, has_bias: bool, rope: Rope) -> dict[str, Any]:
        modeling = f"modeling_{self.model_type}.{self.name}"
        return {
            "attn_implementation": "eager",
            "auto_map": {
                "AutoConfig": f"configuration_{self.model_type}.{self.name}Config",
                "AutoModel": f"{modeling}ForCausalLM",
                "AutoModelForCausalLM": f"{modeling}ForCausalLM",
                "AutoModelForSequenceClassification": f"{modeling}ForSequenceClassification",
                "AutoModelForTokenClassification": f"{modeling}ForTokenClassification",
                "AutoModelForQuestionAnswering": f"{modeling}ForQuestionAnswering",
            },
            "bias": has_bias,
            **self.hf_config(rope),
        }

    def check_heads(self, shape: ModelShape, where: Path) -> None:
        """ConversionError where the family has no model with these heads."""
        if not self.shares_kv_heads and shape.num_kv_heads != shape.num_heads:
            raise ConversionError(
                f"{where}: {shape.num_heads} heads share {shape.num_kv_heads} key/value heads, but {self.name} "
                "has as many of the one as of the other. InternLM2 shares them, and has its own script. Of InternLM, "
                "shards of the last ranks are missing."
            )


def _check_own(config: Mapping[str, Any], shape: ModelShape, has_bias: bool, where: Path) -> None:
    """ConversionError for every setting with which the family's own class computes what training does not."""
    check_computation(config, shape, where)
    held = "all" if has_bias else "none"
    check_settings(config, where, [("bias", has_bias, has_bias, f"its weight files hold {held} of the biases")])


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


# ------------------------------------------------------------------ choices that checkpoints of both families make

TENSOR_PARALLEL, ISP = "cut over tensor-parallel ranks", "cut over weight-parallel ranks"
"""Every layer's linear maps: over which ranks, and so how."""
OUTER_OVER = {Group.TENSOR: "ends over tensor-parallel ranks", Group.WEIGHT: "ends over weight-parallel ranks"}
"""Over which ranks the embedding and the head are cut."""
HIDDEN_SPLIT, VOCABULARY_SPLIT, UNNAMED_VOCABULARY_SPLIT = (
    "hidden split",
    "vocabulary split",
    "unnamed vocabulary split",
)
"""Embedding of a rank: its columns [V, H/n]; its rows [V/n, H]; its rows under the name that columns have."""
OWN_ROWS, JOINED_ROWS = "gate and up each cut", "gate and up cut as one"
"""Of isp: with `mlp_layer_fusion` training cuts [gate; up], and saves the halves of each chunk as gate and up."""
HALVES, INTERLEAVED = "halves", "interleaved"
BIAS, NO_BIAS = "bias", "no bias"

EMBEDDING_CHOICES = (HIDDEN_SPLIT, VOCABULARY_SPLIT, UNNAMED_VOCABULARY_SPLIT)
ORDER_CHOICES = (HALVES, INTERLEAVED)
BIAS_CHOICES = (BIAS, NO_BIAS)
COMMON_CHOICES = (
    (TENSOR_PARALLEL, ISP),
    tuple(OUTER_OVER.values()),
    EMBEDDING_CHOICES,
    (OWN_ROWS, JOINED_ROWS),
    ORDER_CHOICES,
    BIAS_CHOICES,
)

RECOMPUTED = (r".*rotary_emb\.inv_freq",)
"""Tables that old checkpoints carry and that every model computes."""

Names = tuple[str, str, str]
"""(training name, name in the family's own Hugging Face folder, name in a Llama folder)."""
Heads = tuple[HeadLayout, Sequence[str]]
"""How q, k and v lie in tensors, and the names of these."""
WIDE, NARROW = "intermediate_size hidden_size", "hidden_size intermediate_size"


def row(names: Names, dims: str, rule: Rule, *only: str) -> Row:
    """A row of one tensor in each column; `dims` are words."""
    training, own, other = names
    shapes = (tuple(dims.split()),)
    return Row((training,), (own,), shapes, rule, frozenset(only), Column((other,), shapes, rule))


def norm_row(names: Names, *only: str) -> Row:
    return row(names, "hidden_size", Replicated(), *only)


def linear_rows(names: Names, dims: str, dim: int, *only: str) -> list[Row]:
    """A weight that tensor-parallel ranks share along `dim`; weight-parallel ranks share the rows of every weight."""
    return [
        row(names, dims, Split(dim), TENSOR_PARALLEL, *only),
        row(names, dims, Split(0, Group.WEIGHT), ISP, *only),
    ]


def output_bias_rows(names: Names, *only: str) -> list[Row]:
    """The bias of the attention's output."""
    return [
        row(names, "hidden_size", OnRankZero(), TENSOR_PARALLEL, BIAS, *only),
        row(names, "hidden_size", Split(0, Group.WEIGHT), ISP, BIAS, *only),
    ]


def gate_up_rows(gate: Names, up: Names, *only: str) -> list[Row]:
    """The gate and the up projection, which training may fuse."""
    apart = [
        row(names, WIDE, rule, mode, *more, *only)
        for names in (gate, up)
        for rule, mode, more in (
            (Split(0), TENSOR_PARALLEL, ()),
            (Split(0, Group.WEIGHT), ISP, (OWN_ROWS,)),
        )
    ]
    training, own, other = zip(gate, up, strict=True)
    shapes = (tuple(WIDE.split()),) * 2
    joined, rule = frozenset({ISP, JOINED_ROWS, *only}), JoinedHalves()
    return [*apart, Row(training, own, shapes, rule, joined, Column(other, shapes, rule))]


def embedding_rows(stem: str, hf: str, *only: str) -> list[Row]:
    """The embedding `stem`, in the three ways that ranks share it."""
    dims = "vocab_size hidden_size"
    return [
        row((f"{stem}{name}.weight", hf, llama.EMBEDDING), dims, Split(dim, group), choice, outer, *only)
        for group, outer in OUTER_OVER.items()
        for name, dim, choice in (
            ("", 1, HIDDEN_SPLIT),
            (WORD_EMBEDDINGS, 0, VOCABULARY_SPLIT),
            ("", 0, UNNAMED_VOCABULARY_SPLIT),
        )
    ]


def whole_embedding_name(entry: Entry, grid: Grid) -> str | None:
    """The other name of an embedding split along the vocabulary where one rank holds all of it, so that it is whole.

    The framework's versions look under one name or the other, and leave an embedding that they do not find random.
    """
    plain = entry.training[0].replace(WORD_EMBEDDINGS, "")
    return plain if plain != entry.training[0] and grid.size(entry.rule.over) == 1 else None


def head_rows(names: Names, *only: str) -> list[Row]:
    """The output weight, whose rows ranks share."""
    dims = "vocab_size hidden_size"
    return [row(names, dims, Split(0, group), outer, *only) for group, outer in OUTER_OVER.items()]


def attention_rows(training: Heads, hf: Heads, kind: str, *only: str) -> list[Row]:
    """The q, k and v tensors (`kind`: weight or bias), with heads in halves and interleaved.

    Where the layout is of one tensor and the names are three, training saves pieces of that tensor under them.
    """
    layout, names = training
    in_pieces = len(names) > 1 and not isinstance(layout, Separate)
    rows = []
    for order in ORDER_CHOICES:
        for mode, rule in ((TENSOR_PARALLEL, AttentionHeads), (ISP, AttentionRows)):
            wholes = [rule(layout, form[0], interleaved=order == INTERLEAVED) for form in (hf, llama.QKV)]
            own, other = (
                _heads_column(form, kind, InPieces(whole) if in_pieces else whole)
                for form, whole in zip((hf, llama.QKV), wholes, strict=True)
            )
            parts = tuple(f"{name}.{kind}" for name in names)
            rows.append(Row(parts, own.hf, own.dims, own.rule, frozenset({order, mode, *only}), other))
    return rows


def _heads_column(form: Heads, kind: str, rule: Rule) -> Column:
    _, names = form
    rows_of = {1: ("qkv_rows",), 3: ("q_rows", "kv_rows", "kv_rows")}[len(names)]
    dims = tuple((rows, "hidden_size") if kind == "weight" else (rows,) for rows in rows_of)
    return Column(tuple(f"{name}.{kind}" for name in names), dims, rule)


def common_choices(names: FileNames, embedding: str, order: str, *, joined: bool, bias: bool) -> Layout:
    """What a layout of either family says."""
    return frozenset(
        {
            ISP if names.is_isp else TENSOR_PARALLEL,
            OUTER_OVER[names.outer_group],
            embedding,
            JOINED_ROWS if joined else OWN_ROWS,
            order,
            BIAS if bias else NO_BIAS,
        }
    )


def choices_found(checkpoint: TrainingCheckpoint, embedding: str, *, bias: bool) -> Layout:
    """What the checkpoint chose of that; `embedding` is the stem of its name."""
    return common_choices(
        checkpoint.grid.names,
        embedding_found(checkpoint, embedding),
        order_found(checkpoint),
        joined=bool(checkpoint.config.get("mlp_layer_fusion", False)),
        bias=bias,
    )


def embedding_found(checkpoint: TrainingCheckpoint, stem: str) -> str:
    """How the ranks share the embedding `stem`: decided by its name and, under the plain name, by its shape."""
    if f"{stem}{WORD_EMBEDDINGS}.weight" in checkpoint.tensors:
        return VOCABULARY_SPLIT
    plain, hidden_size = checkpoint.first(f"{stem}.weight"), checkpoint.config.get("hidden_size")
    whole_rows = plain is not None and plain.shape[1:] == (hidden_size,)
    shared = checkpoint.grid.size(checkpoint.grid.names.outer_group) > 1
    return UNNAMED_VOCABULARY_SPLIT if whole_rows and shared else HIDDEN_SPLIT


def order_found(checkpoint: TrainingCheckpoint) -> str:
    """How q and k heads have their rows: `qk_interleaved`, or its older opposite `adapt_hf`; in halves by default."""
    interleaved, adapt_hf = checkpoint.config.get("qk_interleaved"), checkpoint.config.get("adapt_hf")
    if interleaved is not None and adapt_hf is not None and bool(interleaved) == bool(adapt_hf):
        raise ConversionError(
            f"{checkpoint.config_file} says qk_interleaved = {shown(interleaved)} and adapt_hf = {shown(adapt_hf)}, "
            "which contradict each other."
        )
    if interleaved is None:
        interleaved = adapt_hf is not None and not adapt_hf
    return INTERLEAVED if interleaved else HALVES
