"""What a tool is asked about a folder, and how it answers; this file runs in the tool's environment.

    python protocol.py tools/run_<tool>.py questions.json answers.json [questions.json answers.json ...]

The program has a function `open_folder(folder, way)`, which returns an object with any of the methods below. What it
lacks is not asked; an exception is an answer, too. Arrays lie in answers.npz. Several folders are asked about one after
the other.

    logits(ids)              [T, V] of T tokens
    scores(ids)              [T - 1], the log-probability of every token after the first, where logits are not to be had
    greedy(prompts)          the next tokens of several prompts, asked for at once
    tokens(text)             ids of a text, with the tokens that start a text
    chat(messages)           ids, or the text, of a conversation up to where the answer begins
    completion(messages)     the text of the answer, at most `new_tokens` long
    ends()                   ids at which an answer ends
    likelihood(ids)          log-probability of the second half of the tokens, after the first
    embeddings(texts)        [N, H], means of the last hidden states of each text's tokens
    assistant_loss(messages) mean loss over the tokens of the answer that ends the conversation, and its end
    dequantized(ids)         [2, T, V]: logits of a quantized model, and what they are compared with: those of the
                             folder's own model, with the weights that the quantized ones stand for
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEW_TOKENS = 16
EMBEDDED = 4
"""Texts whose embeddings are asked for."""


@dataclass(frozen=True)
class Questions:
    """`ids` is one prompt, `prompts` are several, of lengths n, n + 1 and less; `texts` for the tokenizer."""

    folder: str
    way: str
    ids: list[int]
    prompts: list[list[int]]
    texts: list[str]
    messages: list[dict[str, str]] | None
    """None: the folder has no chat template."""

    def ask(self, tool: Any) -> dict[str, Any]:
        """Every question that the tool has a method for."""
        asked: dict[str, tuple[Any, ...]] = {
            "logits": (self.ids,),
            "scores": (self.ids,),
            "likelihood": (self.ids,),
            "dequantized": (self.ids,),
            "embeddings": (self.texts[:EMBEDDED],),
            "greedy": (self.prompts,),
            "ends": (),
        }
        if self.messages is not None:
            asked |= {"chat": (self.messages,), "completion": (self.messages,)}
            asked["assistant_loss"] = (self.messages[1:3],)
        answers = {name: getattr(tool, name)(*arguments) for name, arguments in asked.items() if hasattr(tool, name)}
        if hasattr(tool, "tokens"):
            answers["tokens"] = [tool.tokens(text) for text in self.texts]
        return answers


ARRAYS = ("logits", "scores", "embeddings", "likelihood", "assistant_loss", "dequantized")


def main() -> None:
    program, *files = map(Path, sys.argv[1:])
    sys.path.insert(0, str(program.parent))
    for questions, target in zip(files[::2], files[1::2], strict=True):
        _answer(program, Questions(**json.loads(questions.read_text(encoding="utf-8"))), target)


def _answer(program: Path, asked: Questions, target: Path) -> None:
    try:
        tool = _loaded(program).open_folder(asked.folder, asked.way)
        try:
            answers = asked.ask(tool)
        finally:
            if hasattr(tool, "close"):
                tool.close()
    except Exception as error:
        traceback.print_exc()
        answers = {"error": f"{type(error).__name__}: {error}"}
    import numpy

    arrays = {name: numpy.asarray(answers.pop(name), dtype=numpy.float32) for name in ARRAYS if name in answers}
    numpy.savez(target.with_suffix(".npz"), **arrays)
    target.write_text(json.dumps(answers), encoding="utf-8")


def _loaded(program: Path) -> Any:
    if program.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(program.stem, program)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        sys.modules[program.stem] = module
    return sys.modules[program.stem]


if __name__ == "__main__":
    main()
