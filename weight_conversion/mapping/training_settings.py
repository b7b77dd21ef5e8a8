"""model_config.pt: every setting that InternEvo's models of these families have, and what it may be.

READ settings say what the tensors are, and whoever uses one checks it. A model with another value of a FIXED one
computes what no Hugging Face model of these families does, mostly with tensors of the same names and shapes. The others
change how a model is trained, not what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConversionError, listed, shown

DEFAULT_NORM_EPSILON, DEFAULT_ROPE_BASE = 1e-5, 10000
"""What the training framework takes where its configuration says nothing."""

READ = frozenset(
    {
        "adapt_hf",
        "dtype",
        "embed_split_hidden",
        "enable_qkv_fusion",
        "hidden_size",
        "intermediate_size",
        "layer_norm_epsilon",
        "max_position_embeddings",
        "mlp_layer_fusion",
        "mlp_ratio",
        "multiple_of",
        "no_bias",
        "norm_head",
        "num_attention_heads",
        "num_chunks",
        "num_kv_attention_heads",
        "num_layers",
        "qk_interleaved",
        "rope_base",
        "use_dynamic_ntk_rope",
        "vocab_parallel",
        "vocab_size",
    }
)
IGNORED_BY_05 = (
    " InternEvo 0.5 ignores the setting: if it trained this model, correct it in the file (docs/layouts.md shows how)."
)
FIXED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "apply_post_layer_norm": ((False,), f"the models normalise before attention and MLP, not after.{IGNORED_BY_05}"),
    "deepnorm": ((False,), "the models add residuals as they are."),
    "is_reward": ((False,), "a reward model has a head of its own; only language models can be converted."),
    "norm_type": (("rmsnorm",), "the models have no other norm."),
    "num_experts": ((0, 1), "a mixture of experts (MoE) has no Hugging Face form here; only dense models have."),
    "use_swiglu": ((True,), f"the models have no other activation.{IGNORED_BY_05}"),
}
"""(values that are understood, why no other is)."""
OF_TRAINING = frozenset(
    {
        "attn_drop_rate",
        "attn_other_init_std",
        "attn_wqkv_init_std",
        "checkpoint",
        "device",
        "drop_rate",
        "dropout_selective_checkpoint",
        "embed_grad_scale",
        "embedding_init_std",
        "ffn_other_init_std",
        "ffn_uplayer_init_std",
        "first",
        "init_type",
        "last",
        "model_type",
        "moe_layer_kwargs",
        "moe_type",
        "moe_use_residual",
        "num_shared_experts",
        "out_head_init_std",
        "parallel_output",
        "residual_in_fp32",
        "start_layer_idx",
        "top_k",
        "use_flash_attn",
        "use_scaled_init",
    }
)
PLAIN = ("embed_grad_scale", "use_flash_attn")
"""What is a number, or a yes or no."""
YES_OR_NO = (
    "adapt_hf",
    "enable_qkv_fusion",
    "mlp_layer_fusion",
    "norm_head",
    "qk_interleaved",
    "use_dynamic_ntk_rope",
)


def check_settings(config: Mapping[str, Any], where: Path, warn: Callable[[str], None]) -> None:
    """ConversionError for a value that means another model; a warning for settings that are not known here.

    A setting that is absent or None is the framework's default, which is understood.
    """
    for key, (understood, why) in FIXED.items():
        value = config.get(key)
        if value is not None and not (isinstance(value, bool | int | float | str) and value in understood):
            raise ConversionError(
                f"{where} says {key} = {shown(value)}, expected {' or '.join(map(shown, understood))}: {why}"
            )
    for key in PLAIN:
        if not isinstance(config.get(key), bool | int | float | None):
            raise ConversionError(f"{where}: {key} is {shown(config[key])}, expected a number or a yes or no.")
    for key in YES_OR_NO:
        value = config.get(key)
        if not isinstance(value, bool | int | float | None) or value not in (None, False, True):
            raise ConversionError(f"{where}: {key} is {shown(value)}, expected True or False.")
    unknown = sorted(shown(key) for key in config.keys() - READ - FIXED.keys() - OF_TRAINING)
    if unknown:
        warn(
            f"{where} has settings that are not known here: {listed(unknown)}. If one of them changes what the model "
            "computes, the result is another model: compare its logits with those of training."
        )
