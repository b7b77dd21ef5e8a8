"""Llama: transformers' own LlamaForCausalLM, as which every tool knows a model of either family.

InternLM is a Llama with attention biases, and its tensors have Llama's names. InternLM2 is one whose q, k and v lie in
one tensor and whose other tensors have other names. So each family's table has a column with the names below.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConversionError, shown
from ..tokenizer.specs import TokenizerSpec
from .form import Form, Rope, Setting, bias_setting, require_computation, require_settings
from .rules import ModelShape, Separate
from .table import LAYER, Table

MODEL_TYPE = "llama"

ROPE_TYPES = ("default", "dynamic")

_LAYER = f"model.layers.{LAYER}"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
QKV = (Separate(), tuple(f"{_LAYER}.self_attn.{x}_proj" for x in "qkv"))
OUT = f"{_LAYER}.self_attn.o_proj"
GATE, UP, DOWN = (f"{_LAYER}.mlp.{x}_proj.weight" for x in ("gate", "up", "down"))
INPUT_NORM, MLP_NORM = f"{_LAYER}.input_layernorm.weight", f"{_LAYER}.post_attention_layernorm.weight"


def llama_form(table: Table, tokenizer: TokenizerSpec) -> Form:
    """The Llama form of a family with this table and tokenizer."""
    return Form(
        name="Llama",
        model_type=MODEL_TYPE,
        code=None,
        table=table.as_llama(),
        embedding=EMBEDDING,
        head=HEAD,
        tokenizer=tokenizer.without_code(),
        config=_config,
        check=_check,
    )


def _config(shape: ModelShape, has_bias: bool, rope: Rope) -> dict[str, Any]:
    return {
        "attention_bias": has_bias,
        "attention_dropout": 0.0,
        "head_dim": shape.head_dim,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }


def _check(config: Mapping[str, Any], shape: ModelShape, has_bias: bool, where: Path) -> None:
    """ConversionError for every setting with which a Llama computes what no InternLM or InternLM2 does."""
    require_computation(config, shape, where)
    rows = (
        bias_setting("attention_bias", has_bias, absent=False),
        Setting("tie_word_embeddings", False, False, "both families have a head of their own"),
        Setting("mlp_bias", False, False, "both families have no biases in the MLP"),
        Setting("auto_map", None, None, "code beside the weights may compute anything"),
    )
    require_settings(config, where, rows)
    for key in ("rope_parameters", "rope_scaling"):
        settings = config.get(key)
        if isinstance(settings, dict):
            _check_rope(settings, f"{where}: {key}")


def _check_rope(settings: Mapping[str, Any], where: str) -> None:
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ConversionError(
            f"{where} is of type {shown(kind)}, but both families know {' and '.join(ROPE_TYPES)} only."
        )
