"""One of several processes that load a folder with tp_plan="auto"; `tests/models/test_model_parallel.py` starts them.

    torchrun --nproc-per-node 2 tests/models/tensor_parallel.py FAMILY FOLDER OUT

On GPUs with NCCL where there are enough of them, else on the CPU with gloo. Process 0 writes the logits, the greedy
tokens, with a dynamic cache and by compiled steps with a static one, and the backend to OUT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import CompileConfig

from tests.support.model_families import FAMILIES, tokens


def main(name: str, folder: str, out: str) -> None:
    rank, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= processes
    if on_gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    # Not through trust_remote_code: two processes would write transformers' copy of the code at once.
    family = next(family for family in FAMILIES if family.name == name)
    model = family.cls("ForCausalLM").from_pretrained(folder, tp_plan="auto")
    ids = tokens(2, 40).to(model.device)
    with torch.no_grad():
        logits = model(ids).logits
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    generated = model.generate(ids, **settings)
    compiling = CompileConfig() if on_gpus else CompileConfig(backend="aot_eager")
    compiling._compile_all_devices = True  # the CPU, too
    compiled = model.generate(ids, **settings, cache_implementation="static", compile_config=compiling)
    weight = model.get_input_embeddings().weight
    rows = len(weight.to_local() if isinstance(weight, DTensor) else weight)
    if dist.get_rank() == 0:
        found = {
            "logits": logits,
            "generated": generated,
            "compiled": compiled,
            "backend": dist.get_backend(),
            "embedding_rows": rows,
        }
        torch.save(found, Path(out))
    dist.barrier()
    # An orderly end now and then aborts in threads of gloo's ("terminate called without an active exception"), after
    # all that is tested here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
