"""Loads a folder of shards with the training framework's own loader, one process per rank, on a CPU.

    python load_shards.py FOLDER internlm|internlm2 [--tp 2] [--pp 2] [--wp 4] [--allow-second-name] [--logits FILE]

Needs the framework (PyPI: internevo 0.5.2.dev20240525) and torch; nothing of this repository but framework.py. Every
rank builds its part of the model from model_config.pt with the framework's builder, loads its file with the framework's
loader, and fails where that logs a missing or an unexpected name or where a parameter is not, bit for bit, what the
file holds. FILE holds {input_ids [B, T], logits [B, T, V]}: those of the framework's model must be within 1e-4 of it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import framework
import torch
import torch.distributed as dist

MODEL_TYPES = {"internlm": "INTERNLM", "internlm2": "INTERNLM2_PUBLIC"}
NOT_OF_THIS_BUILDER = {
    "INTERNLM": ("adapt_hf", "norm_head", "no_bias", "num_kv_attention_heads"),
    "INTERNLM2_PUBLIC": ("adapt_hf",),
}
"""Keys that other versions of the builder take; the framework hands each key on as an argument."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("family", choices=MODEL_TYPES)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--wp", type=int, help="weight-parallel size: the run is isp")
    parser.add_argument("--logits", type=Path, help="inputs, and the logits that the model must give")
    parser.add_argument("--allow-second-name", action="store_true", help="of the embedding, in the only shard")
    arguments = parser.parse_args()
    world = arguments.pp * math.lcm(arguments.tp, arguments.wp or 1)
    with tempfile.TemporaryDirectory() as scratch:
        framework.in_processes(load_rank, world, world, arguments, Path(scratch) / "meeting")
    sizes = f"tp {arguments.tp}, pp {arguments.pp}, " + (f"isp wp {arguments.wp}" if arguments.wp else "mtp")
    print(f"ok   {arguments.folder.name}: {world} ranks ({sizes}) hold exactly what their files hold")
    return 0


def load_rank(rank: int, world: int, arguments: argparse.Namespace, meeting: Path) -> None:
    """One process of the run."""
    context = start(rank, world, arguments, meeting)
    from internlm.checkpoint import components
    from internlm.model.builder import create_model
    from internlm.model.registry import register_model_initializer
    from internlm.utils.storage_manager import init_storage_manager

    with contextlib.suppress(AssertionError):  # registered on import, in some versions
        register_model_initializer()
    init_storage_manager(False, None, False)
    model = create_model(context.config.model_type, **dict(context.config.model))
    if isinstance(model, torch.nn.ModuleList):  # chunks: training wraps each, and saves them with the wrapper's name
        from internlm.core.naive_amp import NaiveAMPModel

        wrapped = [NaiveAMPModel(model=chunk, dtype=torch.float32, sync_buffer=False) for chunk in model]
        model = torch.nn.ModuleList(wrapped)
    with torch.no_grad():
        for parameter in model.parameters():  # what is not loaded stays so
            parameter.fill_(float("nan"))
    said: list[str] = []
    with mock.patch.object(components.logger, "warning", said.append):
        components.load_model_checkpoint(f"local:{arguments.folder}", model)
    unexpected = [text for text in said if not (arguments.allow_second_name and "unexpected" in text)]
    if unexpected or any(text.count("'") > 2 for text in said):
        raise AssertionError(f"rank {rank}: {said}")
    compare(rank, model, saved_file(arguments, context))
    if arguments.logits is not None:
        compare_logits(rank, model, arguments.logits, context)
    dist.barrier()
    dist.destroy_process_group()


def start(rank: int, world: int, arguments: argparse.Namespace, meeting: Path) -> Any:
    """The framework's global context, started for the run."""
    settings = torch.load(arguments.folder / "model_config.pt", weights_only=True)
    model_type = MODEL_TYPES[arguments.family]
    settings = {key: value for key, value in settings.items() if key not in NOT_OF_THIS_BUILDER[model_type]}
    settings |= {"dtype": torch.float32, "parallel_output": False, "use_flash_attn": False}
    mode = "mtp" if arguments.wp is None else "isp"
    parallel = {
        "zero1": {"size": -1, "fsdp": False},
        "tensor": {"size": arguments.tp, "mode": mode},
        "pipeline": {"size": arguments.pp, "interleaved_overlap": True},
        "weight": {"size": arguments.wp or 1, "overlap": False, "memory_pool": False},
        "sequence_parallel": mode == "isp",
    }
    data = {"use_packed_dataset": False, "seq_len": 64, "micro_num": 1, "micro_bsz": 1}
    config = {"model_type": model_type, "model": settings, "parallel": parallel, "data": data}
    return framework.start(config, rank, world, meeting)


def saved_file(arguments: argparse.Namespace, context: Any) -> Path:
    from internlm.core.context import ParallelMode

    tp, wp, pp = (
        context.get_local_rank(mode) for mode in (ParallelMode.TENSOR, ParallelMode.WEIGHT, ParallelMode.PIPELINE)
    )
    name = f"model_tp{tp}_pp{pp}.pt" if arguments.wp is None else f"model_tp{tp}_wp{wp}_pp{pp}.pt"
    return Path(arguments.folder / name)


def compare(rank: int, model: torch.nn.Module, path: Path) -> None:
    """Every tensor that the model would save is that of the file."""
    expected, found = torch.load(path, weights_only=True), model.state_dict()
    for name, tensor in found.items():
        if name not in expected or not torch.equal(tensor, expected[name].to(tensor.dtype)):
            raise AssertionError(f"rank {rank}: {name} is not as {path.name} has it")


def compare_logits(rank: int, model: torch.nn.Module, path: Path, context: Any) -> None:
    """The framework's own forward pass, with its communicators, gives the logits in the file."""
    from internlm.train import initialize_parallel_communicator

    expected = torch.load(path, weights_only=True)
    chunks = list(model) if isinstance(model, torch.nn.ModuleList) else [model]
    initialize_parallel_communicator(torch.nn.ModuleList(chunks))
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad(), framework.rotary_of_copies(), framework.more_of_gloo():
        rows = expected["input_ids"].split(1)  # sequence parallelism of isp takes one row
        found = torch.cat([passed_on(chunks, row, context) for row in rows])
    distance = float((found.float() - expected["logits"]).abs().max())
    if rank == 0:
        print(f"     logits within {distance:.1e}")
    if not distance < 1e-4:
        raise AssertionError(f"rank {rank}: the logits are {distance} off")


def passed_on(chunks: list[torch.nn.Module], ids: torch.Tensor, context: Any) -> torch.Tensor:
    """What the last stage gives: chunk after chunk, each stage in its turn, as the schedule of a pipeline would."""
    from internlm.core.context import ParallelMode

    is_pipeline, stage = (
        context.is_using_parallel_mode(ParallelMode.PIPELINE),
        context.get_local_rank(ParallelMode.PIPELINE),
    )
    stages = context.get_ranks_in_group(ParallelMode.PIPELINE) if is_pipeline else [context.get_global_rank()]
    hidden: Any = None
    positions = {}
    if context.config.parallel["tensor"]["mode"] == "isp":  # as its packed_data_normalizer does
        ranks, own = context.get_world_size(ParallelMode.TENSOR), context.get_local_rank(ParallelMode.TENSOR)
        positions = {"indexes": torch.arange(ids.shape[1]).chunk(ranks)[own]}
    for chunk, (turn, sender) in itertools.product(chunks, enumerate(stages)):
        if turn == stage:
            passed = chunk(input_ids=ids, **positions) if hidden is None else chunk(hidden_states=hidden, **positions)
            hidden = (passed[0] if isinstance(passed, tuple) else passed).float().contiguous()
        if is_pipeline:
            shape = [list(hidden.shape) if turn == stage else None]
            dist.broadcast_object_list(shape, src=sender, group=context.get_group(ParallelMode.PIPELINE))
            hidden = hidden if turn == stage else torch.empty(shape[0])  # type: ignore[arg-type]
            dist.broadcast(hidden, src=sender, group=context.get_group(ParallelMode.PIPELINE))
    return hidden


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
