"""What a Hugging Face folder is: the model class that reads it, its tensors, its settings and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tokenizer.tokenizer_files import TokenizerSpec
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
    tokenizer: TokenizerSpec
    config: Callable[[ModelShape, bool, Rope], dict[str, Any]]
    """(shape, has biases, rope) -> keys of config.json that only this form has."""
    check: Callable[[Mapping[str, Any], ModelShape, bool, Path], None]
    """(config.json, shape, has biases, its path): ConversionError where it says what the family cannot be."""
