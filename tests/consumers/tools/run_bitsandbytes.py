"""bitsandbytes on a CPU: a folder quantized by transformers when it is loaded, saved so, and loaded again."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from quantized import load, reference
from transformers import BitsAndBytesConfig

SETTINGS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


class Quantized:
    def __init__(self, folder: str, way: str) -> None:
        self.folder = folder
        kind, _, mode = way.partition(", ")
        with tempfile.TemporaryDirectory() as saved:
            load(folder, device_map="cpu", quantization_config=BitsAndBytesConfig(**SETTINGS[kind])).save_pretrained(
                saved
            )
            self.model = load(saved, device_map="cpu")
        # Taken now: the first pass packs them for the processor.
        self.weights = {name: weight for name, layer in self.model.named_modules() for weight in _dequantized(layer)}
        self.model.train(mode == "model.train()")

    @torch.no_grad()
    def dequantized(self, ids: list[int]) -> Any:
        found = self.model(torch.tensor([ids])).logits[0].float()
        return torch.stack([found, reference(self.folder, self.weights, ids)]).numpy()


def _dequantized(layer: Any) -> list[torch.Tensor]:
    """The weight [out, in] of a quantized layer; nothing of others."""
    if isinstance(layer, Linear4bit):
        return [dequantize_4bit(layer.weight.data, layer.weight.quant_state)]
    if isinstance(layer, Linear8bitLt):
        return [int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)]
    return []


def open_folder(folder: str, way: str) -> Quantized:
    return Quantized(folder, way)
