from .configuration_internlm import InternLMConfig
from .modeling_internlm import (
    InternLMForCausalLM,
    InternLMForQuestionAnswering,
    InternLMForSequenceClassification,
    InternLMForTokenClassification,
    InternLMModel,
)
from .tokenization_internlm import InternLMTokenizer
from .tokenization_internlm_fast import InternLMTokenizerFast

__all__ = [
    "InternLMConfig",
    "InternLMForCausalLM",
    "InternLMForQuestionAnswering",
    "InternLMForSequenceClassification",
    "InternLMForTokenClassification",
    "InternLMModel",
    "InternLMTokenizer",
    "InternLMTokenizerFast",
]
