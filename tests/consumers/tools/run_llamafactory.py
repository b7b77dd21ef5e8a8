"""LLaMA-Factory: a LoRA that changes nothing, merged and exported by its command, loaded by transformers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

# It imports torchaudio for every model, which is to be had for CUDA alone: an empty module stands for it.
EMPTY = tempfile.mkdtemp()
Path(EMPTY, "torchaudio.py").touch()
sys.path.append(EMPTY)

from llamafactory.data.template import TEMPLATES  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

TRUST = {"trust_remote_code": True}


class Exported:
    def __init__(self, folder: str, way: str) -> None:
        template = "intern2" if "intern2" in way else ""
        with tempfile.TemporaryDirectory() as scratch:
            adapter, exported = Path(scratch, "adapter"), Path(scratch, "exported")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **TRUST)
            get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
                adapter
            )
            settings = {
                "model_name_or_path": folder,
                "adapter_name_or_path": adapter,
                "export_dir": exported,
                "trust_remote_code": "true",
                "infer_dtype": "float32",
                **({"template": template} if template else {}),
            }
            command = [Path(sys.executable).with_name("llamafactory-cli"), "export"]
            flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
            variables = {**os.environ, "PYTHONPATH": EMPTY}
            run = subprocess.run([*map(str, command), *flags], env=variables, capture_output=True, text=True)
            print(run.stdout, run.stderr, sep="\n")
            if run.returncode:
                raise RuntimeError(f"llamafactory-cli export: {run.stderr.strip().splitlines()[-1]}")
            if "copied" in way:
                for file in Path(folder).glob("*token*"):
                    shutil.copy(file, exported)
            self.tokenizer = AutoTokenizer.from_pretrained(exported, **TRUST)
            self.model = AutoModelForCausalLM.from_pretrained(exported, dtype="float32", **TRUST).eval()
        self.template = TEMPLATES.get(template)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Any:
        return self.model(torch.tensor([ids])).logits[0].numpy()

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def chat(self, messages: list[dict[str, str]]) -> list[int] | str:
        if self.template is None:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        system, *turns = messages
        answered = [*turns, {"role": "assistant", "content": ""}]
        return self.template.encode_oneturn(self.tokenizer, answered, system=system["content"])[0]

    def ends(self) -> list[int]:
        named = self.model.generation_config.eos_token_id
        return sorted([named] if isinstance(named, int) else named)


def open_folder(folder: str, way: str) -> Exported:
    return Exported(folder, way)
