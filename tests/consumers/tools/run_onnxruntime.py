"""onnxruntime on what torch.onnx.export makes of the model without a cache, batch and length left open."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class OnnxRuntime:
    def __init__(self, folder: str, trust: bool) -> None:
        settings = {"trust_remote_code": trust, "dtype": torch.float32, "attn_implementation": "sdpa"}
        model = Logits(AutoModelForCausalLM.from_pretrained(folder, **settings)).eval()
        ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(1))
        axes = {0: Dim("batch"), 1: Dim("length")}
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "model.onnx")
            torch.onnx.export(
                model,
                (ids, torch.ones_like(ids)),
                str(file),
                dynamo=True,
                dynamic_shapes=(axes, axes),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
            )
            self.session = onnxruntime.InferenceSession(file)

    def logits(self, ids: list[int]) -> Any:
        row = np.array([ids], dtype=np.int64)
        return self.session.run(None, {"input_ids": row, "attention_mask": np.ones_like(row)})[0][0]


def open_folder(folder: str, way: str) -> OnnxRuntime:
    return OnnxRuntime(
        folder, Path(folder, "modeling_internlm.py").exists() or Path(folder, "modeling_internlm2.py").exists()
    )
