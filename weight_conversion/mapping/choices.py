"""What checkpoints of both families leave open, and what one of them chose: isp, the embedding, the rows of heads.

A choice is a word of a Layout (`table.py`); rows that hold only under one name it.
"""

from __future__ import annotations

from ..errors import ConversionError, shown
from ..folders.grid import FileNames, Group
from ..folders.internevo_folder import WORD_EMBEDDINGS, TrainingCheckpoint
from .table import Layout

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
HALVES, INTERLEAVED = ORDER_CHOICES = "halves", "interleaved"
"""Rows of every q and k head: see `rules.py`."""
BIAS, NO_BIAS = "bias", "no bias"
"""Whether the attention has biases."""

COMMON_CHOICES = (
    (TENSOR_PARALLEL, ISP),
    tuple(OUTER_OVER.values()),
    (HIDDEN_SPLIT, VOCABULARY_SPLIT, UNNAMED_VOCABULARY_SPLIT),
    (OWN_ROWS, JOINED_ROWS),
    ORDER_CHOICES,
    (BIAS, NO_BIAS),
)


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
