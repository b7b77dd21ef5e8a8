"""One of several processes that load a folder with tp_plan="auto"; `tests/test_model_parallel.py` starts them.

    torchrun --nproc-per-node 2 tests/tensor_parallel.py FAMILY FOLDER OUT

Process 0 writes the logits and the greedy tokens to OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from model_families import FAMILIES, tokens


def main(name: str, folder: str, out: str) -> None:
    dist.init_process_group("gloo")
    # Not through trust_remote_code: two processes would write transformers' copy of the code at once.
    family = next(family for family in FAMILIES if family.name == name)
    model = family.cls("ForCausalLM").from_pretrained(folder, tp_plan="auto")
    ids = tokens(2, 40)
    with torch.no_grad():
        logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    if dist.get_rank() == 0:
        torch.save({"logits": logits, "generated": generated}, Path(out))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
