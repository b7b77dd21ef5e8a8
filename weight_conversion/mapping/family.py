"""What a model family is to a conversion: its table, its configuration on both sides, its code and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConversionError, shown
from ..folders.internevo_folder import TrainingCheckpoint
from ..tokenizer.specs import TokenizerSpec
from . import llama
from .form import Form, Rope, bias_setting, require_computation, require_settings
from .rules import ModelShape
from .table import Layout, Table

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Family:
    """A model family. The functions differ between families, the flows that call them do not."""

    name: str
    model_type: str
    package: str
    table: Table
    embedding: str
    head: str
    """The names of these two tensors in the family's own Hugging Face folder."""
    tokenizer: TokenizerSpec
    layout_found: Callable[[TrainingCheckpoint, int | None, Callable[[str], None]], Layout]
    """(checkpoint, --version or None, warn) -> the choices that its tensors were saved under."""
    layout_written: Callable[[Layout, int, Layout], Layout]
    """(choices of either family, --version, those that the source was saved under) -> all that reverting writes."""
    hf_config: Callable[[Rope], dict[str, Any]]
    """Keys of config.json that only this family has."""
    training_config: Callable[[ModelShape, Mapping[str, Any], Rope], dict[str, Any]]
    """(shape, config.json, rope) -> keys of model_config.pt that only this family has."""
    shares_kv_heads: bool = True
    """Whether there may be fewer key/value heads than query heads."""
    bias_warning: str | None = None
    """What to say of a model with biases in the family's own folder."""

    @property
    def code(self) -> Path:
        return REPOSITORY / self.package

    @cached_property
    def forms(self) -> dict[str, Form]:
        """The forms that a Hugging Face folder may have, by their `model_type`; the family's own one first."""
        own = Form(
            name=self.name,
            model_type=self.model_type,
            code=self.code,
            table=self.table,
            embedding=self.embedding,
            head=self.head,
            tokenizer=self.tokenizer,
            config=self._own_config,
            check=_check_own,
            bias_warning=self.bias_warning,
        )
        return {form.model_type: form for form in (own, llama.llama_form(self.table, self.tokenizer))}

    def form_of(self, config: Mapping[str, Any], where: Path) -> Form:
        """The form whose class has this config.json; ConversionError where the family has none."""
        form = self.forms.get(str(config.get("model_type")))
        if form is None:
            raise ConversionError(
                f"{where} is of model_type {shown(config.get('model_type'))}, expected "
                f"{' or '.join(map(repr, self.forms))}. Each family has its own script."
            )
        return form

    def _own_config(self, shape: ModelShape, has_bias: bool, rope: Rope) -> dict[str, Any]:
        modeling = f"modeling_{self.model_type}.{self.name}"
        return {
            "attn_implementation": "eager",
            "auto_map": {
                "AutoConfig": f"configuration_{self.model_type}.{self.name}Config",
                "AutoModel": f"{modeling}ForCausalLM",
                "AutoModelForCausalLM": f"{modeling}ForCausalLM",
                "AutoModelForSequenceClassification": f"{modeling}ForSequenceClassification",
                "AutoModelForTokenClassification": f"{modeling}ForTokenClassification",
                "AutoModelForQuestionAnswering": f"{modeling}ForQuestionAnswering",
            },
            "bias": has_bias,
            **self.hf_config(rope),
        }

    def check_heads(self, shape: ModelShape, where: Path) -> None:
        """ConversionError where the family has no model with these heads."""
        if not self.shares_kv_heads and shape.num_kv_heads != shape.num_heads:
            raise ConversionError(
                f"{where}: {shape.num_heads} heads share {shape.num_kv_heads} key/value heads, but {self.name} "
                "has as many of the one as of the other. InternLM2 shares them, and has its own script. Of InternLM, "
                "shards of the last ranks are missing."
            )


def _check_own(config: Mapping[str, Any], shape: ModelShape, has_bias: bool, where: Path) -> None:
    """ConversionError for every setting with which the family's own class computes what training does not."""
    require_computation(config, shape, where)
    require_settings(config, where, [bias_setting("bias", has_bias, absent=has_bias)])
