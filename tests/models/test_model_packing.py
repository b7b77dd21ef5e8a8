"""Several sequences packed into one row do not see each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening, DynamicCache

from tests.support.model_families import FAMILIES, Family, tokens
from tests.support.rounding import assert_near

LENGTHS = [7, 40, 1, 12]  # one of them beyond the tiny models' trained length of 32
STARTS = [0, 7, 47, 48, 60]

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)
over_backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def packed() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """One packed row of ids [1, 60], its positions [1, 60], and the sequences [1, n] in it."""
    rows = [tokens(1, length, seed=length) for length in LENGTHS]
    return torch.cat(rows, 1), torch.cat([torch.arange(length) for length in LENGTHS])[None], rows


def separate(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(row).logits for row in rows], 1)


def descriptions() -> list[Any]:
    """The ways to say where the sequences are."""
    _, positions, _ = packed()
    offsets = torch.tensor(STARTS, dtype=torch.int32)
    trainer = {"cu_seqlens": offsets[None], "max_seqlen": 40}
    collator = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 40, "max_length_k": 40}
    return [
        pytest.param({"position_ids": positions}, id="position_ids"),
        pytest.param({"position_ids": positions, "use_cache": True}, id="position_ids, cache"),
        pytest.param({"indexes": positions[0]}, id="indexes"),
        pytest.param({"cu_seqlens": offsets, "max_seqlen": 40}, id="cu_seqlens"),
        pytest.param(trainer | {"indexes": positions}, id="cu_seqlens as a row, indexes"),
        pytest.param(trainer | {"attention_mask": torch.ones(1, 60)}, id="cu_seqlens, mask of ones"),
        pytest.param(trainer | {"position_ids": torch.arange(60)[None]}, id="cu_seqlens, running positions"),
        pytest.param(collator, id="collator"),
    ]


@over_families
@over_backends
@pytest.mark.parametrize("description", descriptions())
@torch.no_grad()
def test_packed_is_separate(family: Family, backend: str, description: dict[str, Any]) -> None:
    model = family.model(attn_implementation=backend)
    ids, _, rows = packed()
    assert_near(model(ids, **description).logits, separate(model, rows))


@over_families
def test_packed_sequences_beside_a_cache_are_refused(family: Family) -> None:
    """An empty one, too: it would join them."""
    offsets = torch.tensor(STARTS, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens keeps the sequences of a row apart"):
        family.model()(packed()[0], cu_seqlens=offsets, past_key_values=DynamicCache())


@over_families
@over_backends
@torch.no_grad()
def test_dynamic_scaling_takes_each_sequences_own_length(family: Family, backend: str) -> None:
    model = family.model("dynamic", attn_implementation=backend)
    ids, positions, rows = packed()
    logits = model(ids, position_ids=positions).logits
    assert_near(logits, separate(model, rows))


@over_families
@over_backends
@torch.no_grad()
def test_rows_are_packed_differently(family: Family, backend: str) -> None:
    model = family.model("dynamic", attn_implementation=backend)
    ids = torch.cat((tokens(1, 40, seed=1), tokens(1, 40, seed=2)))
    positions = torch.stack((torch.cat((torch.arange(33), torch.arange(7))), torch.arange(40)))
    logits = model(ids, position_ids=positions).logits
    assert_near(logits[:1], separate(model, [ids[:1, :33], ids[:1, 33:]]))
    assert_near(logits[1:], model(ids[1:]).logits)


@over_families
@over_backends
@pytest.mark.parametrize(
    ("offsets", "cuts"),
    [([0, 33, 40], (33, 33)), ([0, 33, 40, 73, 80], (33, 33)), ([0, 33, 40, 45, 80], (33, 5)), ([0, 40, 80], (40, 40))],
    ids=str,
)
@torch.no_grad()
def test_offsets_are_of_every_row_or_count_through_them(
    family: Family, backend: str, offsets: list[int], cuts: tuple[int, int]
) -> None:
    """In the first way the rows are alike, in the second FlashAttention has them."""
    model = family.model("dynamic", attn_implementation=backend)
    ids = torch.cat((tokens(1, 40, seed=1), tokens(1, 40, seed=2)))
    logits = model(ids, cu_seqlens=torch.tensor(offsets, dtype=torch.int32)).logits
    for row, cut in enumerate(cuts):
        parts = [part for part in (ids[row : row + 1, :cut], ids[row : row + 1, cut:]) if part.shape[1]]
        assert_near(logits[row : row + 1], separate(model, parts))


@over_families
def test_padding_free_loss_is_the_padded_loss(family: Family) -> None:
    model = family.model()
    rows = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS if length > 1]
    flat = DataCollatorWithFlattening()([{"input_ids": row, "labels": row} for row in rows])
    width = max(map(len, rows))
    ids = torch.tensor([F.pad(torch.tensor(row), (0, width - len(row))).tolist() for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    padded = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert_near(model(**flat).loss, padded)


@over_families
def test_offsets_of_several_rows_are_refused(family: Family) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must hold the offsets of one packed row.*\[2, 3\]"):
        family.model()(tokens(2, 6), cu_seqlens=torch.tensor([[0, 2, 6], [0, 3, 6]]))


@over_families
def test_flash_attention_gets_the_sequences_once(family: Family) -> None:
    """The arguments for FlashAttention's kernel for packed sequences, which needs a GPU itself."""
    model = family.model()
    module = __import__(type(model).__module__, fromlist=["varlen_arguments"])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    arguments = module.varlen_arguments(positions, None)
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 12]
    assert arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["max_length_q"] == arguments["max_length_k"] == 6
