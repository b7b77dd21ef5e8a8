"""InternLM2: INTERNLM2_PUBLIC in the training framework, InternLM2ForCausalLM in Hugging Face folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..folders.internevo_folder import TrainingCheckpoint
from ..tokenizer.tokenizer_files import INTERNLM2_TOKENIZER
from .family import (
    BIAS,
    BIAS_CHOICES,
    EMBEDDING_CHOICES,
    HALVES,
    HIDDEN_SPLIT,
    NO_BIAS,
    ORDER_CHOICES,
    RECOMPUTED,
    VOCABULARY_SPLIT,
    Family,
    Rope,
    attention_rows,
    embedding_found,
    embedding_rows,
    order_found,
    row,
)
from .rules import Grouped, ModelShape, OnRankZero, Replicated, Separate, Split
from .table import Layout, Table

FUSED, SEPARATE = "wqkv", "wq, wk, wv"
"""Training holds q, k and v in one tensor, or (its load hooks split it) in three."""

LAYER, HF_LAYER = "layers.{layer}", "model.layers.{layer}"
ONE = (Grouped(), [f"{LAYER}.attention.wqkv"])
THREE = (Separate(), [f"{LAYER}.attention.wq", f"{LAYER}.attention.wk", f"{LAYER}.attention.wv"])
HF_ONE = (Grouped(), [f"{HF_LAYER}.attention.wqkv"])
WIDE, NARROW = "intermediate_size hidden_size", "hidden_size intermediate_size"

# fmt: off
TABLE = Table(
    rows=(
        *embedding_rows("tok_embeddings", "model.tok_embeddings.weight"),
        *attention_rows(ONE, HF_ONE, "weight", FUSED),
        *attention_rows(THREE, HF_ONE, "weight", SEPARATE),
        *attention_rows(ONE, HF_ONE, "bias", FUSED, BIAS),
        *attention_rows(THREE, HF_ONE, "bias", SEPARATE, BIAS),
        row(f"{LAYER}.attention.wo.weight", f"{HF_LAYER}.attention.wo.weight", "hidden_size q_rows", Split(1)),
        row(f"{LAYER}.attention.wo.bias", f"{HF_LAYER}.attention.wo.bias", "hidden_size", OnRankZero(), BIAS),
        row(f"{LAYER}.feed_forward.w1.weight", f"{HF_LAYER}.feed_forward.w1.weight", WIDE, Split(0)),
        row(f"{LAYER}.feed_forward.w3.weight", f"{HF_LAYER}.feed_forward.w3.weight", WIDE, Split(0)),
        row(f"{LAYER}.feed_forward.w2.weight", f"{HF_LAYER}.feed_forward.w2.weight", NARROW, Split(1)),
        row(f"{LAYER}.attention_norm.weight", f"{HF_LAYER}.attention_norm.weight", "hidden_size", Replicated()),
        row(f"{LAYER}.ffn_norm.weight", f"{HF_LAYER}.ffn_norm.weight", "hidden_size", Replicated()),
        row("norm.weight", "model.norm.weight", "hidden_size", Replicated()),
        row("output.weight", "output.weight", "vocab_size hidden_size", Split(0)),
    ),
    choices=(EMBEDDING_CHOICES, (FUSED, SEPARATE), ORDER_CHOICES, BIAS_CHOICES),
    ignored=RECOMPUTED,
)
# fmt: on


def _layout_found(checkpoint: TrainingCheckpoint, version: int | None) -> Layout:
    names = checkpoint.tensors
    bias = any(f"layers.0.attention.{w}.bias" in names for w in ("wqkv", "wq", "wo"))
    return frozenset(
        {
            embedding_found(checkpoint, "tok_embeddings"),
            SEPARATE if "layers.0.attention.wq.weight" in names else FUSED,
            order_found(checkpoint),
            BIAS if bias else NO_BIAS,
        }
    )


def _layout_written(bias: bool, embed_split: bool, version: int) -> Layout:
    return frozenset({HIDDEN_SPLIT if embed_split else VOCABULARY_SPLIT, FUSED, HALVES, BIAS if bias else NO_BIAS})


def _hf_config(rope: Rope) -> dict[str, Any]:
    return {}


def _training_config(shape: ModelShape, config: Mapping[str, Any], rope: Rope) -> dict[str, Any]:
    return {
        "num_kv_attention_heads": shape.num_kv_heads,
        "no_bias": not config["bias"],
        "adapt_hf": True,
        "norm_head": False,
        "max_position_embeddings": config["max_position_embeddings"],
        "use_dynamic_ntk_rope": rope.dynamic_factor is not None,
    }


INTERNLM2 = Family(
    name="InternLM2",
    model_type="internlm2",
    package="internlm2_model",
    table=TABLE,
    tokenizer=INTERNLM2_TOKENIZER,
    layout_found=_layout_found,
    layout_written=_layout_written,
    hf_config=_hf_config,
    training_config=_training_config,
)
