"""What the models do where InternEvo's trainer runs, with a small stand-in of its module in sys.modules.

The framework itself is run by `make internevo`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import ModelOutput

from tests.support.model_families import FAMILIES, Family, tokens
from tests.support.rounding import assert_near

MARKS = {
    name: name.lower() for name in ("IS_TENSOR_ZERO_PARALLEL", "IS_TENSOR_DATA_PARALLEL", "IS_REPLICA_ZERO_PARALLEL")
}
Start = Callable[..., None]


@pytest.fixture(params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Puts the framework, started for a tensor-parallel mode and size, among what is imported."""

    def put(tensor: Any, size: int = 1, started: bool = True) -> None:
        context = SimpleNamespace(
            config=SimpleNamespace(parallel={"tensor": tensor}),
            is_initialized=lambda mode: started and mode == "tensor",
            get_world_size=lambda mode: {"tensor": size}[mode],
        )
        module = SimpleNamespace(global_context=context, ParallelMode=SimpleNamespace(TENSOR="tensor"), **MARKS)
        monkeypatch.setitem(sys.modules, "internlm.core.context", module)

    return put


def marks(parameter: Any) -> list[str]:
    return [name for name, mark in MARKS.items() if getattr(parameter, mark, False)]


@pytest.mark.parametrize(
    ("tensor", "size", "expected"),
    [
        ({"size": 1, "mode": "mtp"}, 1, "IS_TENSOR_ZERO_PARALLEL"),
        ({"size": 2, "mode": "mtp"}, 2, "IS_REPLICA_ZERO_PARALLEL"),
        ({"size": 1, "mode": "isp"}, 1, "IS_TENSOR_DATA_PARALLEL"),
        ({"size": 1}, 1, "IS_TENSOR_ZERO_PARALLEL"),
        (1, 1, "IS_TENSOR_ZERO_PARALLEL"),  # a number, in the first versions
    ],
)
def test_every_parameter_has_the_mark_of_the_run(
    family: Family, start: Start, tensor: Any, size: int, expected: str
) -> None:
    start(tensor, size)
    assert {name: marks(each) for name, each in family.model().named_parameters()} == {
        name: [expected] for name in family.golden.state_dict()
    }


def test_a_loaded_model_is_marked(family: Family, start: Start, tmp_path: Path) -> None:
    family.model().save_pretrained(tmp_path)
    start({"size": 1, "mode": "mtp"})
    loaded = family.cls("ForCausalLM").from_pretrained(tmp_path)
    assert all(marks(each) == ["IS_TENSOR_ZERO_PARALLEL"] for each in loaded.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_trainer_gets_the_logits_alone_in_a_tuple(family: Family, start: Start, training: bool) -> None:
    ids = tokens(2, 9)
    expected = family.model().train(training)(ids).logits
    start({"size": 1, "mode": "mtp"})
    model = family.model().train(training)
    outputs = model(input_ids=ids)
    assert type(outputs) is tuple
    (logits,) = outputs
    assert_near(logits, expected)
    loss, logits = model(input_ids=ids, labels=ids)
    assert loss.dim() == 0
    assert_near(logits, expected)


def test_what_asks_for_named_outputs_gets_them(family: Family, start: Start) -> None:
    ids = tokens(1, 5)
    expected = family.model().generate(ids, max_new_tokens=4, do_sample=False)
    start({"size": 1, "mode": "mtp"})
    model = family.model()
    assert isinstance(model(ids, return_dict=True), ModelOutput)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    guessing = {"max_new_tokens": 4, "do_sample": False, "prompt_lookup_num_tokens": 2}  # passes no return_dict
    assert torch.equal(model.generate(ids, **guessing), expected)


@pytest.mark.parametrize(
    "module",
    [
        SimpleNamespace(),
        SimpleNamespace(global_context={}),
        SimpleNamespace(global_context={}, ParallelMode=SimpleNamespace()),
        SimpleNamespace(global_context=SimpleNamespace(config=None), ParallelMode=SimpleNamespace(), **MARKS),
    ],
    ids=["empty", "a dict", "no marks", "not launched"],
)
def test_another_module_of_that_name_is_not_the_framework(
    family: Family, monkeypatch: pytest.MonkeyPatch, module: SimpleNamespace
) -> None:
    monkeypatch.setitem(sys.modules, "internlm.core.context", module)
    assert isinstance(family.model()(tokens(1, 5)), ModelOutput)


def test_a_framework_that_is_only_imported_changes_nothing(family: Family, start: Start) -> None:
    start({"size": 1, "mode": "mtp"}, started=False)
    model = family.model()
    assert not any(marks(each) for each in model.parameters())
    assert isinstance(model(tokens(1, 5)), ModelOutput)


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "bfloat16", torch.bfloat16], ids=str)
def test_the_later_builder_hands_on_its_extra_arguments(family: Family, start: Start, dtype: Any) -> None:
    """InternEvo since autumn 2024: `cfg_extra_kwargs` of its training configuration, and a model without weights."""
    start({"size": 1, "mode": "isp"})
    heads = {"num_key_value_heads": 2} if family.name == "internlm2" else {}
    config = family.cls("Config")(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="silu",
        max_position_embeddings=4096,
        initializer_range=0.02,
        rms_norm_eps=1e-5,
        use_cache=False,
        pad_token_id=None,
        tie_word_embeddings=False,
        bias=False,
        rope_theta=1000000,
        rope_scaling=None,
        attn_implementation="sdpa",
        dtype=dtype,
        return_dict=False,
        **heads,
    )
    assert (config.dtype, config.rope_theta, config.pad_token_id) == (torch.bfloat16, 1000000, None)
    with torch.device("meta"):
        model = family.cls("ForCausalLM")(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert config.to_dict()["torch_dtype"] in ("bfloat16", torch.bfloat16)
