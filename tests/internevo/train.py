"""Trains on a Hugging Face class in the real framework, one process per rank, on a CPU.

    python train.py CONFIG.py TARGET --dtype float32 --unpacked --mode isp --tp 1 --dp 1 --steps 4

To be run in an InternEvo folder that has the page's four steps in it; CONFIG.py is step 4's. The weights that
ckpt_type="hf_model" reads are compared with the folder's, the ZeRO optimizer trains on one batch, or with --data on
what the framework's own loader reads, the loss has to fall, and the framework saves into TARGET. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import framework
import torch
import torch.distributed as dist

SEQUENCE, ROWS, MICRO_BATCHES = 64, 2, 2
SAMPLES = [0, 40, 64, 100, SEQUENCE * ROWS]
"""Where the samples of a packed row begin and the last ends."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--unpacked", action="store_true")
    parser.add_argument("--mode", choices=("mtp", "isp"), default="mtp")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--wp", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--data", type=Path, help="folder of tokenized text, for the framework's own loader")
    parser.add_argument("--replaced", action="store_true", help="put the framework's modules into the model")
    parser.add_argument("--default_shape", type=json.loads, default={}, help="in the place of the class's defaults")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        framework.in_processes(train_rank, arguments.processes, arguments, Path(scratch) / "meeting")
    return 0


def train_rank(rank: int, arguments: argparse.Namespace, meeting: Path) -> None:
    """One process of the run."""
    written: dict[str, Any] = {}
    exec(arguments.config.read_text(encoding="utf-8"), written)
    context = framework.start(settings(written, arguments), rank, arguments.processes, meeting)
    from internlm.initialize.launch import args_sanity_check

    args_sanity_check()
    said = run(context, arguments)
    if rank == 0:
        print(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


def settings(written: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The training configuration: what the page's step 4 says, and what any configuration of the framework has."""
    page = {key: written[key] for key in ("model_type", "ckpt", "data")}
    model = {
        "checkpoint": False,
        "num_attention_heads": 4,
        "embed_split_hidden": True,
        "vocab_size": 320,
        "parallel_output": False,
        "hidden_size": 64,
        "num_layers": 4,
        "mlp_ratio": 8 / 3,
        "apply_post_layer_norm": False,
        "dtype": f"torch.{arguments.dtype}",
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": 1e-5,
        "use_flash_attn": not arguments.unpacked,
        "num_chunks": 1,
    }
    data = {
        "seq_len": SEQUENCE,
        "micro_num": MICRO_BATCHES,
        "micro_bsz": ROWS,
        "use_packed_dataset": not arguments.unpacked,
        "pack_sample_into_one": False,
        "rampup_batch_size": "",
        "total_steps": arguments.steps,
        "skip_batches": "",
    }
    if arguments.data is not None:
        data |= {"type": "tokenized", "train_folder": str(arguments.data), "num_worker": 0}
    scaler = {"initial_scale": 2**16 if arguments.dtype == "float16" else 1, "min_scale": 1, "growth_interval": 1000}
    return {
        **page,
        "JOB_NAME": "tests",
        "model": model,
        "data": {**page["data"], **data},
        "ckpt": {**page["ckpt"], "enable_save_ckpt": False},
        "parallel": {
            "zero1": {"size": -1, "fsdp": False},
            "tensor": {"size": arguments.tp, "mode": arguments.mode},
            "pipeline": {"size": 1, "interleaved_overlap": True},
            "weight": {"size": arguments.wp, "overlap": False, "memory_pool": False},
        },
        "grad_scaler": {
            "fp16": scaler,
            "growth_factor": 2,
            "backoff_factor": 0.5,
            "max_scale": 2**24,
            "hysteresis": 2,
        },
        "hybrid_zero_optimizer": {
            "overlap_sync_grad": False,
            "overlap_sync_param": False,
            "reduce_bucket_size": 2**20,
            "clip_grad_norm": 1.0,
        },
        "loss": {"label_smoothing": 0},
        "adam": {
            "lr": 3e-3,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "adam_beta2_c": 0,
            "adam_eps": 1e-8,
            "weight_decay": 0.01,
        },
        "lr_scheduler": {"total_steps": 100, "init_steps": 0, "warmup_ratio": 0.0, "eta_min": 1e-5, "last_epoch": -1},
        "beta2_scheduler": {"init_beta2": 0.95, "c": 0, "cur_iter": -1},
    }


def run(context: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The trainer's own way from the model to the saved checkpoint."""
    from internlm.checkpoint import CheckpointManager
    from internlm.checkpoint.components import save_model_checkpoint
    from internlm.core.trainer import TrainState
    from internlm.data import build_train_loader_with_data_type
    from internlm.initialize.initialize_trainer import initialize_trainer
    from internlm.model.losses import FlashGPTLMLoss
    from internlm.train import initialize_model, initialize_optimizer, initialize_parallel_communicator
    from internlm.utils.storage_manager import llm_save

    config = context.config
    shrink(config.model_type, arguments.default_shape)
    folder = Path(config.ckpt.load_ckpt_info["path"])
    if arguments.replaced:
        config.ckpt.load_ckpt_info = None
        replace_modules(folder)
    model = initialize_model()
    communicator = initialize_parallel_communicator(model)
    optimizer, beta2_scheduler, lr_scheduler = initialize_optimizer(model, communicator)
    loader = None if arguments.data is None else build_train_loader_with_data_type()[0]
    train_state = TrainState(config, None if loader is None else loader.batch_sampler)
    manager = CheckpointManager(
        ckpt_config=config.ckpt,
        model=model,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        train_dl=loader,
        model_config=config.model,
    )
    manager.try_resume_training(train_state)
    if not arguments.replaced:
        check_loaded(model.model, folder)
    trainer, _, _, _ = initialize_trainer(
        model=model,
        optimizer=optimizer,
        criterion=FlashGPTLMLoss(parallel_output=False, label_smoothing=0),
        lr_scheduler=lr_scheduler,
        beta2_scheduler=beta2_scheduler,
        scheduler_hooks=[],
    )
    given = repeated(batch(not arguments.unpacked)) if loader is None else loaded(loader, train_state)
    said = {**steps(trainer, given, arguments.steps), "evaluated": evaluated(trainer)}
    arguments.target.mkdir(parents=True, exist_ok=True)
    save_model_checkpoint(f"local:{arguments.target}", model.model)
    check_resumes(model.model, arguments.target)
    logits = evaluation_logits(model.model)
    if context.get_global_rank() == 0:
        llm_save(f"local:{arguments.target}/model_config.pt", saved_obj=config.model)
        model.model.config.save_pretrained(arguments.target / "class")
        torch.save(logits, arguments.target / "class" / "logits.pt")
    dist.barrier()
    return said


def shrink(model_type: str, shape: dict[str, Any]) -> None:
    """Make the defaults of the configuration class small: those of 7B parameters would not fit here."""
    import inspect

    from internlm.model import builder

    if not shape:
        return
    module, name = builder.hf_model_conf_map[model_type]
    build = getattr(__import__(module, fromlist=[name]), name).__init__
    parameters = [each for each in inspect.signature(build).parameters.values() if each.default is not each.empty]
    build.__defaults__ = tuple(shape.get(each.name, each.default) for each in parameters)


def replace_modules(folder: Path) -> None:
    """Does what InternEvo does since autumn 2024: its own modules take the places of others, by their class names.

    Of a linear layer each weight-parallel rank holds some of the rows. Weights are those of the folder.
    """
    from internlm.core.context import ParallelMode
    from internlm.core.context import global_context as context
    from internlm.model.modules.embedding import Embedding1D
    from internlm.model.modules.linear import new_linear
    from internlm.model.modules.norm import new_layer_norm
    from internlm.train import pipeline

    build, (ranks, rank) = (
        pipeline.create_model,
        (
            context.get_world_size(ParallelMode.WEIGHT),
            context.get_local_rank(ParallelMode.WEIGHT),
        ),
    )

    def replacement(name: str, module: torch.nn.Module) -> torch.nn.Module | None:
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            return new_layer_norm("rmsnorm", tuple(module.weight.shape), eps=module.variance_epsilon)
        if kind == "Embedding":
            return Embedding1D(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx)
        if kind == "Linear":
            role = "head" if name in ("lm_head", "output") else "column"
            bias = module.bias is not None
            return new_linear(name, module.in_features, module.out_features, bias, manual_select_class=role)
        return None

    def create_model(*args: Any, **kwargs: Any) -> torch.nn.Module:
        from internlm.checkpoint.load_funcs import LOAD_FUNC_DICT

        model = build(*args, **kwargs)
        LOAD_FUNC_DICT["hf_model"](str(folder), model)
        for name, module in list(model.named_modules()):
            new = replacement(name, module)
            if new is None:
                continue
            for of, parameter in new.named_parameters():
                whole = module.get_parameter(of)
                cut = whole if parameter.shape == whole.shape else whole.chunk(ranks)[rank]
                parameter.data = cut.detach().clone()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
        return model

    pipeline.create_model = create_model


def check_loaded(model: torch.nn.Module, folder: Path) -> None:
    """Every tensor is that of the folder, in the type that is trained in."""
    from safetensors.torch import load_file

    expected = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    found = model.state_dict()
    different = [name for name in found if not torch.equal(found[name], expected[name].to(found[name].dtype))]
    if different or expected.keys() != found.keys():
        raise AssertionError(f"not as in {folder}: {different}, {expected.keys() ^ found.keys()}")


def check_resumes(model: torch.nn.Module, folder: Path) -> None:
    """The framework loads what it has just saved."""
    from internlm.checkpoint.components import load_model_checkpoint

    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_model_checkpoint(f"local:{folder}", model)
    if not all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items()):
        raise AssertionError(f"{folder} does not come back")


def batch(packed: bool) -> Any:
    """Two micro batches through the framework's own collate function."""
    from internlm.data.tokenized.collaters import packed_collate_fn

    generator = torch.Generator().manual_seed(0)
    ends = SAMPLES if packed else list(range(0, SEQUENCE * ROWS + 1, SEQUENCE))
    samples = []
    for _ in range(MICRO_BATCHES):
        tokens = torch.randint(3, 320, (SEQUENCE * ROWS,), generator=generator).tolist()
        pieces = list(itertools.pairwise(ends))
        samples.append(
            {
                "tokens": tokens,
                "labels": [label for start, end in pieces for label in [*tokens[start + 1 : end], -100]],
                "type_ids": [0] * len(tokens),
                "cu_seqlens": ends,
                "indexes": [index for start, end in pieces for index in range(end - start)],
            }
        )
    data, labels = packed_collate_fn(samples, SEQUENCE * ROWS)
    del data["type_ids"]  # its load_new_batch takes them out
    return data, labels


def repeated(data: Any) -> Iterator[Any]:
    while True:
        yield copy.deepcopy(data)


def loaded(loader: Any, train_state: Any) -> Iterator[Any]:
    """Batch after batch, as the framework's training loop asks for them."""
    from internlm.train import load_new_batch

    remaining = iter(loader)
    while True:
        data, remaining = load_new_batch(loader, remaining, train_state)
        data[0].pop("type_ids")
        yield data


def steps(trainer: Any, batches: Iterator[Any], count: int) -> dict[str, Any]:
    """Training steps, whose loss has to fall; `tokens` are those of the first micro batch."""
    trainer.train()
    losses, norms, tokens = [], [], []
    for _, data in zip(range(count), batches, strict=False):
        tokens = tokens or data[0]["input_ids"][0].tolist()
        trainer.zero_grad()
        _, _, loss, *_ = trainer.execute_schedule(
            iter([data]), forward_only=False, return_loss=True, return_output_label=False
        )
        losses.append(float(loss))
        succeeded, norm = trainer.step()
        if not succeeded:
            raise AssertionError(f"a step was not taken: {norm}")
        norms.append({name: float(value) for name, value in norm.items()})
    if not losses[-1] < losses[0] - 0.1:
        raise AssertionError(f"the loss does not fall: {losses}")
    return {"losses": losses, "norms": norms, "tokens": tokens}


def evaluated(trainer: Any) -> float:
    """The loss of a pass of evaluation, as the framework makes it between steps."""
    packed = trainer.engine.model  # the wrapper in evaluation mode
    trainer.eval()
    from internlm.core.context import global_context as context

    data = batch(context.config.data.use_packed_dataset)
    with torch.no_grad():
        _, _, loss, *_ = trainer.execute_schedule(
            iter([data]), forward_only=True, return_loss=True, return_output_label=False
        )
    del packed
    return float(loss)


@torch.no_grad()
def evaluation_logits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Inputs, and what the trained model makes of them."""
    ids = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(7))
    return SimpleNamespace(ids=ids, logits=model.eval()(input_ids=ids)[0]).__dict__


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
