"""What a row's result may depend on: its own tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from tests.support.model_families import FAMILIES, INTERNLM, Family, padded, tokens
from tests.support.rounding import assert_near

ROPES = ["origin", "dynamic", "linear"]
BACKENDS = ["eager", "sdpa", "flex_attention"]
MAX_POSITION = 32  # of the tiny models; dynamic NTK scaling starts beyond it


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """flex_attention compiles itself, for most of a minute; uncompiled it computes the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)
over_ropes = pytest.mark.parametrize("rope", ROPES)
over_backends = pytest.mark.parametrize("backend", BACKENDS)


def tiny(family: Family, rope: str, backend: str = "eager") -> Any:
    """The golden model with one of three rotary types; InternLM's numbers know no linear scaling of their own."""
    if (family, rope) == (INTERNLM, "linear"):
        overrides = {"rotary": {"base": 10000, "type": "linear", "scaling_factor": 2.0}}
        return family.model("origin", attn_implementation=backend, **overrides)
    return family.model(rope, attn_implementation=backend)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_near(actual, expected)


@over_families
@over_ropes
@over_backends
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_in_a_padded_batch_is_the_row_alone(family: Family, rope: str, backend: str, side: str) -> None:
    model = tiny(family, rope, backend)
    rows = [tokens(1, length, seed=length) for length in (5, 19, 48, 40)]
    ids, mask = padded(rows, side)
    batch = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        close(batch[index][mask[index] == 1], model(row).logits[0])


@over_families
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
@torch.no_grad()
def test_dynamic_scaling_takes_each_rows_own_length(family: Family, lengths: list[int], side: str) -> None:
    model = tiny(family, "dynamic")
    rows = [tokens(1, length, seed=index) for index, length in enumerate(lengths)]
    ids, mask = padded(rows, side)
    batch = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        close(batch[index][mask[index] == 1], model(row).logits[0])


@over_families
@torch.no_grad()
def test_padding_counts_for_nothing_where_positions_are_given(family: Family) -> None:
    """Right padding may be numbered on; it is still not part of the row's length."""
    model = tiny(family, "dynamic")
    rows = [tokens(1, 20), tokens(1, 48)]
    ids, mask = padded(rows, "right")
    batch = model(ids, attention_mask=mask, position_ids=torch.arange(48).expand(2, -1)).logits
    close(batch[0, :20], model(rows[0]).logits[0])


@over_families
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("prepared", [False, True])
@torch.no_grad()
def test_right_padding_may_have_any_position(family: Family, number: int, prepared: bool) -> None:
    """generate() gives it 0, earlier versions 1; the keys before it stay where they are."""
    model = tiny(family, "dynamic")
    rows = [tokens(1, 20), tokens(1, 48)]
    ids, mask = padded(rows, "right")
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, number)
    if prepared:
        mask = mask[:, None, None].bool() & torch.ones(48, 48, dtype=torch.bool).tril()
    outputs = model(ids, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache())
    close(outputs.logits[0, :20], model(rows[0]).logits[0])


@over_families
@over_ropes
@torch.no_grad()
def test_nothing_is_left_behind_by_an_earlier_pass(family: Family, rope: str) -> None:
    model = tiny(family, rope)
    prompt = tokens(1, 20)
    before = model(prompt).logits
    model(tokens(2, 48, seed=1))
    model.generate(tokens(1, 30, seed=2), max_new_tokens=12)
    assert torch.equal(model(prompt).logits, before)


@over_families
@over_ropes
@over_backends
@pytest.mark.parametrize("chunks", [[20, *[1] * 12], [7, 13, 5, 7], [1] * 32], ids=["decode", "chunks", "tokens"])
@torch.no_grad()
def test_cached_is_uncached(family: Family, rope: str, backend: str, chunks: list[int]) -> None:
    model = tiny(family, rope, backend)
    ids = tokens(2, MAX_POSITION)
    cache, logits = None, []
    for chunk in ids.split(chunks, dim=1):
        outputs = model(chunk, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    close(torch.cat(logits, 1), model(ids, use_cache=False).logits)


@over_families
@pytest.mark.parametrize("rope", ["origin", "linear"])
@torch.no_grad()
def test_cached_is_uncached_beyond_the_trained_length(family: Family, rope: str) -> None:
    model = tiny(family, rope)
    ids = tokens(1, 60)
    first = model(ids[:, :25], use_cache=True)
    second = model(ids[:, 25:], past_key_values=first.past_key_values)
    close(torch.cat((first.logits, second.logits), 1), model(ids).logits)


@torch.no_grad()
def test_one_internlm_layer_rotates_cached_keys_exactly_beyond_the_trained_length() -> None:
    """Keys are cached before rotation, so with one layer even dynamic scaling leaves cached equal to uncached."""
    config = INTERNLM.config("dynamic", num_hidden_layers=1)
    model = INTERNLM.cls("ForCausalLM")(config).eval()
    rows = [tokens(1, 37, seed=1), tokens(1, 45, seed=2)]
    ids, mask = padded(rows, "left")
    cache = model(ids[:, :30], attention_mask=mask[:, :30], use_cache=True).past_key_values
    for end in range(31, 46):
        logits = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache).logits
    for index, row in enumerate(rows):
        close(logits[index], model(row).logits[0, -1:])


@over_families
@over_ropes
@over_backends
@torch.no_grad()
def test_left_padded_chunks_without_an_unpadded_row(family: Family, rope: str, backend: str) -> None:
    model = tiny(family, rope, backend)
    rows = [tokens(1, 14, seed=3), tokens(1, 22, seed=4)]
    ids, mask = padded(rows, "left")
    ids, mask = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(mask, (3, 0))
    cache, logits = None, []
    for start, end in ((0, 12), (12, 20), (20, 24), (24, 25)):
        outputs = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    batch = torch.cat(logits, 1)
    for index, row in enumerate(rows):
        close(batch[index][mask[index] == 1], model(row).logits[0])


@over_families
@over_ropes
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_static_cache_is_dynamic_cache(family: Family, rope: str, backend: str) -> None:
    model = tiny(family, rope, backend)
    rows = [tokens(1, 9, seed=5), tokens(1, 16, seed=6)]
    ids, mask = padded(rows, "left")
    static = StaticCache(config=model.config, max_cache_len=40)
    dynamic = None
    for start, end in ((0, 10), (10, 15), (15, 16)):
        arguments = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "use_cache": True}
        expected = model(**arguments, past_key_values=dynamic)
        dynamic = expected.past_key_values
        actual = model(**arguments, past_key_values=static)
        real = mask[:, start:end] == 1
        close(actual.logits[real], expected.logits[real])


@over_families
@over_ropes
@torch.no_grad()
def test_static_cache_without_a_mask(family: Family, rope: str) -> None:
    model = tiny(family, rope)
    ids = tokens(1, 12)
    static = StaticCache(config=model.config, max_cache_len=40)
    model(ids[:, :11], past_key_values=static, use_cache=True)
    close(model(ids[:, 11:], past_key_values=static, use_cache=True).logits[:, -1], model(ids).logits[:, -1])


@over_families
@torch.no_grad()
def test_keys_and_values_as_tuples_are_taken(family: Family) -> None:
    model = tiny(family, "origin")
    ids = tokens(1, 12)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    legacy = tuple((layer.keys, layer.values) for layer in cache.layers)
    close(model(ids[:, 8:], past_key_values=legacy).logits, model(ids).logits[:, 8:])


@over_families
@over_ropes
@torch.no_grad()
def test_embeddings_instead_of_ids(family: Family, rope: str) -> None:
    model = tiny(family, rope)
    ids = tokens(2, 10)
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@over_families
@over_ropes
@torch.no_grad()
def test_only_distances_between_positions_matter(family: Family, rope: str) -> None:
    model = tiny(family, rope)
    ids = tokens(1, 12)
    cache = model(ids[:, :9], position_ids=torch.arange(9)[None] + 5, use_cache=True).past_key_values
    last = model(ids[:, 9:], position_ids=torch.arange(9, 12)[None] + 5, past_key_values=cache).logits
    close(last, model(ids).logits[:, 9:])
