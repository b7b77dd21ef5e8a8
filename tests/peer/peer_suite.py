"""transformers' own tests of causal language models, run on both families and, as the control, on Llama.

    TRANSFORMERS_TESTS=/path/to/transformers/tests make peer-tests

The folder is the `tests` of a transformers checkout of the installed version (its package on PyPI lacks some of the
files), and needs `parameterized` installed. None of it is part of this project.
"""

from __future__ import annotations

import importlib
import os
import unittest
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.models.auto import modeling_auto

import internlm2_model
import internlm_model
import tests

PLACE = Path(os.environ.get("TRANSFORMERS_TESTS", ""))
if not (PLACE / "causal_lm_tester.py").is_file():
    raise SystemExit(
        f"TRANSFORMERS_TESTS is {str(PLACE)!r}, and there is no causal_lm_tester.py in it. Name the folder `tests` of "
        "a checkout of github.com/huggingface/transformers at the version that is installed."
    )
# Theirs import one another as parts of a package `tests`, which this repository has, too.
tests.__path__ = [*tests.__path__, str(PLACE)]
theirs: Any = importlib.import_module("tests.causal_lm_tester")
common: Any = importlib.import_module("tests.test_modeling_common")

# Their tests look up by these names what a class takes as labels, and which has no loss.
NAMES: dict[str, Any] = {
    "Model": modeling_auto.MODEL_MAPPING_NAMES,
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
for head, names in NAMES.items():
    names |= {"internlm": f"InternLM{head}", "internlm2": f"InternLM2{head}"}
# And they load by Auto classes without trust_remote_code, for which a class has to be registered.
AUTO_CLASSES: dict[str, Any] = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}


def register(config: Any, prefix: str, module: Any) -> None:
    """Make one family's classes known to the Auto classes."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for head, auto in AUTO_CLASSES.items():
        auto.register(config, getattr(module, prefix + head), exist_ok=True)


register(internlm_model.InternLMConfig, "InternLM", internlm_model)
register(internlm2_model.InternLM2Config, "InternLM2", internlm2_model)

set_rope_of_config = common._set_config_rope_params


def set_known_rope(config: Any, settings: dict[str, Any]) -> Any:
    """Without the key that their "default" rotary type ignores, and that these models refuse by name."""
    known = {name: value for name, value in settings.items() if name != "original_max_position_embeddings"}
    return set_rope_of_config(config, known if config.model_type.startswith("internlm") else settings)


common._set_config_rope_params = set_known_rope

# Tests of what is meant to be otherwise, for both families.
DIFFERENT = {
    "test_sdpa_can_dispatch_non_composite_models": "eager is the default, as config.json of the published models says",
    "test_model_rope_scaling_frequencies": "the rotary embedding takes positions and lengths, and holds no frequencies",
}
YARN = "yarn is no rotary type of these models, and refused by name"


def inputs_of(config: type, prefix: str, module: Any) -> type:
    """Their CausalLMModelTester, which makes configs and inputs, for one family."""
    heads = {
        "base_model_class": "Model",
        "causal_lm_class": "ForCausalLM",
        "sequence_classification_class": "ForSequenceClassification",
        "token_classification_class": "ForTokenClassification",
        "question_answering_class": "ForQuestionAnswering",
    }
    classes = {name: getattr(module, prefix + head) for name, head in heads.items()}
    return type(f"{prefix}Tester", (theirs.CausalLMModelTester,), {"config_class": config, **classes})


def suite(prefix: str, model_tester: Any) -> type:
    """Their tests, as a test case of one family."""
    pipelines = {
        "feature-extraction": model_tester.base_model_class,
        "text-generation": model_tester.causal_lm_class,
        "text-classification": model_tester.sequence_classification_class,
        "token-classification": model_tester.token_classification_class,
        "question-answering": model_tester.question_answering_class,
    }
    members: dict[str, Any] = {"model_tester_class": model_tester, "pipeline_model_mapping": pipelines}
    if prefix != "Llama":
        for name in dir(theirs.CausalLMModelTest):
            reason = YARN if name.startswith("test_") and name.endswith("yarn") else DIFFERENT.get(name)
            if name.startswith("test_eager_matches_sdpa") and name.endswith("output_attentions"):
                reason = "only eager gives attention weights, and asking another backend for them is refused"
            if reason:
                members[name] = unittest.skip(reason)(lambda self: None)
    return type(f"Test{prefix}", (theirs.CausalLMModelTest, unittest.TestCase), members)


class _Llama:
    LlamaModel = LlamaModel
    LlamaForCausalLM = LlamaForCausalLM
    LlamaForSequenceClassification = LlamaForSequenceClassification
    LlamaForTokenClassification = LlamaForTokenClassification
    LlamaForQuestionAnswering = LlamaForQuestionAnswering


TestLlama = suite("Llama", inputs_of(LlamaConfig, "Llama", _Llama))
TestInternLM = suite("InternLM", inputs_of(internlm_model.InternLMConfig, "InternLM", internlm_model))
TestInternLM2 = suite("InternLM2", inputs_of(internlm2_model.InternLM2Config, "InternLM2", internlm2_model))
