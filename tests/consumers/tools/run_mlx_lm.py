"""mlx-lm on a CPU."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step
from protocol import NEW_TOKENS

mx.set_default_device(mx.cpu)


class MlxLm:
    def __init__(self, folder: str) -> None:
        self.model, self.tokenizer = load(folder, tokenizer_config={"trust_remote_code": True})

    def logits(self, ids: list[int]) -> Any:
        return np.array(self.model(mx.array([ids]))[0])

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        return [
            [int(token) for token, _ in generate_step(mx.array(ids), self.model, max_tokens=NEW_TOKENS)]
            for ids in prompts
        ]

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True))

    def ends(self) -> list[int]:
        return sorted(self.tokenizer.eos_token_ids)


def open_folder(folder: str, way: str) -> MlxLm:
    return MlxLm(folder)
