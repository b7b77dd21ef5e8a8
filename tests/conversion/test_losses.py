"""Numbers that a type cannot hold: infinities that a cast would make stop the run, zeros that it makes are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.fault_harness import TINY, assert_refused, convert_words, run_script, train_quick_tokenizer
from tests.support.checkpoints import build

SHARD = "model_tp1_pp0.pt"
W1, WQKV = "layers.0.feed_forward.w1.weight", "layers.1.attention.wqkv.weight"
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_quick_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def converted(folder: Path, tokenizer: Path, change: Change, *more: str, dtype: torch.dtype = torch.float32):
    """What the script says of a checkpoint whose second rank was changed."""
    build(folder / "source", "internlm2", shape=TINY["internlm2"], tp=2, dtype=dtype)
    state = torch.load(folder / "source" / SHARD)
    change(state)
    torch.save(state, folder / "source" / SHARD)
    return run_script("convert2hf_internlm2", convert_words(folder / "source", folder / "hf", tokenizer, *more))


def too_large(state: dict[str, torch.Tensor]) -> None:
    state[W1][3, 5] = 70000.0
    state[W1][4, 0] = -65520.0  # half a last place above the largest float16: rounded to even, infinite
    state[WQKV][0, 0] = 1e6


@pytest.mark.parametrize("more", [(), ("--verify",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_that_would_become_infinite_stop_the_run(
    more: tuple[str, ...], dtype: torch.dtype, tokenizer: Path, tmp_path: Path
) -> None:
    outcome = converted(tmp_path, tokenizer, too_large, "--dtype", "float16", *more, dtype=dtype)
    assert_refused(
        outcome, "3 numbers are too large for float16", "2 tensors", f"'model.{W1}' (2)", f"'model.{WQKV}' (1)",
        "--dtype bfloat16 or float32",
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_largest_numbers_of_a_type_are_kept(tokenizer: Path, tmp_path: Path) -> None:
    def large(state: dict[str, torch.Tensor]) -> None:
        state[W1][0, 0] = 65519.0

    assert converted(tmp_path, tokenizer, large, "--dtype", "float16", "--verify").status == 0
    found = load_file(tmp_path / "hf" / "model.safetensors")[f"model.{W1}"]
    assert found[len(found) // 2, 0] == 65504


def test_a_float32_that_bfloat16_cannot_hold(tokenizer: Path, tmp_path: Path) -> None:
    def large(state: dict[str, torch.Tensor]) -> None:
        state[W1][0, 0] = sys.float_info.max if state[W1].dtype is torch.float64 else torch.finfo(torch.float32).max

    outcome = converted(tmp_path, tokenizer, large, "--dtype", "bfloat16")
    assert_refused(outcome, "1 numbers are too large for bfloat16", f"'model.{W1}' (1)", "--dtype float32")


def test_infinities_and_nan_of_the_source_are_converted(tokenizer: Path, tmp_path: Path) -> None:
    def infinite(state: dict[str, torch.Tensor]) -> None:
        state[W1][0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])

    outcome = converted(tmp_path, tokenizer, infinite, "--dtype", "float16", "--verify")
    assert outcome.status == 0, outcome
    found = load_file(tmp_path / "hf" / "model.safetensors")[f"model.{W1}"]
    row = found[len(found) // 2, :3]
    assert row[:2].tolist() == [torch.inf, -torch.inf]
    assert torch.isnan(row[2])


def test_numbers_that_become_zero_are_counted_in_one_warning(tokenizer: Path, tmp_path: Path) -> None:
    def small(state: dict[str, torch.Tensor]) -> None:
        for tensor in state.values():
            tensor[tensor.abs() < 1e-6] = 0.5
        state[W1][0, :5] = torch.tensor([1e-8, -1e-20, 0.0, 2.0**-25, 2.0**-24])
        state[WQKV][0, 0] = 1e-30

    outcome = converted(tmp_path, tokenizer, small, "--dtype", "float16", "--verify")
    assert outcome.status == 0, outcome
    warnings = [line for line in outcome.errors.splitlines() if "too small" in line]
    assert len(warnings) == 1
    assert "numbers in" in warnings[0]
    assert "are too small for float16: they are written as zero" in warnings[0]
    outcome = converted(tmp_path / "kept", tokenizer, small, "--dtype", "float32")
    assert "too small" not in outcome.errors
