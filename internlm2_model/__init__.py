"""InternLM2 for Hugging Face transformers: configuration, models and tokenizer."""

from .configuration_internlm2 import InternLM2Config
from .modeling_internlm2 import (
    InternLM2ForCausalLM,
    InternLM2ForQuestionAnswering,
    InternLM2ForRewardModel,
    InternLM2ForSequenceClassification,
    InternLM2ForTokenClassification,
    InternLM2Model,
)
from .tokenization_internlm2 import InternLM2Tokenizer
from .tokenization_internlm2_fast import InternLM2TokenizerFast

__all__ = [
    "InternLM2Config",
    "InternLM2ForCausalLM",
    "InternLM2ForQuestionAnswering",
    "InternLM2ForRewardModel",
    "InternLM2ForSequenceClassification",
    "InternLM2ForTokenClassification",
    "InternLM2Model",
    "InternLM2Tokenizer",
    "InternLM2TokenizerFast",
]
