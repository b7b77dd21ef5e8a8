"""What config.json of a Hugging Face folder says in the words of the training framework, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConversionError, shown
from .form import WHOLE_HEAD, Rope
from .sizes import hf_shape, positive_integer, positive_number
from .training_settings import DEFAULT_NORM_EPSILON, DEFAULT_ROPE_BASE

HF_NORM_EPSILON, HF_ROPE_BASE, HF_POSITIONS = 1e-6, 10000, 2048
"""What the configuration classes take where config.json says nothing."""
FACTORS = ("factor", "scaling_factor")
ROPE_KEYS = {"rope_type", "type", "rope_theta", "base", *FACTORS}


def training_settings(config: Mapping[str, Any], where: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The keys of model_config.pt that a run on the Hugging Face class with this configuration should have had."""
    shape, rope = hf_shape(config, where), rope_of(config, where, warn)
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "num_attention_heads": shape.num_heads,
        "num_kv_attention_heads": shape.num_kv_heads,
        "layer_norm_epsilon": positive_number(config, "rms_norm_eps", where, HF_NORM_EPSILON),
        "rope_base": rope.theta,
        "use_dynamic_ntk_rope": rope.dynamic_factor is not None,
        "max_position_embeddings": positive_integer(config, "max_position_embeddings", where, HF_POSITIONS),
    }


def hf_settings(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The keys of config.json that reverting reads, from those of model_config.pt."""
    base = positive_number(config, "rope_base", where, DEFAULT_ROPE_BASE)
    return {
        "rms_norm_eps": positive_number(config, "layer_norm_epsilon", where, DEFAULT_NORM_EPSILON),
        **hf_rope(Rope(base, 1.0 if config.get("use_dynamic_ntk_rope") else None)),
        "max_position_embeddings": positive_integer(config, "max_position_embeddings", where, HF_POSITIONS),
    }


def hf_rope(rope: Rope) -> dict[str, Any]:
    """The rotary settings in the spelling before transformers 5 and in the one since."""
    theta, factor = rope.theta, rope.dynamic_factor
    if factor is None:
        current: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
        return {"rope_theta": theta, "rope_scaling": None, "rope_parameters": current}
    return {
        "rope_theta": theta,
        "rope_scaling": {"type": "dynamic", "factor": factor},
        "rope_parameters": {"rope_theta": theta, "rope_type": "dynamic", "factor": factor},
    }


def rope_of(config: Mapping[str, Any], where: Path, warn: Callable[[str], None]) -> Rope:
    """The rotary settings in whichever spelling config.json has; ConversionError where two spellings disagree."""
    parameters, scaling, rotary = (
        _settings(config, key, where) for key in ("rope_parameters", "rope_scaling", "rotary")
    )
    spellings = [spelled for spelled in (parameters, scaling, rotary) if spelled]
    given_bases = ((config, "rope_theta"), (parameters, "rope_theta"), (rotary, "base"))
    bases = {positive_number(given, key, where) for given, key in given_bases if given.get(key) is not None}
    kinds = {str(spelled.get("rope_type") or spelled.get("type") or "default") for spelled in spellings}
    kinds = {"default" if kind == "origin" else kind for kind in kinds}
    factors = {
        positive_number(spelled, key, where) for spelled in spellings for key in FACTORS if spelled.get(key) is not None
    }
    if len(bases) > 1 or len(kinds) > 1 or (kinds == {"dynamic"} and len(factors) > 1):
        raise ConversionError(
            f"{where} gives several rotary settings that contradict each other: bases {shown(sorted(bases))}, "
            f"types {shown(sorted(kinds))}, factors {shown(sorted(factors))}. Keep one."
        )
    kind = kinds.pop() if kinds else "default"
    if kind not in ("default", "dynamic"):
        warn(f"rotary scaling {shown(kind)} has no counterpart in InternEvo: only the base is kept.")
    return Rope(
        bases.pop() if bases else HF_ROPE_BASE, (factors.pop() if factors else 1.0) if kind == "dynamic" else None
    )


def _settings(config: Mapping[str, Any], key: str, where: Path) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ConversionError(f"{where}: {key} is {shown(value)}, expected an object of settings.")
    unknown = sorted(
        name
        for name, setting in value.items()
        if name not in ROPE_KEYS and setting is not None and (name, setting) != (WHOLE_HEAD.key, WHOLE_HEAD.expected)
    )
    if unknown:
        raise ConversionError(f"{where}: {key} has {shown(unknown[0])}, which is no setting of either family.")
    return value
