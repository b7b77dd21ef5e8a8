from .configuration_internlm import InternLMConfig
from .modeling_internlm import (
    InternLMForCausalLM,
    InternLMForSequenceClassification,
    InternLMModel,
)
from .tokenization_internlm import InternLMTokenizer

__all__ = [
    "InternLMConfig",
    "InternLMForCausalLM",
    "InternLMForSequenceClassification",
    "InternLMModel",
    "InternLMTokenizer",
]
