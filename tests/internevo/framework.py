"""InternEvo (PyPI: internevo 0.5.2.dev20240525) on a processor: a device class for it, and how a run is started.

The framework has classes for GPUs alone. Training needs nothing else; the logits of its own models need what is below.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401  (it has the distutils that gputil imports and Python 3.12 lacks)


def use_processor() -> None:
    """Make a processor of the framework's one device, which all of its modules hold."""
    from internlm.accelerator import get_accelerator
    from internlm.accelerator.cuda_accelerator import CUDA_Accelerator

    class Nothing:
        """A stream of a device that has none."""

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    class Processor(CUDA_Accelerator):
        _types = ("BFloat16Tensor", "FloatTensor", "HalfTensor", "IntTensor", "LongTensor")

        def __getattribute__(self, name: str) -> Any:
            return getattr(torch, name) if name in Processor._types else super().__getattribute__(name)

        def device_count(self) -> int:
            return 1

        def synchronize(self, device_index: Any = None) -> None:
            pass

        empty_cache = reset_peak_memory_stats = lambda self, *args: None
        current_stream = default_stream = lambda self, *args: Nothing()
        Stream = property(lambda self: lambda *args, **kwargs: Nothing())

        def stream(self, _stream: Any) -> Any:
            return contextlib.nullcontext()

        def set_rng_state(self, new_state: torch.Tensor, device_index: Any = None) -> None:
            torch.set_rng_state(new_state)

        def get_rng_state(self, device_index: Any = None) -> torch.Tensor:
            return torch.get_rng_state()

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

    get_accelerator().__class__ = Processor


def in_processes(work: Any, count: int, *arguments: Any) -> None:
    """Calls `work(rank, *arguments)` in processes of their own, forked after what is slow to import; one needs none."""
    use_processor()
    import internlm.checkpoint
    import internlm.train  # noqa: F401

    torch.set_num_threads(1)
    if count == 1:
        work(0, *arguments)
    else:
        torch.multiprocessing.start_processes(work, arguments, nprocs=count, start_method="fork")


def start(config: dict[str, Any], rank: int, world: int, meeting: Path) -> Any:
    """The framework's global context, started for a run of `world` processes that meet at the file `meeting`."""
    from internlm.core.context import Config, ParallelMode
    from internlm.core.context import global_context as context
    from internlm.core.context.random import add_seed, set_mode

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    context.load_config(Config(config))
    ranks = list(range(world))
    context._register_dist(rank, world, dist.GroupMember.WORLD, None, ranks, ParallelMode.GLOBAL)
    context._global_ranks[ParallelMode.GLOBAL] = rank
    context.init_parallel_groups()
    context.get_cpu_group = context.get_group  # gloo's groups are those of processors
    # What its set_seed does, which asks for a GPU.
    random.seed(1024)
    np.random.seed(1024)
    torch.manual_seed(1024)
    for mode in (ParallelMode.DATA, ParallelMode.WEIGHT_DATA, ParallelMode.DUMMY):
        add_seed(mode, 1024)
    for mode in (ParallelMode.TENSOR, ParallelMode.WEIGHT):
        add_seed(mode, 1024 + context.get_local_rank(mode))
    set_mode(ParallelMode.DUMMY)
    return context


@contextlib.contextmanager
def more_of_gloo() -> Iterator[None]:
    """What gloo lacks: all_to_all of lists, where everybody gathers everything and takes its own, and gathering into a
    tensor of another shape than the pieces end to end have, which are seen as flat."""
    gather = dist.all_gather_into_tensor

    def all_to_all(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any = None, **_: Any) -> None:
        count, rank = dist.get_world_size(group), dist.get_rank(group)
        everything: list[Any] = [None] * count
        dist.all_gather_object(everything, inputs, group=group)
        for sender, output in enumerate(outputs):
            output.copy_(everything[sender][rank])

    def all_gather_into_tensor(output: torch.Tensor, piece: torch.Tensor, *others: Any, **more: Any) -> Any:
        return gather(output.view(-1), piece.view(-1), *others, **more)

    with (
        mock.patch.object(dist, "all_to_all", all_to_all),
        mock.patch.object(dist, "all_gather_into_tensor", all_gather_into_tensor),
    ):
        yield


@contextlib.contextmanager
def rotary_of_copies() -> Iterator[None]:
    """Its rotary embedding in float32 overwrites what it has still to read: give it copies."""
    from internlm.model.ops import rotary_emb

    rotate = rotary_emb._torch_apply_rotary_func

    def of_copies(x1: torch.Tensor, x2: torch.Tensor, *others: Any) -> None:
        rotate(x1.clone(), x2.clone(), *others)

    with mock.patch.object(rotary_emb, "_torch_apply_rotary_func", of_copies):
        yield
