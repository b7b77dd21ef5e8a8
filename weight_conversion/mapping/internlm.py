"""InternLM: INTERNLM in the training framework, InternLMForCausalLM in Hugging Face folders.

Two generations of MLP names (the tensors are the same): version 1, before February 2024, calls the up projection w2
and the down projection w3; version 2 calls up w3 and down w2. Llama-like names (`layers.*`, wq wk wv, no biases) are
what an older reverting script wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConversionError
from ..folders.internevo_folder import TrainingCheckpoint
from ..tokenizer.tokenizer_files import INTERNLM_TOKENIZER
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
from .rules import ModelShape, OnRankZero, Replicated, Separate, Split, Stacked
from .table import Layout, Row, Table

NATIVE, LLAMA_LIKE = "native names", "Llama-like names"
VERSION_1, VERSION_2 = "up is w2, down is w3", "up is w3, down is w2"

HF_LAYER = "model.layers.{layer}"
HF_THREE = (Separate(), [f"{HF_LAYER}.self_attn.{x}_proj" for x in "qkv"])
BLOCK, LAYER = "blocks.{layer}", "layers.{layer}"
ONE = (Stacked(), [f"{BLOCK}.mixer.Wqkv"])
THREE = (Separate(), [f"{LAYER}.attention.w{x}" for x in "qkv"])
O_PROJ, HIDDEN = f"{HF_LAYER}.self_attn.o_proj", "hidden_size"
INPUT_NORM, POST_ATTENTION_NORM = f"{HF_LAYER}.input_layernorm", f"{HF_LAYER}.post_attention_layernorm"


def _mlp_rows(stem: str, names: str) -> list[Row]:
    """Gate, up and down projection of `stem`, under the names of both versions."""
    gate, up, down = (f"{HF_LAYER}.mlp.{x}_proj.weight" for x in ("gate", "up", "down"))
    wide, narrow = "intermediate_size hidden_size", "hidden_size intermediate_size"
    return [
        row(f"{stem}.w1.weight", gate, wide, Split(0), names),
        row(f"{stem}.w2.weight", up, wide, Split(0), names, VERSION_1),
        row(f"{stem}.w3.weight", up, wide, Split(0), names, VERSION_2),
        row(f"{stem}.w3.weight", down, narrow, Split(1), names, VERSION_1),
        row(f"{stem}.w2.weight", down, narrow, Split(1), names, VERSION_2),
    ]


# fmt: off
TABLE = Table(
    rows=(
        *embedding_rows("embedding", "model.embed_tokens.weight", NATIVE),
        *embedding_rows("tok_embeddings", "model.embed_tokens.weight", LLAMA_LIKE),
        *attention_rows(ONE, HF_THREE, "weight", NATIVE),
        *attention_rows(ONE, HF_THREE, "bias", NATIVE, BIAS),
        *attention_rows(THREE, HF_THREE, "weight", LLAMA_LIKE),
        row(f"{BLOCK}.mixer.out_proj.weight", f"{O_PROJ}.weight", "hidden_size q_rows", Split(1), NATIVE),
        row(f"{BLOCK}.mixer.out_proj.bias", f"{O_PROJ}.bias", HIDDEN, OnRankZero(), NATIVE, BIAS),
        row(f"{LAYER}.attention.wo.weight", f"{O_PROJ}.weight", "hidden_size q_rows", Split(1), LLAMA_LIKE),
        *_mlp_rows(f"{BLOCK}.mlp", NATIVE),
        *_mlp_rows(f"{LAYER}.feed_forward", LLAMA_LIKE),
        row(f"{BLOCK}.norm1.weight", f"{INPUT_NORM}.weight", HIDDEN, Replicated(), NATIVE),
        row(f"{LAYER}.attention_norm.weight", f"{INPUT_NORM}.weight", HIDDEN, Replicated(), LLAMA_LIKE),
        row(f"{BLOCK}.norm2.weight", f"{POST_ATTENTION_NORM}.weight", HIDDEN, Replicated(), NATIVE),
        row(f"{LAYER}.ffn_norm.weight", f"{POST_ATTENTION_NORM}.weight", HIDDEN, Replicated(), LLAMA_LIKE),
        row("norm.weight", "model.norm.weight", HIDDEN, Replicated()),
        row("head.weight", "lm_head.weight", "vocab_size hidden_size", Split(0), NATIVE),
        row("output.weight", "lm_head.weight", "vocab_size hidden_size", Split(0), LLAMA_LIKE),
    ),
    choices=((NATIVE, LLAMA_LIKE), EMBEDDING_CHOICES, ORDER_CHOICES, (VERSION_1, VERSION_2), BIAS_CHOICES),
    ignored=RECOMPUTED,
)
# fmt: on


def _layout_found(checkpoint: TrainingCheckpoint, version: int | None) -> Layout:
    llama_like = any(name.startswith("layers.0.") for name in checkpoint.tensors)
    mlp = "layers.0.feed_forward" if llama_like else "blocks.0.mlp"
    bias = any(f"blocks.0.mixer.{w}.bias" in checkpoint.tensors for w in ("Wqkv", "out_proj"))
    return frozenset(
        {
            LLAMA_LIKE if llama_like else NATIVE,
            embedding_found(checkpoint, "tok_embeddings" if llama_like else "embedding"),
            order_found(checkpoint),
            VERSION_1 if _mlp_version(checkpoint, mlp, version) == 1 else VERSION_2,
            BIAS if bias else NO_BIAS,
        }
    )


def _mlp_version(checkpoint: TrainingCheckpoint, mlp: str, version: int | None) -> int:
    """1 where w2 has the shape of an up projection, 2 where it has that of a down one, else what the user says."""
    w1, w2 = checkpoint.first(f"{mlp}.w1.weight"), checkpoint.first(f"{mlp}.w2.weight")
    if w1 is None or w2 is None:
        raise ConversionError(f"{checkpoint.folder} lacks {mlp}.w1.weight or w2.weight: no InternLM checkpoint.")
    if w1.shape == w1.shape[::-1]:
        if version is None:
            raise ConversionError(
                f"{w1.path}: w1, w2 and w3 are square ({list(w1.shape)}), so their shapes do not tell which is the up "
                "projection. Say --version 1 (trained before February 2024: up is w2) or --version 2 (up is w3)."
            )
        return version
    found = 1 if w2.shape == w1.shape else 2
    if version not in (None, found):
        raise ConversionError(f"{w2.path}: the shapes of w1 and w2 are those of --version {found}, not {version}.")
    return found


def _layout_written(bias: bool, embed_split: bool, version: int) -> Layout:
    return frozenset(
        {
            NATIVE,
            HIDDEN_SPLIT if embed_split else VOCABULARY_SPLIT,
            HALVES,
            VERSION_1 if version == 1 else VERSION_2,
            BIAS if bias else NO_BIAS,
        }
    )


def _hf_config(rope: Rope) -> dict[str, Any]:
    if rope.dynamic_factor is None:
        return {"rotary": {"base": rope.theta, "type": "origin"}}
    return {"rotary": {"base": rope.theta, "type": "dynamic", "scaling_factor": rope.dynamic_factor}}


def _training_config(shape: ModelShape, config: Mapping[str, Any], rope: Rope) -> dict[str, Any]:
    return {}


INTERNLM = Family(
    name="InternLM",
    model_type="internlm",
    package="internlm_model",
    table=TABLE,
    tokenizer=INTERNLM_TOKENIZER,
    layout_found=_layout_found,
    layout_written=_layout_written,
    hf_config=_hf_config,
    training_config=_training_config,
)
