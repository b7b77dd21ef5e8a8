"""What a quantized model has to answer: the folder's own model, with the weights that the quantized ones stand for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM


def load(folder: str, **settings: Any) -> Any:
    """The folder's model in float32, in evaluation."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **settings).eval()


def head(model: Any) -> str:
    """The name of the layer that gives the logits, which is never quantized: `lm_head`, InternLM2's `output`."""
    return next(name for name, layer in model.named_modules() if layer is model.get_output_embeddings())


@torch.no_grad()
def reference(folder: str, weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of the folder's model with these weights in place of its own.

    Args:
        weights: [out, in] of every linear layer but the head, by the layer's name.

    Raises:
        ValueError: they are those of other layers: something was not quantized, or the head was.
    """
    model = load(folder)
    linear = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)} - {head(model)}
    if set(weights) != linear:
        raise ValueError(f"Quantized are {sorted(weights)}, not {sorted(linear)}.")
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight)
    return model(torch.tensor([ids])).logits[0]
