"""Weights quantized by torchao while a folder is loaded, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, TorchAoConfig

from tests.support.model_families import FAMILIES, INTERNLM, Family, tokens
from tests.support.rounding import assert_near, decided

INT8, INT4 = Int8WeightOnlyConfig(), IntxWeightOnlyConfig(torch.int4, PerGroup(32))
INT8_ACTIVATIONS = Int8DynamicActivationInt8WeightConfig()

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="cpu", **kwargs)


def quantized(family: Family, kind: Any, folder: Path) -> Any:
    """The golden model, all linear layers but the head quantized."""
    family.model("dynamic").save_pretrained(folder)
    model = load(folder, quantization_config=TorchAoConfig(kind))
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    assert len(linears) == model.config.num_hidden_layers * (7 if family is INTERNLM else 5)
    assert all(isinstance(linear.weight, TorchAOBaseTensor) for linear in linears)
    return model


@over_families
@pytest.mark.parametrize("kind", [INT8, INT4], ids=["int8", "int4 in groups of 32"])
@torch.no_grad()
def test_quantized_weights_compute_what_their_values_do(family: Family, kind: Any, tmp_path: Path) -> None:
    model, ids = quantized(family, kind, tmp_path), tokens(2, 40)
    plain = family.model("dynamic")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, TorchAOBaseTensor):
            plain.get_parameter(name).copy_(parameter.dequantize())
    assert_near(model(ids).logits, plain(ids).logits)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8}
    generated = model.generate(ids[:, :8], do_sample=False, **settings)
    assert torch.equal(generated, decided(plain, ids[:, :8], **settings))


def int8_products_are_exact() -> bool:
    """Whether torch multiplies int8 matrices rightly here: oneDNN overflows on processors without VNNI."""
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest) == 64 * 127**2).all())


@pytest.mark.skipif(not int8_products_are_exact(), reason="torch's int8 products overflow on this processor")
@over_families
@torch.no_grad()
def test_quantized_activations_change_little(family: Family, tmp_path: Path) -> None:
    ids = tokens(2, 40)
    exact, near = family.model("dynamic")(ids).logits, quantized(family, INT8_ACTIVATIONS, tmp_path)(ids).logits
    assert (near - exact).var() < 0.01 * exact.var()


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 writes such weights to no safetensors file")
@over_families
@pytest.mark.parametrize("kind", [INT8, INT4, INT8_ACTIVATIONS], ids=["int8", "int4", "int8 activations"])
@torch.no_grad()
def test_a_quantized_model_is_saved_and_loaded(family: Family, kind: Any, tmp_path: Path) -> None:
    model, ids = quantized(family, kind, tmp_path / "plain"), tokens(2, 40)
    model.save_pretrained(tmp_path / "quantized")
    assert_near(load(tmp_path / "quantized")(ids).logits, model(ids).logits)
