"""Attention backends that others register, as serving engines do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tests.support.model_families import FAMILIES, Family, padded, tokens
from tests.support.rounding import assert_near, decided

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)


def of_tokens(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """Attention as the Transformers backends of vLLM and SGLang give it back: one row a token, [B T, h d]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    causal = mask is None and query.shape[2] > 1
    output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling)
    return output.transpose(1, 2).flatten(0, 1).flatten(1), None


@over_families
@torch.no_grad()
def test_a_backend_may_give_one_row_a_token(family: Family) -> None:
    AttentionInterface.register("of_tokens", of_tokens)
    AttentionMaskInterface.register("of_tokens", sdpa_mask)
    model, expected = family.model("dynamic", attn_implementation="of_tokens"), family.model("dynamic")
    ids, mask = padded([tokens(1, 40, seed=1), tokens(1, 9, seed=2)], "left")
    real = mask == 1
    assert_near(model(ids, attention_mask=mask).logits[real], expected(ids, attention_mask=mask).logits[real])
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, decided(expected, ids, attention_mask=mask, max_new_tokens=8))
