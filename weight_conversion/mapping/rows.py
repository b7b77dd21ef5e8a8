"""The rows that the tables of both families have, each under its names: norms, linear maps, embedding, head, attention.

Those that ranks share are there in every way in which they do (`choices.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..folders.grid import Grid, Group
from ..folders.internevo_folder import WORD_EMBEDDINGS
from . import llama
from .choices import (
    BIAS,
    HIDDEN_SPLIT,
    INTERLEAVED,
    ISP,
    JOINED_ROWS,
    ORDER_CHOICES,
    OUTER_OVER,
    OWN_ROWS,
    TENSOR_PARALLEL,
    UNNAMED_VOCABULARY_SPLIT,
    VOCABULARY_SPLIT,
)
from .rules import (
    AttentionHeads,
    AttentionRows,
    HeadLayout,
    InPieces,
    JoinedHalves,
    OnRankZero,
    Replicated,
    Rule,
    Separate,
    Split,
)
from .table import Column, Entry, Row

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
