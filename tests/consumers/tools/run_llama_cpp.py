"""llama.cpp through its Python bindings, on a GGUF file that its own convert_hf_to_gguf.py makes of the folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama, llama_model_get_vocab, llama_vocab_is_eog
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from protocol import NEW_TOKENS

(CONVERTER,) = Path(sys.prefix, "sources").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")


class LlamaCpp:
    def __init__(self, folder: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "model.gguf")
            command = [sys.executable, CONVERTER, folder, "--outtype", "f32", "--outfile", file]
            run = subprocess.run([*map(str, command)], capture_output=True, text=True)
            print(run.stdout, run.stderr, sep="\n")
            if run.returncode:
                raise RuntimeError(f"convert_hf_to_gguf.py: {run.stderr.strip().splitlines()[-1]}")
            self.model = Llama(
                str(file),
                n_ctx=256,
                n_threads=1,
                logits_all=True,
                use_mmap=False,
                type_k=GGML_TYPE_F32,
                type_v=GGML_TYPE_F32,
                verbose=False,
            )

    def logits(self, ids: list[int]) -> Any:
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        return [self._continued(ids) for ids in prompts]

    def _continued(self, ids: list[int]) -> list[int]:
        self.model.reset()
        found: list[int] = []
        for token in self.model.generate(ids, temp=0.0, repeat_penalty=1.0):
            found.append(int(token))
            if len(found) == NEW_TOKENS:
                break
        return found

    def tokens(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=True)

    def chat(self, messages: list[dict[str, str]]) -> str:
        names = {"bos_token": self._text(self.model.token_bos()), "eos_token": self._text(self.model.token_eos())}
        template = self.model.metadata["tokenizer.chat_template"]
        return Jinja2ChatFormatter(template=template, **names)(messages=messages).prompt

    def _text(self, token: int) -> str:
        return self.model.detokenize([token], special=True).decode()

    def ends(self) -> list[int]:
        vocabulary = llama_model_get_vocab(self.model.model)
        return [token for token in range(self.model.n_vocab()) if llama_vocab_is_eog(vocabulary, token)]


def open_folder(folder: str, way: str) -> LlamaCpp:
    return LlamaCpp(folder)
