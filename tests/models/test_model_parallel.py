"""Tensor parallelism: two CPU processes compute what one does, and splits inside a head are refused."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.distributed import DistributedConfig

from tests.support.model_families import FAMILIES, INTERNLM, INTERNLM2, Family, tokens
from tests.support.rounding import assert_near, decided

REPOSITORY = Path(__file__).resolve().parents[2]
over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)


def torchrun(family: Family, folder: Path, out: Path, gpus: str = "") -> subprocess.CompletedProcess[str]:
    """Two processes of `tensor_parallel.py`, on the CPU unless two GPUs are named."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(REPOSITORY)])
    return subprocess.run(
        [*command, str(REPOSITORY / "tests" / "models" / "tensor_parallel.py"), family.name, str(folder), str(out)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_computed_as_by(model: Any, result: dict[str, Any]) -> None:
    """What two processes wrote is what the whole `model` computes."""
    ids = tokens(2, 40).to(model.device)
    with torch.no_grad():
        assert_near(result["logits"], model(ids).logits)
    expected = decided(model, ids, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(result["generated"], expected)
    assert torch.equal(result["compiled"], expected)


@over_families
def test_two_processes_compute_what_one_does(family: Family, tmp_path: Path) -> None:
    model = family.model("dynamic")
    assert model.config.bias
    model.save_pretrained(tmp_path / "folder")
    run = torchrun(family, tmp_path / "folder", tmp_path / "out.pt")
    assert run.returncode == 0, run.stderr
    assert "FutureWarning" not in run.stderr
    result = torch.load(tmp_path / "out.pt")
    shared = "tp_plan" in inspect.signature(DistributedConfig).parameters  # from transformers 5.17 on
    assert result["embedding_rows"] == model.config.vocab_size // (2 if shared else 1)
    assert_computed_as_by(model, result)


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        (INTERNLM, {"num_attention_heads": 1}),
        (INTERNLM2, {"num_attention_heads": 4, "num_key_value_heads": 1}),
    ],
    ids=["internlm", "internlm2"],
)
def test_splits_inside_a_head_are_refused(family: Family, heads: dict[str, Any], tmp_path: Path) -> None:
    family.cls("ForCausalLM")(family.config(**heads)).save_pretrained(tmp_path / "folder")
    run = torchrun(family, tmp_path / "folder", tmp_path / "out.pt")
    assert run.returncode != 0
    assert "over 2 processes would cut key/value heads apart" in run.stderr
    assert "num_key_value_heads = 1" in run.stderr


@over_families
@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification"])
def test_every_plan_shares_the_embedding_and_names_the_stages(family: Family, head: str) -> None:
    model = family.cls(head)(family.config())
    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    if "tp_plan" in inspect.signature(DistributedConfig).parameters:  # from transformers 5.17 on
        assert model.tp_plan[name] == "embedding_rowwise"
    prefix = name.removesuffix(name.rpartition(".")[2])
    stages = {name, f"{prefix}layers", f"{prefix}norm"}
    assert stages <= set(model.pp_plan)
    assert all(model.get_submodule(stage) is not None for stage in stages)
    if head == "ForCausalLM":
        (logits,) = type(model)._pp_plan
        assert model.get_submodule(logits) is model.get_output_embeddings()
