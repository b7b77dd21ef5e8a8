"""generate() that compiles itself, and exported programs that take batches of any size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from internlm2_model.modeling_internlm2 import weigh_by_slot
from internlm_model.modeling_internlm import SUMMED_AT_ONCE, is_plain, project, sum_of_products
from tests.support.model_families import FAMILIES, Family, tokens
from tests.support.rounding import assert_near, decided

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)
over_ropes = pytest.mark.parametrize("rope", ["origin", "dynamic"])


def small(family: Family, rope: str) -> Any:
    """One layer of fresh weights: compiling takes long enough."""
    torch.manual_seed(0)
    config = family.config(rope, attn_implementation="sdpa", num_hidden_layers=1, initializer_range=0.2)
    return family.cls("ForCausalLM")(config).eval()


@over_families
@over_ropes
def test_generate_with_a_static_cache_compiles_its_steps(family: Family, rope: str) -> None:
    """As generate() does by itself on a GPU: one graph, without a break, for every step of decoding."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = small(family, rope)
    compiling = CompileConfig(backend="aot_eager", fullgraph=True)
    compiling._compile_all_devices = True  # the CPU, too
    ids = torch.nn.functional.pad(tokens(2, 9), (3, 0))
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = decided(model, ids, **settings)
    compiled = model.generate(ids, **settings, do_sample=False, cache_implementation="static", compile_config=compiling)
    assert torch.equal(compiled, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@over_families
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@torch.no_grad()
def test_compiled_projections_keep_their_biases(family: Family, autocast: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    config = family.config(bias=True, num_hidden_layers=1, initializer_range=0.2)
    model = family.cls("ForCausalLM")(config).eval()
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    for bias in biases:
        torch.nn.init.normal_(bias)
    assert biases
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (tokens(1, 1), tokens(2, 9)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            actual, expected = compiled(ids, use_cache=True), model(ids, use_cache=True)
        keys, expected_keys = (outputs.past_key_values.layers[0].keys for outputs in (actual, expected))
        assert keys.dtype == expected_keys.dtype == (torch.bfloat16 if autocast else torch.float32)
        limit = 0.1 if autocast else 1e-4
        torch.testing.assert_close(keys, expected_keys, atol=limit, rtol=limit)
        torch.testing.assert_close(actual.logits, expected.logits, atol=limit, rtol=limit)


@torch.no_grad()
def test_a_compiled_projection_that_is_more_than_linear_is_called() -> None:
    """Hooks, as offloading and tensor parallelism set them, and other classes, as quantization does."""
    torch.manual_seed(0)
    plain, states = torch.nn.Linear(8, 8), torch.randn(2, 3, 8)
    hooked, replaced, other = (copy.deepcopy(plain) for _ in range(3))
    hooked.register_forward_hook(lambda module, arguments, output: 2 * output)
    replaced.forward = lambda states: torch.nn.functional.linear(states, plain.weight) - 1  # type: ignore[method-assign]
    other.__class__ = type("Other", (torch.nn.Linear,), {"forward": lambda self, states: states + 3})
    for linear in (plain, hooked, replaced, other):
        torch.compiler.reset()
        compiled = torch.compile(project, fullgraph=True, backend="aot_eager")
        for result in compiled(states, linear, plain)[:1] + compiled(states, linear):
            assert_near(result, linear(states))


class Quantized(torch.nn.Parameter):
    """A weight of a class of its own, as torchao puts it into an nn.Linear."""


def test_a_weight_of_another_class_is_not_plain() -> None:
    linear = torch.nn.Linear(8, 8)
    assert is_plain(linear)
    linear.weight = Quantized(linear.weight.detach())
    assert type(linear) is torch.nn.Linear
    assert not is_plain(linear)


@over_families
def test_a_compiled_model_calls_backward_hooks(family: Family) -> None:
    """They may change gradients, as Llama's do."""
    model, ids = small(family, "origin"), tokens(1, 6)
    (layer,) = model.model.layers
    target = layer.self_attn.q_proj if family.name == "internlm" else layer.attention.wqkv
    gradients = []
    for forward in (model, torch.compile(model, backend="eager")):
        torch.compiler.reset()
        hook = target.register_full_backward_hook(lambda module, inputs, outputs: (torch.zeros_like(inputs[0]),))
        model.zero_grad()
        forward(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
        hook.remove()
    assert_near(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [48, 3 * SUMMED_AT_ONCE])
@torch.no_grad()
def test_a_product_written_as_a_sum_is_the_product(dtype: torch.dtype, bias: bool, size: int) -> None:
    """Rounded to its type once, from a sum of float32, whose every addition rounds; in one part, or in several."""
    torch.manual_seed(0)
    linear, states = torch.nn.Linear(size, 20, bias=bias, dtype=dtype), torch.randn(1, 1, size, dtype=dtype)
    exact = copy.deepcopy(linear).double()(states.double())
    found = torch.compile(sum_of_products, fullgraph=True, backend="aot_eager")(states, linear)
    assert found.dtype is dtype
    terms = linear.weight.double().abs() @ states.double().abs().flatten()
    additions = (size + 1) * torch.finfo(torch.float32).eps * terms
    assert ((found - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + additions).all()


@pytest.mark.parametrize("groups", [1, 6, 8])
@torch.no_grad()
def test_values_weighed_by_slot_are_the_product(groups: int) -> None:
    torch.manual_seed(0)
    weights, value = torch.randn(2, 3, groups, 13), torch.randn(2, 3, 13, 16)
    found = torch.compile(weigh_by_slot, fullgraph=True, backend="aot_eager")(weights, value)
    assert found.shape == (2, 3, groups, 16)
    assert_near(found, weights @ value)


def exported(model: Any) -> Any:
    """A program for any batch, and any length up to 64."""
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=64)}
    arguments = {"input_ids": tokens(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.long), "use_cache": False}
    dynamic = {"input_ids": shape, "attention_mask": shape, "use_cache": None}
    return torch.export.export(model, (), arguments, dynamic_shapes=dynamic, strict=False)


@pytest.fixture(scope="module")
def exporting() -> None:
    """Skips where transformers' own Llama cannot be exported with any length, as with torch 2.9."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).eval()
    try:
        exported(llama)
    except RuntimeError as error:
        if "is not tracked with proxy" not in str(error):
            raise
        pytest.skip(f"torch {torch.__version__} cannot export transformers' own Llama with any length: {error}")


@over_families
@over_ropes
@pytest.mark.usefixtures("exporting")
@torch.no_grad()
def test_an_exported_program_takes_any_batch_and_length(family: Family, rope: str, tmp_path: Path) -> None:
    model = small(family, rope)
    program = exported(model)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch, length in ((1, 7), (3, 48)):
        ids = tokens(batch, length)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        logits = loaded(input_ids=ids, attention_mask=mask, use_cache=False).logits
        expected = model(ids, attention_mask=mask).logits
        assert_near(logits[mask == 1], expected[mask == 1])


CALLS = ((1, 9, 6), (1, 9, 6), (1, 14, 6), (1, 11, 6), (1, 17, 5), (2, 9, 6), (2, 12, 6))
"""Batch, prompt, new tokens: a second call, longer and shorter prompts, as the turns of a chat are, another batch."""


def compilations(model: Any) -> list[int]:
    """How many graphs each of CALLS compiles, as generate() does by itself on a GPU, with its own compile_config.

    Its tokens are those without a compiler.
    """
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []
    counts = []

    def keep(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for batch, length, new in CALLS:
        ids = tokens(batch, length, seed=length)
        mask = (torch.arange(length) >= torch.arange(batch)[:, None]).long()
        settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": new, "min_new_tokens": new}
        before = len(graphs)
        with (
            patch.object(type(model), "_valid_auto_compile_criteria", lambda *_: True),
            patch("torch._inductor.compile_fx.compile_fx", keep),
        ):
            compiled = model.generate(ids, **settings, do_sample=False, cache_implementation="static")
        assert torch.equal(compiled, decided(model, ids, **settings))
        counts.append(len(graphs) - before)
    return counts


@over_families
@over_ropes
def test_generate_compiles_anew_where_llama_does(family: Family, rope: str) -> None:
    torch.manual_seed(0)
    config = family.config(rope, attn_implementation="sdpa", num_hidden_layers=2, initializer_range=0.2)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=config.vocab_size, initializer_range=0.2)).eval()
    counts = compilations(family.cls("ForCausalLM")(config).eval())
    assert counts == compilations(llama)
    assert counts[0] == 1
    assert sum(counts) == 3
