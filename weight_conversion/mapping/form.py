"""What a Hugging Face folder is: the model class that reads it, its tensors, its settings and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConversionError, shown
from ..tokenizer.specs import TokenizerSpec
from .rules import ModelShape
from .table import Table


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, and dynamic NTK scaling by `factor` (None: no scaling)."""

    theta: float
    dynamic_factor: float | None


@dataclass(frozen=True)
class Form:
    """One of the forms that the folders of a family have."""

    name: str
    """What the names of its classes begin with."""
    model_type: str
    code: Path | None
    """The model package that is copied beside the weights; None where transformers itself has the classes."""
    table: Table
    embedding: str
    head: str
    """The names of these two tensors; with tie_word_embeddings a folder leaves the head out: it is the embedding."""
    tokenizer: TokenizerSpec
    config: Callable[[ModelShape, bool, Rope], dict[str, Any]]
    """(shape, has biases, rope) -> keys of config.json that only this form has."""
    check: Callable[[Mapping[str, Any], ModelShape, bool, Path], None]
    """(config.json, shape, has biases, its path): ConversionError where it says what the family cannot be."""
    bias_warning: str | None = None
    """What to say of a model with biases, which some tools drop."""


class Setting(NamedTuple):
    """A key of config.json, what it means where it is absent, what it must say, and why."""

    key: str
    absent: object
    expected: object
    why: str


def hold_biases(names: Iterable[str]) -> bool:
    """Whether there are biases among tensors of these names."""
    return any(name.endswith(".bias") for name in names)


def bias_setting(key: str, has_bias: bool, *, absent: bool) -> Setting:
    """The key by which a form says that there are biases."""
    return Setting(key, absent, has_bias, f"its weight files hold {'all' if has_bias else 'none'} of the biases")


WHOLE_HEAD = Setting("partial_rotary_factor", 1.0, 1.0, "both families turn all of a head")


def require_computation(config: Mapping[str, Any], shape: ModelShape, where: Path) -> None:
    """ConversionError for settings with which either class computes what the training framework does not."""
    heads = "both families have hidden_size / num_attention_heads"
    attends_to_all = "both families attend to every earlier token"
    full = ["full_attention"] * shape.num_layers
    rows = (
        Setting("hidden_act", "silu", "silu", "both families have this activation"),
        Setting("head_dim", shape.head_dim, shape.head_dim, heads),
        WHOLE_HEAD,
        Setting("sliding_window", None, None, attends_to_all),
        Setting("attention_chunk_size", None, None, attends_to_all),
        Setting("layer_types", full, full, attends_to_all),
        Setting("quantization_config", None, None, "the framework loads weights in full"),
    )
    require_settings(config, where, rows)


def require_settings(config: Mapping[str, Any], where: Path, rows: Iterable[Setting]) -> None:
    """ConversionError for the first of the settings that says something else."""
    for setting in rows:
        found = setting.absent if config.get(setting.key) is None else config[setting.key]
        if found != setting.expected:
            raise ConversionError(
                f"{where}: {setting.key} is {shown(found)}, expected {shown(setting.expected)}: {setting.why}."
            )
