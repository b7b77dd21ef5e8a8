"""The folders that every tool is tried on: both families, both formats, four kinds, made by the conversion scripts.

    plain     rotary embedding as trained, no biases; the published tokenizer where it lies beside the repository
    biases    biases in the attention
    dynamic   dynamic NTK scaling, asked about more tokens than max_position_embeddings
    chat      as plain, converted with --chat

All are in float32, so that what differs is the tool's arithmetic and not the rounding of weights.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.checkpoints import Shape, build
from tests.support.tokenizer_fixture import NORMAL, USER_DEFINED, append_pieces, train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
REAL_TOKENIZERS = REPOSITORY.parent / "shared" / "tokenizers"

FAMILIES = {"internlm": "InternLM", "internlm2": "InternLM2"}
FORMATS = ("remote code", "llama")
KINDS = ("plain", "biases", "dynamic", "chat")
TRAINED_LENGTH = 64
"""max_position_embeddings of the dynamic folders."""

SMALL_VOCABULARY = 320
FULL_VOCABULARY = {"internlm": 103168, "internlm2": 92544}
UNUSED_PIECES = {
    "internlm": (103027, ["<eoh>", "<eoa>", *(f"<TOKENS_UNUSED_{number}>" for number in range(2, 141))]),
    "internlm2": (92397, [f"[UNUSED_TOKEN_{number}]" for number in range(147)]),
}
"""Where the pieces that --chat renames start, and these pieces."""


@dataclass(frozen=True, order=True)
class Case:
    """One folder's family, format and kind."""

    family: str
    format: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.family}-{self.format.split()[0]}-{self.kind}"

    @property
    def vocabulary(self) -> int:
        return FULL_VOCABULARY[self.family] if self.kind in ("plain", "chat") else SMALL_VOCABULARY

    def __str__(self) -> str:
        return f"{FAMILIES[self.family]}, {self.format}, {self.kind}"


CASES = tuple(Case(family, format, kind) for family in FAMILIES for format in FORMATS for kind in KINDS)


def convert(root: Path, cases: Sequence[Case] = CASES) -> None:
    """Makes `root / case.name` of every case."""
    for family in {case.family for case in cases}:
        small, full = _tokenizers(root, family)
        for kind in KINDS:
            wanted = [case for case in cases if (case.family, case.kind) == (family, kind)]
            if not wanted:
                continue
            training = root / f"{family}-{kind}-training"
            kv_heads = 4 if family == "internlm" else 2
            shape = Shape(
                hidden=128, layers=3, heads=4, kv_heads=kv_heads, intermediate=512, vocab=wanted[0].vocabulary
            )
            build(training, family, shape=shape, tp=2, bias=kind == "biases", config={"rope_base": 100000})
            for case in wanted:
                tokenizer = small if case.vocabulary == SMALL_VOCABULARY else full
                _run_script(case, training, root / case.name, tokenizer)
            shutil.rmtree(training)


def _tokenizers(root: Path, family: str) -> tuple[Path, Path]:
    """A small tokenizer.model, and one of the published size: the published one if it is there."""
    folder = root / f"{family}-tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    small, full = train_tokenizer(folder / "small.model", SMALL_VOCABULARY), folder / "full.model"
    real = REAL_TOKENIZERS / f"tokenizer_{family}.model"
    if real.is_file():
        return small, real
    train_tokenizer(full, SMALL_VOCABULARY)
    start, pieces = UNUSED_PIECES[family]
    append_pieces(full, (f"filling {number}" for number in range(SMALL_VOCABULARY, start)), NORMAL)
    append_pieces(full, pieces, USER_DEFINED)
    return small, full


def _run_script(case: Case, source: Path, target: Path, tokenizer: Path) -> None:
    script = REPOSITORY / f"convert2hf_{case.family}.py"
    subprocess.run([sys.executable, *map(str, (script, *_flags(case, source, target, tokenizer)))], check=True)


def _flags(case: Case, source: Path, target: Path, tokenizer: Path) -> Iterator[str | Path]:
    yield from ("--src", source, "--tgt", target, "--tokenizer", tokenizer, "--dtype", "float32")
    if case.format == "llama":
        yield from ("--format", "llama")
    if case.kind == "dynamic":
        yield from ("--rotary_type", "dynamic", "--scaling_factor", "3", "--max_pos", str(TRAINED_LENGTH))
    if case.kind == "chat":
        yield "--chat"
