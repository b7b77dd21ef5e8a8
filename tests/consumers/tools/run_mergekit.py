"""mergekit: the linear merge of a folder with itself, which is that folder, loaded by transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MERGE = """
merge_method: linear
dtype: float32
models:
  - model: {folder}
    parameters: {{weight: 0.5}}
  - model: {again}
    parameters: {{weight: 0.5}}
"""


class Merged:
    def __init__(self, folder: str, way: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            recipe, merged = Path(scratch, "merge.yml"), Path(scratch, "merged")
            again = Path(scratch, "again")  # it refuses one name twice
            again.symlink_to(folder)
            recipe.write_text(MERGE.format(folder=folder, again=again))
            command = [Path(sys.executable).with_name("mergekit-yaml"), recipe, merged, "--trust-remote-code"]
            run = subprocess.run([*map(str, command)], capture_output=True, text=True)
            print(run.stdout, run.stderr, sep="\n")
            if run.returncode:
                raise RuntimeError(f"mergekit-yaml: {run.stderr.strip().splitlines()[-1]}")
            if "copied" in way:
                for module in Path(folder).glob("*.py"):
                    shutil.copy(module, merged)
            settings: dict[str, Any] = {"trust_remote_code": True}
            self.tokenizer = AutoTokenizer.from_pretrained(merged, **settings)
            self.model = AutoModelForCausalLM.from_pretrained(merged, dtype="float32", **settings).eval()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Any:
        return self.model(torch.tensor([ids])).logits[0].numpy()

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]


def open_folder(folder: str, way: str) -> Merged:
    return Merged(folder, way)
