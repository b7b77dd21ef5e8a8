"""The classes that vLLM loads: this project's models inside vLLM's Transformers backend.

That backend wants a model without head, calls the head `lm_head`, runs the requests of a step as one row

    tokens      [a a a a a | b | c]      of requests a, b, c
    positions   [0 1 2 3 4 | 5 | 6]

and keeps keys and values itself. Dynamic NTK scaling goes by the length of a request, which the positions of such a
row do not tell: it is taken from what vLLM tells its attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModel
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from internlm2_model import InternLM2Config, InternLM2Model
from internlm2_model.modeling_internlm2 import InternLM2RotaryEmbedding
from internlm_model import InternLMConfig, InternLMModel

from .lengths import refuse_cut_prompts, refuse_longer, request_lengths


# Classes of its own, which AutoModel is told of: what it gives for the families' classes stays as it is.
class ServedInternLMConfig(InternLMConfig):
    __init__ = InternLMConfig.__init__  # else transformers makes one of its own


class ServedInternLM2Config(InternLM2Config):
    __init__ = InternLM2Config.__init__  # else transformers makes one of its own


class ServedInternLMModel(InternLMModel):
    config_class = ServedInternLMConfig


class ServedInternLM2Model(InternLM2Model):
    config_class = ServedInternLM2Config

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.rotary_emb = ServedInternLM2Rotary(config)


class ServedInternLM2Rotary(InternLM2RotaryEmbedding):
    """The family's rotary embedding, by the lengths of requests."""

    def forward(self, position_ids: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype) -> Any:
        if self.config.rope().type == "dynamic" and is_forward_context_available():
            told = request_lengths(get_forward_context().attn_metadata, position_ids.shape[-1])
            lengths = lengths if told is None else told
        return super().forward(position_ids, lengths, dtype)


AutoModel.register(ServedInternLMConfig, ServedInternLMModel, exist_ok=True)
AutoModel.register(ServedInternLM2Config, ServedInternLM2Model, exist_ok=True)


class _Served(TransformersForCausalLM):
    """A family in vLLM; of the folder's own code only the config and the tokenizer are used."""

    served_config: type
    check_lengths: Callable[[int, Any], None]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """
        Raises:
            ValueError: requests may be longer than dynamic NTK scaling can be right for; a setting of config.json
                that the model does not know.
        """
        raw = vllm_config.model_config.hf_config.to_dict()
        config: Any = self.served_config(**{key: value for key, value in raw.items() if key != "model_type"})
        config.auto_map = {}  # nothing of the folder's own code
        if config.rope().type == "dynamic":
            self.check_lengths(config.max_position_embeddings, vllm_config)
        super().__init__(vllm_config=vllm_config.with_hf_config(config), prefix=prefix)


class InternLMForVllm(_Served):
    served_config = ServedInternLMConfig
    check_lengths = staticmethod(refuse_longer)


class InternLM2ForVllm(_Served):
    served_config = ServedInternLM2Config
    check_lengths = staticmethod(refuse_cut_prompts)

    def _create_hf_to_vllm_mapper(self) -> None:
        super()._create_hf_to_vllm_mapper()
        self.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_prefix={"output.": "lm_head."})
        self._maybe_apply_model_mapping()
