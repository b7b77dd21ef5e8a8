"""InternLM2: INTERNLM2_PUBLIC in the training framework, InternLM2ForCausalLM in Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..folders.internevo_folder import TrainingCheckpoint
from ..tokenizer.specs import INTERNLM2_TOKENIZER
from .choices import BIAS, COMMON_CHOICES, choices_found
from .family import Family
from .form import Rope
from .llama import DOWN, GATE, HEAD, INPUT_NORM, MLP_NORM, NORM, OUT, UP
from .rows import (
    NARROW,
    RECOMPUTED,
    Names,
    attention_rows,
    embedding_rows,
    gate_up_rows,
    head_rows,
    linear_rows,
    norm_row,
    output_bias_rows,
)
from .rules import Grouped, ModelShape, Separate
from .table import Layout, Table

FUSED, SEPARATE, PIECES = "wqkv", "wq, wk, wv", "wqkv saved as wq, wk, wv"
"""Training holds q, k and v in one weight, or with enable_qkv_fusion=False in three. From September 2024 on it saved
the one weight, not its bias, as three pieces under the names of the three (a hook in internlm/model/modules/mha.py)."""

LAYER, HF_LAYER = "layers.{layer}", "model.layers.{layer}"
ONE = (Grouped(), [f"{LAYER}.attention.wqkv"])
THREE = (Separate(), [f"{LAYER}.attention.wq", f"{LAYER}.attention.wk", f"{LAYER}.attention.wv"])
IN_PIECES = (Grouped(), THREE[1])
HF_ONE = (Grouped(), [f"{HF_LAYER}.attention.wqkv"])
HF_EMBEDDING, HF_HEAD = "model.tok_embeddings.weight", "output.weight"

DROPPED_BIASES = (
    "this InternLM2 model has attention biases. transformers, lmdeploy (PyTorch), mlx-lm and vLLM with this "
    "project's plugin use them; SGLang, and vLLM without the plugin, drop the biases of InternLM2 silently and "
    "answer wrongly. They keep those of --format llama."
)


def _same(name: str, llama: str) -> Names:
    """A tensor of a layer that has one name in training and in the family's own folder."""
    return f"{LAYER}.{name}", f"{HF_LAYER}.{name}", llama


# fmt: off
TABLE = Table(
    rows=(
        *embedding_rows("tok_embeddings", HF_EMBEDDING),
        *attention_rows(ONE, HF_ONE, "weight", FUSED),
        *attention_rows(THREE, HF_ONE, "weight", SEPARATE),
        *attention_rows(IN_PIECES, HF_ONE, "weight", PIECES),
        *attention_rows(ONE, HF_ONE, "bias", FUSED, BIAS),
        *attention_rows(ONE, HF_ONE, "bias", PIECES, BIAS),
        *attention_rows(THREE, HF_ONE, "bias", SEPARATE, BIAS),
        *linear_rows(_same("attention.wo.weight", f"{OUT}.weight"), "hidden_size q_rows", 1),
        *output_bias_rows(_same("attention.wo.bias", f"{OUT}.bias")),
        *gate_up_rows(_same("feed_forward.w1.weight", GATE), _same("feed_forward.w3.weight", UP)),
        *linear_rows(_same("feed_forward.w2.weight", DOWN), NARROW, 1),
        norm_row(_same("attention_norm.weight", INPUT_NORM)),
        norm_row(_same("ffn_norm.weight", MLP_NORM)),
        norm_row(("norm.weight", "model.norm.weight", NORM)),
        *head_rows(("output.weight", HF_HEAD, HEAD)),
    ),
    choices=((FUSED, SEPARATE, PIECES), *COMMON_CHOICES),
    ignored=RECOMPUTED,
)
# fmt: on


def _layout_found(checkpoint: TrainingCheckpoint, version: int | None, warn: Callable[[str], None]) -> Layout:
    names = checkpoint.tensors
    bias = any(f"layers.0.attention.{w}.bias" in names for w in ("wqkv", "wq", "wo"))
    return choices_found(checkpoint, "tok_embeddings", bias=bias) | {_qkv_found(checkpoint, warn)}


def _qkv_found(checkpoint: TrainingCheckpoint, warn: Callable[[str], None]) -> str:
    """Which of the three: the names and shapes of SEPARATE and PIECES are the same."""
    if "layers.0.attention.wq.weight" not in checkpoint.tensors:
        return FUSED
    fused = checkpoint.config.get("enable_qkv_fusion")
    if fused is None and "layers.0.attention.wq.bias" in checkpoint.tensors:
        return SEPARATE  # the framework cuts weights into pieces, no biases
    if fused is None:
        warn(
            f"{checkpoint.folder}: wq, wk and wv are read as pieces of one wqkv, as which InternEvo saves InternLM2 "
            f"since September 2024. If three weights were trained, set enable_qkv_fusion to False in "
            f"{checkpoint.config_file.name}, where it is left out (docs/layouts.md shows how)."
        )
    return PIECES if fused is None or fused else SEPARATE


def _layout_written(common: Layout, version: int, source: Layout) -> Layout:
    """A run with enable_qkv_fusion=False takes a wqkv for [q; k; v], which it is not."""
    return common | {SEPARATE if SEPARATE in source else FUSED}


def _hf_config(rope: Rope) -> dict[str, Any]:
    return {"pretraining_tp": 1}  # as published; nothing here reads it


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
    embedding=HF_EMBEDDING,
    head=HF_HEAD,
    tokenizer=INTERNLM2_TOKENIZER,
    layout_found=_layout_found,
    layout_written=_layout_written,
    hf_config=_hf_config,
    training_config=_training_config,
    bias_warning=DROPPED_BIASES,
)
