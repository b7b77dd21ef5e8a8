"""llmcompressor without data: a folder quantized by rounding, saved, and loaded by transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from quantized import head, load, reference
from safetensors.torch import load_file

BITS = 32  # of a packed integer


class Compressed:
    def __init__(self, folder: str, scheme: str) -> None:
        self.folder = folder
        model = load(folder)
        recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=[head(model)])
        oneshot(model=model, recipe=recipe, trust_remote_code_model=True)
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved, save_compressed=True)
            self.model = load(saved)
            self.weights = stored_weights(Path(saved, "model.safetensors"))

    @torch.no_grad()
    def dequantized(self, ids: list[int]) -> Any:
        found = self.model(torch.tensor([ids])).logits[0]
        return torch.stack([found, reference(self.folder, self.weights, ids)]).numpy()


def stored_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights [out, in] that the packed ones of a file stand for, by the layers' names."""
    tensors, ending = load_file(path), ".weight_packed"
    return {
        name.removesuffix(ending): unpacked(
            packed,
            tensors[name.replace(ending, ".weight_scale")],
            tensors[name.replace(ending, ".weight_shape")].tolist(),
        )
        for name, packed in tensors.items()
        if name.endswith(ending)
    }


def unpacked(packed: torch.Tensor, scale: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """[out, in] of [out, in * bits / 32] integers, the first value lowest, and [out, groups] scales."""
    bits = packed.shape[1] * BITS // shape[1]
    shifts = torch.arange(0, BITS, bits, dtype=torch.int32)
    values = ((packed[:, :, None] >> shifts) & (2**bits - 1)).reshape(shape) - 2 ** (bits - 1)
    return (values.reshape(shape[0], scale.shape[1], -1) * scale[:, :, None]).reshape(shape)


def open_folder(folder: str, way: str) -> Compressed:
    return Compressed(folder, way)
