"""OpenVINO on a CPU in float32: a folder exported by optimum-intel, run by it or by openvino-genai."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import openvino
import openvino_genai
import torch
from optimum.exporters.openvino import main_export
from optimum.exporters.openvino.model_configs import LlamaOpenVINOConfig
from optimum.intel import OVModelForCausalLM
from protocol import NEW_TOKENS
from transformers import AutoConfig, AutoTokenizer

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}  # else a CPU may take bfloat16 and int8
TASK = "text-generation-with-past"


def export(folder: str, target: str, way: str) -> None:
    """Writes the folder's model and tokenizer in OpenVINO's format."""
    settings: dict[str, Any] = {"task": TASK, "trust_remote_code": True, "convert_tokenizer": True}
    if "Llama's export config" in way:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        inputs = LlamaOpenVINOConfig(config, task="text-generation", use_past=True, use_past_in_inputs=True)
        settings["custom_export_configs"] = {"model": inputs}
    main_export(folder, target, **settings)


class Optimum:
    def __init__(self, folder: str, target: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.model = OVModelForCausalLM.from_pretrained(target, trust_remote_code=True, ov_config=EXACT)

    def logits(self, ids: list[int]) -> Any:
        row = torch.tensor([ids])
        return self.model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].numpy()

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        rows = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        return self.model.generate(rows, attention_mask=mask, **settings)[:, longest:].tolist()

    def ends(self) -> list[int]:
        named = self.model.generation_config.eos_token_id
        return sorted([named] if isinstance(named, int) else named)


class GenAi:
    def __init__(self, target: str) -> None:
        self.pipeline = openvino_genai.LLMPipeline(target, "CPU", **EXACT)
        self.tokenizer = self.pipeline.get_tokenizer()

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        return [self._continued(np.array([ids], dtype=np.int64)) for ids in prompts]

    def _continued(self, row: Any) -> list[int]:
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        return self.pipeline.generate(openvino.Tensor(row), **settings).tokens[0]

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).input_ids.data[0].tolist()

    def chat(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def completion(self, messages: list[dict[str, str]]) -> str:
        prompt = self.tokenizer.encode(self.chat(messages), add_special_tokens=False)
        return self.tokenizer.decode(self._continued(prompt.input_ids.data))

    def ends(self) -> list[int]:
        return sorted(self.pipeline.get_generation_config().stop_token_ids)


def open_folder(folder: str, way: str) -> Any:
    with tempfile.TemporaryDirectory() as target:
        export(folder, target, way)
        return GenAi(target) if "genai" in way else Optimum(folder, target)
