"""Try `--format llama` on the oldest and the newest transformers version: logits of the training model, no remote code.

    PYTHONPATH=. python tests/versions/llama_format.py [version ...]

converts the carried checkpoint, and those beside the repository where present. Exit status 1 if one is wrong.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from environments import PINS, environment_variables

from tests.support.tokenizer_fixture import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
CARRIED = REPOSITORY / "tests" / "support" / "data" / "internevo"
SHARED = REPOSITORY.parent / "shared" / "internevo_checkpoints"

PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
wrong = 0
for folder, source in zip(sys.argv[1::2], sys.argv[2::2]):
    record = torch.load(source + "/expected_logits.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        error = (model(record["input_ids"]).logits - record["logits"]).abs().max().item()
    right = type(model) is LlamaForCausalLM and error < 1e-4
    wrong += not right
    print(f"{source.rpartition('/')[2]}: {error:.1e}{'' if right else ' WRONG'}")
sys.exit(wrong > 0)
"""


def main() -> int:
    versions = sys.argv[1:] or [next(iter(PINS)), list(PINS)[-1]]
    sources = [path for root in (CARRIED, SHARED) if root.is_dir() for path in sorted(root.iterdir())]
    status = 0
    with tempfile.TemporaryDirectory() as root:
        tokenizer = train_tokenizer(Path(root) / "tokenizer.model")
        arguments = []
        for number, source in enumerate(sources):
            script = REPOSITORY / f"convert2hf_{source.name.partition('_')[0]}.py"
            folder = Path(root) / str(number)
            flags = ["--tokenizer", tokenizer, "--format", "llama", "--dtype", "float32"]
            command = [sys.executable, script, "--src", source, "--tgt", folder, *flags]
            subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
            arguments += [str(folder), str(source)]
        for version in versions:
            print(f"transformers {version}", flush=True)
            command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments]
            status |= subprocess.run(command, env=environment_variables(version)).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
