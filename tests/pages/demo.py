"""The whole way on small checkpoints: convert, load with transformers, generate, revert, compare bit by bit.

InternLM2 comes from shards that the training framework saved (tensor-parallel size 2, in tests/support/data), with
the logits that the training model itself gave. For InternLM a checkpoint of the same kind is made on the spot. The
embedding of both is split along the hidden size, as InternEvo builds it today.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.checkpoints import build
from tests.support.tokenizer_fixture import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "tests" / "support" / "data" / "internevo" / "internlm2_tp2"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="demo_") as temporary:
        work = Path(temporary)
        tokenizer = train_tokenizer(work / "tokenizer.model")
        build(work / "internlm_tp2", "internlm", tp=2, bias=True, embedding="hidden")
        split_along_hidden_size(CHECKPOINT, work / "internlm2_tp2")
        differences = [
            show("internlm2", work / "internlm2_tp2", tokenizer, work),
            show("internlm", work / "internlm_tp2", tokenizer, work),
        ]
    return 1 if any(differences) else 0


def split_along_hidden_size(source: Path, target: Path) -> None:
    """The same checkpoint, its embedding [V/2, H] of each rank as [V, H/2]: it was saved in early 2024."""
    shutil.copytree(source, target)
    names = [path.name for path in sorted(source.glob("model_tp*.pt"))]
    shards = [torch.load(source / name, weights_only=True) for name in names]
    embedding = torch.cat([shard.pop("tok_embeddings.word_embeddings.weight") for shard in shards])
    for name, shard, columns in zip(names, shards, embedding.chunk(len(shards), dim=1), strict=True):
        torch.save({"tok_embeddings.weight": columns.clone(), **shard}, target / name)


def show(family: str, source: Path, tokenizer: Path, work: Path) -> int:
    """Takes one checkpoint there and back; returns how many tensors came back different."""
    hf, back = work / f"{family}_hf", work / f"{family}_back"
    print(f"\n== {family}: {len(list(source.glob('model_tp*.pt')))} shards of InternEvo")
    run(f"convert2hf_{family}.py", "--src", source, "--tgt", hf, "--tokenizer", tokenizer, "--dtype", "float32")
    load_and_generate(hf, source / "expected_logits.pt")
    run(f"revert_{family}.py", "--src", hf, "--tgt", back, "--tp_size", 2, "--embed_split", "--use_flash")
    return compare(source, back)


def run(script: str, *arguments: object) -> None:
    words = [str(word) for word in arguments]
    print(f"$ python {script} {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, script, *words], cwd=REPOSITORY, check=True)


def load_and_generate(folder: Path, expected: Path) -> None:
    logging.disable(logging.WARNING)  # of libraries that transformers finds installed and looks into
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if expected.exists():
        record = torch.load(expected)
        with torch.no_grad():
            difference = (model(record["input_ids"]).logits - record["logits"]).abs().max().item()
        print(f"logits: largest difference from the training model's own {difference:.1e}")
    inputs = tokenizer("the river runs", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    said = tokenizer.decode(tokens[0])
    print(f"{type(model).__name__} and {type(tokenizer).__name__} load; random weights say: {said!r}")


def compare(source: Path, back: Path) -> int:
    """Compares every tensor of every shard; prints what came of it."""
    same = different = 0
    for shard in sorted(path.name for path in source.glob("model_tp*.pt")):
        before, after = (torch.load(folder / shard, weights_only=True) for folder in (source, back))
        for name in before.keys() | after.keys():
            if name in before and name in after and torch.equal(before[name], after[name]):
                same += 1
            else:
                different += 1
                print(f"  {shard}: {name} differs")
    print(f"there and back: {same} tensors equal bit for bit, {different} different")
    return different


if __name__ == "__main__":
    sys.exit(main())
