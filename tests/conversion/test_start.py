"""The scripts move bytes: no run imports torch, and what is not needed is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.fault_harness import TINY, convert_words, revert_words, train_quick_tokenizer
from tests.support.checkpoints import build

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
HEAVY = {"torch", "transformers", "safetensors", "pandas", "scipy", "tqdm"}
OF_OTHERS = "import huggingface_hub as hub, sys; hub.split_state_dict_into_shards_factory; print(*sys.modules)"


def modules_after(script: str, words: list[str]) -> set[str]:
    """The packages that a run of the script has imported."""
    command = [sys.executable, "-c", PROGRAM, f"{script}.py", *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture(scope="module")
def not_needed() -> set[str]:
    """HEAVY but for what huggingface_hub imports itself, as old ones do tqdm."""
    alone = subprocess.run([sys.executable, "-c", OF_OTHERS], capture_output=True, text=True, check=True)
    return HEAVY - set(alone.stdout.split())


@pytest.mark.parametrize("family", ["internlm", "internlm2"])
def test_no_run_imports_torch(family: str, not_needed: set[str], tmp_path: Path) -> None:
    assert "torch" in not_needed
    tokenizer = train_quick_tokenizer(tmp_path / "tokenizer.model")
    head = {"norm_head": True} if family == "internlm2" else {}
    build(tmp_path / "a", family, shape=TINY[family], tp=2, **head)
    for dtype in ("float32", "bfloat16", "float16"):
        words = convert_words(tmp_path / "a", tmp_path / dtype, tokenizer, "--dtype", dtype, "--verify")
        assert not modules_after(f"convert2hf_{family}", words) & not_needed
    words = revert_words(tmp_path / "float32", tmp_path / "back", 2, "--verify")
    assert not modules_after(f"revert_{family}", words) & not_needed


@pytest.mark.parametrize(
    "script", ["convert2hf_internlm", "convert2hf_internlm2", "revert_internlm", "revert_internlm2"]
)
def test_help_imports_no_package_of_others(script: str) -> None:
    others = {"numpy", "sentencepiece", "tokenizers", "huggingface_hub", "isal"}
    assert not modules_after(script, ["--help"]) & (HEAVY | others)
