"""The recorded numbers of the published model code, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.model_families import FAMILIES, Family
from tests.support.rounding import decided

CLASSES = {
    "causal_lm": "ForCausalLM",
    "base_model": "Model",
    "sequence_classification": "ForSequenceClassification",
}


def cases(kind: str) -> list[Any]:
    return [
        pytest.param(family, name, id=f"{family}-{name}")
        for family in FAMILIES
        for name in family.golden.names(kind)
        if "bf16" not in name
    ]


def golden_model(family: Family, name: str) -> Any:
    case = family.golden.cases[name]
    config = family.cls("Config")(**family.golden.config(name))
    model = family.cls(CLASSES[case["cls"]])(config)
    model.load_state_dict(family.golden.state_dict(case["cls"], bias=config.bias))
    return model.eval()


def stacked(value: Any) -> torch.Tensor:
    return torch.stack(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("family", "name"), cases("forward"))
@torch.no_grad()
def test_forward(family: Family, name: str) -> None:
    case = family.golden.cases[name]
    model = golden_model(family, name)
    inputs = family.golden.inputs(name)
    outputs = model(**inputs)
    for key, expected in family.golden.outputs(name).items():
        actual = stacked(getattr(outputs, key))
        if "compare_mask" in case:
            real = inputs[case["compare_mask"]] == 1
            actual, expected = actual[real], expected[real]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_published_code(family: Family) -> None:
    golden = family.golden
    logits = family.model().bfloat16()(**golden.inputs("origin.bf16_short20")).logits
    assert logits.dtype == torch.bfloat16
    atol = golden.cases["origin.bf16_short20"]["max_abs_vs_fp32"]
    torch.testing.assert_close(logits.float(), golden.outputs("origin.short20")["logits"], atol=atol, rtol=0)


@pytest.mark.parametrize(("family", "name"), cases("incremental"))
@torch.no_grad()
def test_incremental(family: Family, name: str) -> None:
    model = golden_model(family, name)
    input_ids = family.golden.inputs(name)["input_ids"]
    prefill = family.golden.cases[name]["prefill"]
    outputs = model(input_ids[:, :prefill], use_cache=True)
    expected = family.golden.outputs(name)
    torch.testing.assert_close(outputs.logits, expected["prefill_logits"], atol=1e-4, rtol=1e-4)
    steps = [outputs.logits[:, -1]]
    for position in range(prefill, prefill + expected["step_logits"].shape[1] - 1):
        outputs = model(input_ids[:, position : position + 1], past_key_values=outputs.past_key_values)
        steps.append(outputs.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), expected["step_logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), cases("prefixes"))
@torch.no_grad()
def test_prefixes(family: Family, name: str) -> None:
    model = golden_model(family, name)
    input_ids = family.golden.inputs(name)["input_ids"]
    last_logits = [model(input_ids[:, :length]).logits[:, -1] for length in range(20, 37)]
    expected = family.golden.outputs(name)["last_logits"]
    torch.testing.assert_close(torch.stack(last_logits, 1).view_as(expected), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), cases("generate"))
def test_generate(family: Family, name: str) -> None:
    model = golden_model(family, name)
    assert torch.equal(decided(model, **family.golden.inputs(name)), family.golden.outputs(name)["sequences"])
