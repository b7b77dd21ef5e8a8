"""generate() in its ways, and compiled and exported forward passes."""

from __future__ import annotations

import inspect
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AttentionInterface, CompileConfig, DynamicCache, GenerationMixin, StaticCache, masking_utils

from internlm2_model.compat_internlm2 import CACHE_NAME
from tests.support.model_families import FAMILIES, Family, checkpoint_activations, padded, tokens
from tests.support.rounding import assert_near, decided

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)
over_ropes = pytest.mark.parametrize("rope", ["origin", "dynamic"])
over_backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def greedy(model: Any, ids: torch.Tensor, new: int = 12, **kwargs: Any) -> torch.Tensor:
    """`new` greedy tokens after ids, whatever they are; none of them by a near tie."""
    return decided(model, ids, max_new_tokens=new, min_new_tokens=new, **kwargs)[:, -new:]


@over_families
@over_ropes
@over_backends
def test_greedy_with_and_without_a_cache(family: Family, rope: str, backend: str) -> None:
    model = family.model(rope, attn_implementation=backend)
    ids = tokens(2, 10)
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


@over_families
@over_ropes
@over_backends
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_rows_go_on_as_they_do_alone(family: Family, rope: str, backend: str, cache: str) -> None:
    model = family.model(rope, attn_implementation=backend)
    model.generation_config.disable_compile = True
    rows = [tokens(1, 6, seed=1), tokens(1, 11, seed=2)]
    ids = torch.stack([torch.nn.functional.pad(row[0], (14 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(14) >= 14 - row.shape[1] for row in rows]).long()
    batch = greedy(model, ids, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(batch, torch.cat([greedy(model, row) for row in rows]))


@over_families
@over_ropes
def test_beam_search_with_and_without_a_cache(family: Family, rope: str) -> None:
    model = family.model(rope)
    ids = tokens(2, 8, seed=3)
    settings = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert cached.shape[1] > ids.shape[1]


@over_families
@over_ropes
def test_sampling_repeats_with_the_seed(family: Family, rope: str) -> None:
    model = family.model(rope)
    ids = tokens(1, 8)
    samples = []
    for _ in range(2):
        torch.manual_seed(0)
        samples.append(model.generate(ids, max_new_tokens=8, do_sample=True, top_k=20))
    assert torch.equal(*samples)


@over_families
@over_ropes
@pytest.mark.parametrize("draft", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}], ids=str)
def test_drafted_tokens_change_nothing(family: Family, rope: str, draft: dict[str, int]) -> None:
    """Tokens guessed from the prompt, or by the first layers alone, are checked by the whole model."""
    model = family.model(rope)
    ids = tokens(1, 9).repeat(1, 2)
    settings = {"max_new_tokens": 10, "eos_token_id": -1}
    drafted = model.generate(ids, do_sample=False, **settings, **draft)
    assert torch.equal(drafted, decided(model, ids, **settings))


@over_families
def test_generation_from_embeddings(family: Family) -> None:
    model = family.model()
    ids = tokens(1, 8)
    embeds = model.get_input_embeddings()(ids)
    generated = model.generate(inputs_embeds=embeds, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(generated, greedy(model, ids, 6))


@over_families
@over_ropes
@over_backends
@torch.no_grad()
def test_forward_compiles_as_one_graph(family: Family, rope: str, backend: str) -> None:
    """No branch on data: one graph serves sequences below and beyond the trained length."""
    torch.compiler.reset()
    model = family.model(rope, attn_implementation=backend)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for length in (20, 48):
        ids = tokens(2, length)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        actual = compiled(ids, attention_mask=mask, use_cache=False).logits[mask == 1]
        assert_near(actual, model(ids, attention_mask=mask).logits[mask == 1])


@over_families
@over_ropes
@torch.no_grad()
def test_static_cache_decoding_compiles_as_one_graph(family: Family, rope: str) -> None:
    torch.compiler.reset()
    model = family.model(rope, attn_implementation="sdpa")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = tokens(1, 16)
    cache = StaticCache(config=model.config, max_cache_len=24)
    model(ids[:, :12], past_key_values=cache)
    for position in range(12, 16):
        positions = torch.tensor([[position]])
        logits = compiled(ids[:, position : position + 1], position_ids=positions, past_key_values=cache).logits
    assert_near(logits[:, -1], model(ids).logits[:, -1])


@over_families
@over_ropes
@torch.no_grad()
def test_forward_exports(family: Family, rope: str) -> None:
    model = family.model(rope)
    ids = tokens(2, 16)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    assert_near(exported.module()(ids, use_cache=False).logits, model(ids).logits)


@over_families
@over_backends
@pytest.mark.parametrize("rope", ["origin", "dynamic"])
@pytest.mark.parametrize("decoding", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_every_cache_gives_the_tokens_of_no_cache(
    family: Family, backend: str, rope: str, decoding: dict[str, Any]
) -> None:
    model = family.model(rope, attn_implementation=backend)
    model.generation_config.disable_compile = True
    rows = [tokens(1, 6, seed=1), tokens(1, 11, seed=2)]
    ids = torch.stack([torch.nn.functional.pad(row[0], (14 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(14) >= 14 - row.shape[1] for row in rows]).long()
    beams = decoding.get("num_beams", 1)
    generate = greedy if beams == 1 else searched
    for prompt, seen in ((rows[1], torch.ones_like(rows[1])), (ids, mask)):
        cached = generate(model, prompt, attention_mask=seen, **decoding)
        assert torch.equal(cached, generate(model, prompt, attention_mask=seen, num_beams=beams, use_cache=False))


@over_families
@over_backends
@pytest.mark.parametrize("decoding", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_a_backend_for_pages_without_pages_is_that_backend(
    family: Family, backend: str, decoding: dict[str, Any]
) -> None:
    """Up to transformers 5.8, generate_batch leaves "paged|" in the config."""
    model = family.model("dynamic", attn_implementation=backend)
    model.generation_config.disable_compile = True
    ids, mask = padded([tokens(1, 6, seed=1), tokens(1, 11, seed=2)], "left")
    expected = searched(model, ids, attention_mask=mask, **decoding)
    model.config._attn_implementation = f"paged|{backend}"
    assert torch.equal(searched(model, ids, attention_mask=mask, **decoding), expected)
    assert model.config._attn_implementation == f"paged|{backend}"


@over_families
@over_ropes
def test_a_static_cache_counts_keys_of_zeros(family: Family, rope: str) -> None:
    """A padding token whose embedding is zero, without biases."""
    model = family.model(rope, bias=False)
    model.generation_config.disable_compile = True
    ids, mask = padded([tokens(1, 6, seed=1), tokens(1, 11, seed=2)], "left")
    with torch.no_grad():
        model.get_input_embeddings().weight[ids[mask == 0]] = 0
    cached = greedy(model, ids, attention_mask=mask, cache_implementation="static")
    assert torch.equal(cached, greedy(model, ids, attention_mask=mask, use_cache=False))


@over_families
@over_ropes
@over_backends
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_within_a_row_is_passed_over(family: Family, rope: str, backend: str, cache: str) -> None:
    """As the second turn of a left-padded batch leaves it."""
    model = family.model(rope, attn_implementation=backend)
    model.generation_config.disable_compile = True
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 5:8], mask[1, :2] = 0, 0
    batch = greedy(model, ids, attention_mask=mask, cache_implementation=cache)
    alone = [greedy(model, row[real == 1][None], use_cache=False) for row, real in zip(ids, mask, strict=True)]
    assert torch.equal(batch, torch.cat(alone))


@torch.no_grad()
def counted_from_the_mask(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """12 greedy tokens, each by a pass over all, which counts the real tokens by itself."""
    for _ in range(12):
        ids = torch.cat((ids, model(ids, attention_mask=mask, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    return ids[:, -12:]


@over_families
@over_ropes
@over_backends
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_after_right_padding_the_real_tokens_are_counted(family: Family, rope: str, backend: str, cache: str) -> None:
    """generate() from 5.4 on would begin anew at position 1.

    Earlier ones give 1 to the padding, from whose last column the first token comes; the rest is counted there, too.
    """
    model = family.model(rope, attn_implementation=backend)
    model.generation_config.disable_compile = True
    ids, mask = padded([tokens(1, 7, seed=1), tokens(1, 11, seed=2)], "right")
    settings = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    if hasattr(GenerationMixin, "_prepare_position_ids_for_generation"):
        expected = counted_from_the_mask(model, ids, mask)
    else:
        expected = greedy(model, ids, attention_mask=mask, use_cache=False)
    assert torch.equal(greedy(model, ids, attention_mask=mask, **settings), expected)


def searched(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """12 tokens after ids that a search found."""
    return model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, **kwargs)[:, -12:]


@over_families
@pytest.mark.parametrize("name", ["past_key_values", "cache", "memory"])
def test_the_cache_is_known_by_what_it_is(family: Family, name: str) -> None:
    model, ids = family.model(), tokens(1, 12)
    with torch.no_grad():
        first = model(ids[:, :8], **{name: DynamicCache()})
        second = model(ids[:, 8:], **{name: first[name]})
        assert_near(second.logits, model(ids).logits[:, 8:])


@over_families
def test_two_caches_are_refused_by_name(family: Family) -> None:
    with pytest.raises(ValueError, match="cache and past_key_values are different ones"):
        family.model()(tokens(1, 4), cache=DynamicCache(), past_key_values=DynamicCache())


@over_families
@over_backends
@pytest.mark.parametrize("masked", [True, False])
def test_generate_compiles_as_one_graph(family: Family, backend: str, masked: bool) -> None:
    model, ids = family.model("dynamic", attn_implementation=backend), tokens(1, 10)
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    whole = CompileConfig(fullgraph=True, backend="eager", mode=None)
    whole._compile_all_devices = True
    torch.compiler.reset()
    compiled = greedy(model, ids, new=6, cache_implementation="static", compile_config=whole, **mask)
    assert torch.equal(compiled, greedy(model, ids, new=6, use_cache=False, **mask))


UNKNOWN = {"a tensor": torch.ones(1, 4), "a flag": True, "a flag off": False, "a number": 2.0, "a name": "linear"}


@over_families
@over_backends
@pytest.mark.parametrize("value", UNKNOWN.values(), ids=list(UNKNOWN))
def test_an_unknown_argument_is_refused_by_name(family: Family, backend: str, value: Any) -> None:
    model = family.model(attn_implementation=backend)
    with pytest.raises(TypeError, match="does not know token_weights"):
        model(tokens(1, 4), token_weights=value)
    model(tokens(1, 4), token_weights=None)


@over_families
def test_a_backend_of_others_gets_arguments_of_its_own(family: Family) -> None:
    model, seen = family.model(), []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        seen.append(kwargs["attention_instances"])
        return query.transpose(1, 2), None

    AttentionInterface.register("engine", attend)
    model.config._attn_implementation = "engine"
    model(tokens(1, 4), attention_instances={0: "layer"}, use_cache=False)
    assert seen == [{0: "layer"}] * model.config.num_hidden_layers


@over_families
def test_checkpointing_refuses_a_filled_cache_and_makes_none(family: Family) -> None:
    model, ids = family.model(), tokens(1, 8)
    cache = model(ids, use_cache=True, return_dict=False)[1]
    model.train()
    checkpoint_activations(model)
    outputs = model(ids, use_cache=True, labels=ids, return_dict=False)
    assert [tuple(output.shape) for output in outputs] == [(), (1, 8, model.config.vocab_size)]
    with pytest.raises(ValueError, match="runs layers twice"):
        model(ids, past_key_values=cache)


def slots_seen(mask: torch.Tensor) -> torch.Tensor:
    """Which slots of the cache a prepared mask [B, 1, T, S], boolean or additive, lets a token see."""
    return mask if mask.dtype == torch.bool else mask == 0


@over_families
@over_backends
def test_masks_for_a_static_cache_show_what_those_of_transformers_show(family: Family, backend: str) -> None:
    """Before every pass of generate(): ours for one token, theirs for more."""
    model = family.model("origin", attn_implementation=backend)
    own, shapes = type(model).create_masks_for_generate, []

    def compared(self: Any, **arguments: Any) -> Any:
        found, theirs = own(self, **arguments), masking_utils.create_masks_for_generate(**arguments)
        shapes.append(tuple(found.shape))
        assert torch.equal(slots_seen(found), slots_seen(theirs).expand_as(found))
        return found

    padding = (torch.arange(7) >= torch.tensor([[0], [2], [5]])).long()
    settings = {"attention_mask": padding, "cache_implementation": "static", "disable_compile": True}
    with patch.object(type(model), "create_masks_for_generate", compared):
        model.generate(tokens(3, 7), max_new_tokens=4, min_new_tokens=4, do_sample=False, **settings)
    slots = shapes[0][-1]
    assert shapes == [(3, 1, 7, slots), *[(3, 1, 1, slots)] * 3]


@over_families
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_masks_of_other_backends_and_caches_are_left_to_transformers(family: Family, cache: str) -> None:
    backend = "sdpa" if cache == "dynamic" else "flex_attention"
    model = family.model("origin", attn_implementation=backend)
    arguments = {
        "config": model.config,
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "inputs_embeds": torch.empty(1, 1, 0),
        CACHE_NAME: DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=8),
    }
    compat = sys.modules[type(model).__module__.replace("modeling", "compat")]
    with patch.object(compat, "create_masks_for_generate", lambda **given: given):
        assert model.create_masks_for_generate(**arguments) == arguments


@over_families
def test_parameters_of_forward_are_found_as_written(family: Family) -> None:
    """generate() looks at them at every step, through the wrapper of forward."""
    forward = type(family.model()).forward
    assert inspect.signature(forward) is forward.__signature__
    assert forward.__signature__ == inspect.signature(inspect.unwrap(forward))


@over_families
@over_ropes
def test_whatever_is_not_zero_in_a_mask_is_a_real_token(family: Family, rope: str) -> None:
    """Collators that pack give the number of a token's sequence, which a Llama takes for real just so.

    generate() before 5.4 counts the tokens itself, and by these numbers.
    """
    model, ids = family.model(rope), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 9:] = 0, 0
    numbered = mask * torch.tensor([1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4])
    expected = model(ids, attention_mask=mask).logits[mask == 1]
    assert_near(model(ids, attention_mask=numbered).logits[mask == 1], expected)
    if hasattr(GenerationMixin, "_prepare_position_ids_for_generation"):
        assert torch.equal(greedy(model, ids, attention_mask=numbered), greedy(model, ids, attention_mask=mask))


@over_families
@pytest.mark.parametrize("width", [1, 8, 12])
def test_a_mask_of_another_length_is_refused(family: Family, width: int) -> None:
    model = family.model()
    cache = model(tokens(2, 8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=f"covers {width} tokens, but there are 8 cached and 1 new"):
        model(tokens(2, 1), attention_mask=torch.ones(2, width, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match=f"covers {width + 1} tokens, but there are 0 cached and {width} new"):
        model(tokens(2, width), attention_mask=torch.ones(2, width + 1, dtype=torch.long))


@over_families
def test_a_mask_that_a_static_cache_has_no_slots_for_is_refused(family: Family) -> None:
    model = family.model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(tokens(2, 8), past_key_values=cache)
    for width in (1, 17):
        with pytest.raises(ValueError, match=f"covers {width} tokens, but there are 2 new ones, and the cache has 16"):
            model(tokens(2, 2), attention_mask=torch.ones(2, width, dtype=torch.long), past_key_values=cache)
    model(tokens(2, 2), attention_mask=torch.ones(2, 10, dtype=torch.long), past_key_values=cache)
