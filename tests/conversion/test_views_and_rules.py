"""Windows are torch's; rules cover every element once and are their own inverse; tables are checked when built."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weight_conversion.files.views import StoredTensor, View, contiguous_strides
from weight_conversion.mapping.families import FAMILIES
from weight_conversion.mapping.matching import Match
from weight_conversion.mapping.rules import (
    AttentionHeads,
    Grouped,
    ModelShape,
    Replicated,
    Rule,
    Separate,
    Split,
    Stacked,
)
from weight_conversion.mapping.table import Entry, Row, Table

LAYOUTS = {"separate": Separate(), "grouped": Grouped(), "stacked": Stacked()}


def stored(name: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, Path("file"), 0, torch.int64, shape, contiguous_strides(shape))


def window(view: View, tensor: torch.Tensor) -> torch.Tensor:
    """What a View shows of an in-memory tensor that stands for the file."""
    return tensor.as_strided(view.shape, view.strides, view.offset)


@given(st.data())
def test_windows_are_those_of_torch(data: st.DataObject) -> None:
    view, tensor = stored("t", (4, 6, 8)).view(), torch.arange(4 * 6 * 8).view(4, 6, 8)
    expected = tensor
    for _ in range(data.draw(st.integers(0, 4))):
        dim = data.draw(st.integers(0, len(view.shape) - 1))
        size = view.shape[dim]
        step = data.draw(st.sampled_from(["narrow", "chunk", "unflatten", "transpose"]))
        if step == "narrow":
            start = data.draw(st.integers(0, size - 1))
            length = data.draw(st.integers(1, size - start))
            view, expected = view.narrow(dim, start, length), expected.narrow(dim, start, length)
        elif step == "chunk" and size % 2 == 0:
            view, expected = view.chunk(2, dim)[1], expected.chunk(2, dim)[1]
        elif step == "unflatten" and size % 2 == 0:
            view, expected = view.unflatten(dim, (size // 2, 2)), expected.unflatten(dim, (size // 2, 2))
        elif step == "transpose":
            view, expected = view.transpose(dim, 0), expected.transpose(dim, 0)
    assert torch.equal(window(view, tensor), expected)


def test_windows_beyond_a_tensor_are_refused() -> None:
    view = stored("t", (4, 6)).view()
    with pytest.raises(IndexError, match="outside"):
        view.narrow(0, 3, 2)
    with pytest.raises(ValueError, match="equal parts"):
        view.chunk(4, 1)
    with pytest.raises(ValueError, match="is not"):
        view.unflatten(1, (4, 2))


@st.composite
def attention(draw: st.DrawFn) -> tuple[ModelShape, int, AttentionHeads]:
    tp, kv_per_rank, group, half = (
        draw(st.sampled_from(choices)) for choices in ((1, 2, 4), (1, 3), (1, 2, 5), (1, 4))
    )
    kv = tp * kv_per_rank
    shape = ModelShape(kv * group * half * 2, 8, 8, 1, kv * group, kv)
    layouts = st.sampled_from(list(LAYOUTS.values()))
    return shape, tp, AttentionHeads(draw(layouts), draw(layouts), draw(st.booleans()))


@given(attention(), st.booleans())
def test_attention_rules_pair_every_element_once(case: tuple[ModelShape, int, AttentionHeads], bias: bool) -> None:
    shape, tp, rule = case
    rest = () if bias else (3,)
    fulls = [
        stored(f"full {n}", size)
        for n, size in enumerate(rule.hf.shapes((shape.q_rows, shape.kv_rows, shape.kv_rows), rest))
    ]
    sizes = rule.part_shapes([full.shape for full in fulls], tp, shape)
    parts = [[stored(f"part {rank} {n}", size) for n, size in enumerate(sizes)] for rank in range(tp)]
    numbers = iter(range(10**9))
    content = {
        full: torch.tensor([next(numbers) for _ in range(math.prod(full.shape))]).view(full.shape) for full in fulls
    }
    split = {part: torch.full(part.shape, -1) for rank in parts for part in rank}
    for move in Match(Entry((), (), (), rule), fulls, [parts]).moves(shape):  # builds no move that covers less than all
        for full, part in move.pairs:
            window(part, split[part.tensor]).copy_(window(full, content[full.tensor]))
    everything = torch.cat([part.flatten() for part in split.values()])
    assert sorted(everything.tolist()) == list(range(next(numbers)))


def test_heads_lie_where_the_picture_says() -> None:
    """4 query heads and 2 key/value heads of 2 rows, of which one tensor-parallel rank has half."""
    shape = ModelShape(8, 8, 8, 1, 4, 2)
    full = stored("wqkv", (16,))
    parts = [[stored(f"{x}{rank}", (size,)) for x, size in (("q", 4), ("k", 2), ("v", 2))] for rank in range(2)]
    rows = {part.name: [0] * part.shape[0] for rank in parts for part in rank}
    for whole, part in AttentionHeads(Separate(), Grouped()).pairs(
        [full.view()], [[p.view() for p in r] for r in parts], shape
    ):
        values = window(whole, torch.arange(16)).flatten().tolist()
        positions = window(part, torch.arange(part.tensor.shape[0])).flatten().tolist()
        for position, value in zip(positions, values, strict=True):
            rows[part.tensor.name][position] = value
    assert rows == {
        "q0": [0, 1, 2, 3],
        "k0": [4, 5],
        "v0": [6, 7],
        "q1": [8, 9, 10, 11],
        "k1": [12, 13],
        "v1": [14, 15],
    }


@pytest.mark.parametrize(
    ("rule", "tp", "words"),
    [(Split(0), 3, "divide by 3"), (AttentionHeads(Grouped(), Grouped()), 3, "2 key/value heads")],
)
def test_sizes_that_do_not_divide_are_refused(rule: Rule, tp: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rule.part_shapes([(16, 8)], tp, ModelShape(8, 8, 8, 1, 4, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_same_tensors_under_every_layout(family: str) -> None:
    table = FAMILIES[family].table
    biased = [layout for layout in table.layouts() if "bias" in layout and "Llama-like names" not in layout]
    assert len({frozenset(name for row in table.rows_for(layout) for name in row.hf) for layout in biased}) == 1


def test_a_table_with_a_name_twice_is_refused() -> None:
    def row(training: str, hf: str) -> Row:
        return Row((training,), (hf,), (("hidden_size",),), Replicated())

    with pytest.raises(ValueError, match="training names twice"):
        Table((row("a", "x"), row("a", "y")), ())
    with pytest.raises(ValueError, match="hf names twice"):
        Table((row("a", "x"), row("b", "x")), ())
    with pytest.raises(ValueError, match="not whole"):
        Table((row("a.{layer}", "x"),), ())
    with pytest.raises(ValueError, match="no row asks"):
        Table((row("a", "x"),), (("left", "right"),))
