"""transformers' pipeline of that name: the last hidden states of every token, averaged here."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


class Features:
    def __init__(self, folder: str, way: str) -> None:
        settings: dict[str, Any] = {"trust_remote_code": True}
        model: Any = folder
        if "model=" in way:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **settings).eval().model
        tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
        self.pipeline = pipeline("feature-extraction", model=model, tokenizer=tokenizer, dtype="float32", **settings)

    def embeddings(self, texts: list[str]) -> Any:
        return [self.pipeline(text, return_tensors=True)[0].mean(0).tolist() for text in texts]


def open_folder(folder: str, way: str) -> Features:
    return Features(folder, way)
