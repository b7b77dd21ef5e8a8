"""Tokens per second of InternLM2's tokenizers, beside transformers' Llama tokenizer over the same SentencePiece model.

    python benchmarks/tokenizer_speed.py tokenizer.model [megabytes]
    PYTHONPATH=.compat/4.57.6 python benchmarks/tokenizer_speed.py tokenizer.model

The text is generated: English and Chinese sentences, code, numbers and emoji, in documents of a few kilobytes. The
documents are encoded one by one, in one thread; a figure is the median of the runs, with the slowest and the fastest,
in seconds of processor time, which other programs on the machine disturb little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from internlm2_model import InternLM2Tokenizer
from weight_conversion.folders.hf_folder import code_files, copy_code
from weight_conversion.mapping.families import FAMILIES
from weight_conversion.tokenizer.tokenizer_files import Tokenizer


def _words(text: str) -> list[str]:
    return text.split()


ENGLISH = _words(
    "time person year way day thing man world life hand part child eye woman place work week case point government "
    "company number group problem fact be have do say get make go know take see come think look want give use find "
    "tell ask seem feel try leave call good new first last long great little own other old right big high different "
    "small large next early young important few public bad same able the of and to in a that it for on with as at by"
)
CHINESE = _words(
    "我们 他们 今天 明天 时间 问题 工作 学习 中国 北京 上海 大学 老师 学生 研究 模型 语言 数据 训练 方法 结果 世界 "
    "生活 发展 社会 经济 文化 历史 城市 朋友 家庭 孩子 天气 河流 山 水 的 是 在 了 和 有 不 也 都 很 就 一个 这个"
)
NAMES = _words("index value total count buffer result item node key path size offset data cache layer token batch mask")
EMOJI = _words("😀 😂 🎉 🚀 👍 ❤️ 🌍 🐼")


def english(rng: random.Random) -> str:
    words = rng.choices(ENGLISH, k=rng.randint(5, 20))
    return " ".join(words).capitalize() + rng.choice([". ", ", ", "? ", "; ", ".\n"])


def chinese(rng: random.Random) -> str:
    return "".join(rng.choices(CHINESE, k=rng.randint(5, 20))) + rng.choice(["。", "，", "？", "！\n"])


def code(rng: random.Random) -> str:
    function, first, second = rng.sample(NAMES, 3)
    number = rng.randint(0, 9999)
    return (
        f"\ndef {function}_{number}({first}: int, {second}: list[int]) -> int:\n"
        f"    for i in range(len({second})):\n        if {second}[i] >= {number}:  # limit\n"
        f"            {first} += {second}[i] * {number / 7:.3f}\n    return {first}\n\n"
    )


def other(rng: random.Random) -> str:
    return f"{rng.choice(EMOJI)} {rng.randint(1, 10**9)} {rng.random():.6f} {rng.choice(EMOJI)}\n"


def documents(size: int) -> list[str]:
    """Return documents of `size` bytes of UTF-8 in all; the same ones every time."""
    rng = random.Random(0)
    made: list[str] = []
    while size > 0:
        kinds = rng.choices([english, chinese, code, other], weights=[5, 5, 2, 1], k=rng.randint(10, 60))
        document = "".join(kind(rng) for kind in kinds)
        made.append(document)
        size -= len(document.encode())
    return made


def contenders(model: Path, folder: Path) -> dict[str, Any]:
    """Return the slow and the fast tokenizer as the converter writes them, and Llama's, by name."""
    family = FAMILIES["internlm2"]
    copy_code(code_files(family.code, family.model_type), folder)
    Tokenizer.read(model).files(family.tokenizer, chat=False).write(folder)
    llama = llama_tokenizer(model, folder / "tokenizer.json")
    return {
        "InternLM2TokenizerFast (AutoTokenizer)": AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
        "InternLM2Tokenizer (slow)": InternLM2Tokenizer.from_pretrained(folder),
        "PreTrainedTokenizerFast, tokenizer.json": PreTrainedTokenizerFast.from_pretrained(folder),
        f"LlamaTokenizer ({'fast' if llama.is_fast else 'slow'})": llama,
    }


def llama_tokenizer(model: Path, tokenizer_json: Path) -> Any:
    """Return transformers' Llama tokenizer with the same pieces: slow in transformers 4, fast in 5."""
    if transformers.__version__.startswith("4."):
        return LlamaTokenizer(str(model), legacy=True)
    pieces = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]
    return LlamaTokenizer(pieces["vocab"], [tuple(merge.split(" ")) for merge in pieces["merges"]])


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def rate(tokens: int, taken: list[float]) -> str:
    """Median and range of the runs, in millions of tokens per second."""
    low, middle, high = (tokens / each(taken) / 1e6 for each in (max, statistics.median, min))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="tokenizer.model of InternLM2")
    parser.add_argument("megabytes", type=float, nargs="?", default=10)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    texts = documents(int(arguments.megabytes * 1e6))
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = contenders(arguments.model, Path(folder))
    ids = {name: [tokenizer(text)["input_ids"] for text in texts] for name, tokenizer in tokenizers.items()}
    encode: dict[str, list[float]] = {name: [] for name in tokenizers}
    decode: dict[str, list[float]] = {name: [] for name in tokenizers}
    for _ in range(arguments.runs):  # in turn, so that a busy moment hits all
        for name, tokenizer in tokenizers.items():
            encode[name].append(seconds(lambda: [tokenizer(text) for text in texts]))  # noqa: B023 - called at once
            decode[name].append(seconds(lambda: [tokenizer.decode(each) for each in ids[name]]))  # noqa: B023
    print(f"transformers {transformers.__version__}, {len(texts)} documents, {arguments.megabytes:g} MB of text\n")
    print("| tokenizer | tokens | encode, million tokens/s | decode, million tokens/s |\n| --- | --- | --- | --- |")
    for name in tokenizers:
        tokens = sum(map(len, ids[name]))
        print(f"| {name} | {tokens} | {rate(tokens, encode[name])} | {rate(tokens, decode[name])} |")


if __name__ == "__main__":
    main()
