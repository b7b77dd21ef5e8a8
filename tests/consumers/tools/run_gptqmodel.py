"""GPTQModel on a CPU: a folder quantized with a few rows of random tokens, saved, and loaded again."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.models.definitions.internlm import InternLMQModel
from gptqmodel.models.definitions.internlm2 import InternLM2QModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from quantized import reference

SETTINGS: dict[str, Any] = {"trust_remote_code": True, "device": "cpu", "dtype": torch.float32}


class Quantized:
    def __init__(self, folder: str, way: str) -> None:
        self.folder = folder
        if "require_pkgs" in way:
            InternLMQModel.require_pkgs = InternLM2QModel.require_pkgs = None
        rows = torch.randint(3, 300, (16, 128), generator=torch.Generator().manual_seed(3)).tolist()
        calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        with tempfile.TemporaryDirectory() as saved:
            model = GPTQModel.load(folder, QuantizeConfig(bits=4, group_size=128), **SETTINGS)
            model.quantize(calibration, batch_size=1)
            model.save(saved)
            self.model = GPTQModel.load(saved, backend=BACKEND.GPTQ_TORCH, **SETTINGS).model.eval()

    @torch.no_grad()
    def dequantized(self, ids: list[int]) -> Any:
        found = self.model(torch.tensor([ids])).logits[0].float()
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, BaseQuantLinear)}
        weights = {name: layer.dequantize_weight().T.float() for name, layer in layers.items()}
        return torch.stack([found, reference(self.folder, weights, ids)]).numpy()


def open_folder(folder: str, way: str) -> Quantized:
    return Quantized(folder, way)
