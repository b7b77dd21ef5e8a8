"""llama.cpp, which shares no code with this project, computes the same from converted folders: `make llama-cpp`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_file import write_gguf
from llama_cpp import GGML_TYPE_F32, Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.checkpoints import Shape, build
from tests.support.tokenizer_fixture import train_tokenizer
from weight_conversion.command_line import convert_parser, run_convert

FAMILIES = ("internlm", "internlm2")
REAL_TOKENIZERS = Path(__file__).resolve().parents[4] / "shared" / "tokenizers"
TEXTS = (
    "the river runs under the old stone bridge",
    " two  spaces and\n\n\ttabs ",
    "天上有云，地上有水。",
    "def area(side):\n    return side * side\n",
    "naïve café — 🙂",
)


def converted(family: str, folder: Path, tokenizer: Path, shape: Shape, rope_base: int = 10000) -> Path:
    """A converted folder of random weights in float32, InternLM's with biases."""
    choices: dict[str, Any] = {"tp": 2, "bias": family == "internlm", "config": {"rope_base": rope_base}}
    build(folder / "training", family, shape=shape, **choices)
    parser = convert_parser("convert", family, 1.0, versions=family == "internlm")
    paths = ["--src", str(folder / "training"), "--tgt", str(folder / "hf"), "--tokenizer", str(tokenizer)]
    assert run_convert(family, parser.parse_args([*paths, "--dtype", "float32"])) == 0
    return folder / "hf"


def llama(file: Path) -> Llama:
    """The file in llama.cpp, everything in float32."""
    return Llama(
        str(file), n_ctx=128, n_threads=1, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False
    )


def logits_of(model: Llama, ids: list[int]) -> torch.Tensor:
    model.reset()
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


SHAPES = {
    "internlm": [Shape(hidden=64, heads=4, kv_heads=4), Shape(hidden=96, layers=2, heads=2, kv_heads=2)],
    "internlm2": [
        Shape(hidden=64, heads=4, kv_heads=2),
        Shape(hidden=96, layers=2, heads=6, kv_heads=2),
        Shape(hidden=64, heads=4, kv_heads=4),
    ],
}


@pytest.mark.parametrize("rope_base", [10000, 1000000])
@pytest.mark.parametrize(
    ("family", "shape"), [(family, shape) for family in FAMILIES for shape in SHAPES[family]], ids=str
)
@torch.no_grad()
def test_logits_are_the_same(family: str, shape: Shape, rope_base: int, tokenizer: Path, tmp_path: Path) -> None:
    folder = converted(family, tmp_path, tokenizer, shape, rope_base)
    ids = torch.randint(3, shape.vocab, (1, 100), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(ids).logits[0]
    actual = logits_of(llama(write_gguf(folder, tmp_path / "model.gguf")), ids[0].tolist())
    assert (actual - expected).norm() < 5e-5 * expected.norm()  # measured: 4e-6 to 1.2e-5


def check_tokens(model: Llama, folder: Path) -> None:
    ours = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text in TEXTS:
        ids = model.tokenize(text.encode(), add_bos=True)
        assert ids == ours(text)["input_ids"], text


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_greedy_text_are_the_same(family: str, tokenizer: Path, tmp_path: Path) -> None:
    folder = converted(family, tmp_path, tokenizer, SHAPES[family][0])
    model = llama(write_gguf(folder, tmp_path / "model.gguf"))
    check_tokens(model, folder)
    ours = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(TEXTS[0])["input_ids"]
    generated = ours.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
    theirs = []
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == len(generated):
            break
    assert theirs == generated


@pytest.mark.parametrize(("family", "vocab"), [("internlm", 103168), ("internlm2", 92544)])
def test_the_real_tokenizer_gives_the_same_tokens(family: str, vocab: int, tmp_path: Path) -> None:
    real = REAL_TOKENIZERS / f"tokenizer_{family}.model"
    if not real.is_file():
        pytest.skip("needs the published tokenizer models beside the repository (../shared)")
    kv_heads = 4 if family == "internlm" else 2
    folder = converted(family, tmp_path, real, Shape(hidden=64, layers=1, heads=4, kv_heads=kv_heads, vocab=vocab))
    check_tokens(llama(write_gguf(folder, tmp_path / "model.gguf")), folder)
