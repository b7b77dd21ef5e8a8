"""Continuous batching (generate_batch, and so `transformers serve`) generates what generate does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

from tests.support.model_families import FAMILIES, INTERNLM, Family, tokens

# From 5.4 on the paged cache is sized by a ContinuousBatchingConfig; before, it takes all the memory that there is.
ContinuousBatchingConfig = getattr(transformers, "ContinuousBatchingConfig", None)
pytestmark = pytest.mark.skipif(
    ContinuousBatchingConfig is None, reason="this transformers cannot size the paged cache for a test"
)

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)
over_ropes = pytest.mark.parametrize("rope", ["origin", "linear", "dynamic"])
over_backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
NEW_TOKENS = 8


def tiny(family: Family, rope: str, backend: str = "eager") -> Any:
    """The golden model with one of three rotary types; InternLM's numbers know no linear scaling of their own."""
    if (family, rope) == (INTERNLM, "linear"):
        overrides = {"rotary": {"base": 10000, "type": "linear", "scaling_factor": 2.0}}
        return family.model("origin", attn_implementation=backend, **overrides)
    return family.model(rope, attn_implementation=backend)


def batched(model: Any, prompts: list[torch.Tensor]) -> list[Any]:
    """The requests' outcomes, in the prompts' order. Passes take 64 tokens at most, so long prompts come in pieces."""
    page = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # renamed in 5.17
    sizes = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, **{page: 16})
    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outcomes = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts], generation_config=greedy, continuous_batching_config=sizes
    )
    return [outcomes[request] for request in sorted(outcomes, key=lambda name: int(name.rpartition("_")[2]))]


def alone(model: Any, prompt: torch.Tensor) -> list[int]:
    generated = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return generated[0, prompt.shape[1] :].tolist()


def assert_as_alone(model: Any, prompts: list[torch.Tensor]) -> None:
    expected = [alone(model, prompt) for prompt in prompts]
    outcomes = batched(model, prompts)
    assert [outcome.error for outcome in outcomes] == [None] * len(prompts)
    assert [outcome.generated_tokens for outcome in outcomes] == expected
    assert alone(model, prompts[0]) == expected[0]


@over_families
@over_ropes
@over_backends
def test_ten_prompts_of_several_lengths(family: Family, rope: str, backend: str) -> None:
    lengths = (3, 21, 5, 7, 9, 11, 13, 17, 19, 24)
    assert_as_alone(tiny(family, rope, backend), [tokens(1, length, seed=length) for length in lengths])


@over_families
@over_backends
def test_prompts_that_begin_alike_share_what_is_cached(family: Family, backend: str) -> None:
    model = tiny(family, "dynamic", backend)
    beginning = tokens(1, 16, seed=1)  # a page
    ends = [tokens(1, length, seed=length) for length in (1, 3, 8)]
    assert_as_alone(model, [beginning, *(torch.cat((beginning, end), 1) for end in ends), beginning])


@over_families
@pytest.mark.parametrize("rope", ["origin", "linear"])
@over_backends
def test_prompts_beyond_the_trained_length_and_in_pieces(family: Family, rope: str, backend: str) -> None:
    assert_as_alone(tiny(family, rope, backend), [tokens(1, length, seed=length) for length in (40, 5, 90)])


@over_families
def test_dynamic_scaling_beyond_the_trained_length_is_refused_by_name(
    family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = batched(tiny(family, "dynamic"), [tokens(1, 40)])
    assert all(outcome.error for outcome in outcomes)  # 5.4 gives none at all, and tells the error in its log alone
    assert "A sequence of 40 tokens is longer than max_position_embeddings = 32" in caplog.text
    assert "dynamic NTK scaling" in caplog.text
    assert "Use generate" in caplog.text
