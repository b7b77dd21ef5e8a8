"""What the GPU does in a decoding step of `generate()`: kernels by kind, and how long it waits between them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LogitsProcessor, LogitsProcessorList

FIRST, STEPS = 32, 64  # the first steps compile, record the graph and fill the queue
KINDS = {  # a kernel is of the first kind of which its name has a part
    "sums and gathers over GPUs": ("nccl", "allreduce", "all_reduce", "symm"),
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax"),
    "matrix products": ("gemm", "gemv", "cutlass", "nvjet", "triton_tem", "splitk", "bmm", "_mm_", "dot"),
    "copies and fills": ("memcpy", "memset", "fillfunctor", "copy_kernel"),
}
OTHER = "elementwise, norms, sums of a row"


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of `spans`, which may overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@dataclass
class StepProfile:
    """Per step, in milliseconds: by the clock, with a kernel running, and by kind; and kernels by kind."""

    wall: float
    busy: float
    times: dict[str, float]
    counts: dict[str, float]
    longest: Sequence[tuple[str, float]]
    """The kernels that take most, by name."""


class Window(LogitsProcessor):
    """Called once a step; profiles STEPS of them after FIRST."""

    def __init__(self) -> None:
        self.calls = 0
        self.profiler = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
        self.wall = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == FIRST:
            torch.cuda.synchronize()
            self.profiler.start()
            self.wall = -time.perf_counter()
        elif self.calls == FIRST + STEPS:
            torch.cuda.synchronize()
            self.wall += time.perf_counter()
            self.profiler.stop()
        return scores


def profile_steps(model: Any, ids: torch.Tensor, **settings: Any) -> StepProfile:
    """Profiles greedy decoding after `ids`; `settings` make at least FIRST + STEPS new tokens."""
    window = Window()
    model.generate(ids, logits_processor=LogitsProcessorList([window]), **settings)
    if window.calls < FIRST + STEPS:
        raise SystemExit(f"generate() made {window.calls} steps, and {FIRST + STEPS} are profiled.")
    spans, times, counts, names = [], Counter[str](), Counter[str](), Counter[str]()
    for event in window.profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spans.append((event.time_range.start, event.time_range.end))
        duration = event.time_range.elapsed_us() / 1e3 / STEPS
        kind = kind_of(event.name)
        times[kind] += duration
        counts[kind] += 1
        names[event.name] += duration
    per_step = {kind: count / STEPS for kind, count in counts.items()}
    busy = covered(spans) / 1e3 / STEPS
    return StepProfile(window.wall * 1e3 / STEPS, busy, dict(times), per_step, names.most_common(12))
