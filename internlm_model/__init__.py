from .configuration_internlm import InternLMConfig
from .modeling_internlm import (
    InternLMForCausalLM,
    InternLMForSequenceClassification,
    InternLMModel,
)

__all__ = [
    "InternLMConfig",
    "InternLMForCausalLM",
    "InternLMForSequenceClassification",
    "InternLMModel",
]
