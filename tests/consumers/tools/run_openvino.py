"""OpenVINO through optimum-intel, which exports the folder when it loads it; inference in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from optimum.intel import OVModelForCausalLM
from protocol import NEW_TOKENS

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class OpenVino:
    def __init__(self, folder: str) -> None:
        trust = any(Path(folder).glob("modeling_*.py"))
        self.model = OVModelForCausalLM.from_pretrained(
            folder, export=True, trust_remote_code=trust, load_in_8bit=False, ov_config=EXACT
        )

    def logits(self, ids: list[int]) -> Any:
        row = torch.tensor([ids])
        return self.model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].detach().numpy()

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        found = []
        for ids in prompts:
            row = torch.tensor([ids])
            settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
            out = self.model.generate(row, attention_mask=torch.ones_like(row), **settings)
            found.append(out[0, len(ids) :].tolist())
        return found


def open_folder(folder: str, way: str) -> OpenVino:
    return OpenVino(folder)
