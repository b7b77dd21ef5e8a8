"""How fast the models are on a GPU, beside transformers' LlamaForCausalLM of the same shape.

    python benchmarks/model_speed.py                                        # everything
    python benchmarks/model_speed.py --families internlm2 --sections prefill decode --backends sdpa

Needs torch and transformers; rows of flash_attention_2 are left out where flash-attn is not installed. It prints
Markdown tables, one for each section:

    prefill     one pass over a prompt that fills the cache and gives the last token's logits
    generate    what a user types: `model.generate` of 128 tokens, its loop and its first pass included, with the
                dynamic cache; with `cache_implementation="static"`, which compiles by itself; and with that and a
                compile_config whose kernels are tuned for one sequence. The first call compiles; its seconds are told
    batching    `model.generate_batch` of 64 requests of 64 to 568 tokens, 128 new ones each; milliseconds a new token
    decode      one token a sequence, dynamic cache, after a prompt of --context tokens
    compiled    the same with a static cache and torch.compile, one layer's kernels for all, a single sequence
    training    forward and backward of 4096 tokens, with and without gradient checkpointing

All but `generate` and `batching` are tuned loops: they leave out what generate does between two passes.

Both models have random bfloat16 weights and read the same random tokens, in one process. Rounds of the one and the
other alternate (but `compiled`: one model after the other), after a warm-up round that does not count; device events
take the time (of `batching` the clock), and medians are given. The decode rounds run over the same lengths each time,
because a fused kernel may be planned anew for each new one.

Beside each time stands its floor: the larger of two times, that of the floating-point operations which the model
cannot do without at the rate of a large matrix product, and that of the bytes which it must move at the bandwidth of
a large copy. Both ceilings are measured first. Memory is the peak of the model and its pass alone.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.utils import is_flash_attn_2_available

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm2_model import InternLM2Config, InternLM2ForCausalLM
from internlm_model import InternLMConfig, InternLMForCausalLM

BYTES = 2  # of a bfloat16
GIB = 2**30
DECODE_STEPS = 16
COMPILED_STEPS = 64  # one step is short beside the time from the call to its first kernel
STATIC_CACHE = 1024
GENERATED = 128
TRAINING_TOKENS = 4096
REQUESTS = 64
# Eager attention holds the scores of all pairs of tokens: 64 GiB a layer for 32768 tokens and 32 heads.
LONGEST_EAGER = 8192

# One sequence reads every weight once and multiplies it once: a matrix product is a sum of products there, which
# coordinate descent tuning turns into kernels that reach the memory's bandwidth; looking in all directions, it seldom
# ends with a slow one. A low threshold keeps them from computing the activation again in every block.
COMPILE_OPTIONS: dict[str, Any] = {
    "triton.cudagraphs": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "realize_opcount_threshold": 8,
}


# What `generate` is asked for, beside greedy decoding.
TUNED = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
GENERATE: dict[str, Callable[[], dict[str, Any]]] = {
    "dynamic cache": dict,
    "static cache": lambda: {"cache_implementation": "static"},
    "static cache, tuned": lambda: {
        "cache_implementation": "static",
        # torch.compile takes no options beside a mode, and says so of the default, too
        "compile_config": CompileConfig(mode=None, fullgraph=True, options=TUNED),  # type: ignore[arg-type]
    },
}


@dataclass(frozen=True)
class Work:
    """What a pass cannot do without."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the work that they stand for."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    bias: bool

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden**2 * (1 + self.kv_heads / self.heads)
        return int(attention) + 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocab

    @property
    def weight_bytes(self) -> int:
        """Of the weights that a pass reads whole: not the embedding, of which it reads a row for every token."""
        return BYTES * (self.layers * self.layer_parameters + self.head_parameters)

    def cache_bytes(self, tokens: int) -> float:
        return BYTES * 2 * self.layers * self.hidden * self.kv_heads / self.heads * tokens

    def causal_attention(self, tokens: int) -> float:
        """Operations of q k^T and of the product with v, half of the pairs masked."""
        return 2 * self.layers * self.hidden * tokens**2

    def prefill(self, tokens: int) -> Work:
        products = 2 * (self.layers * self.layer_parameters * tokens + self.head_parameters)
        return Work(products + self.causal_attention(tokens), self.weight_bytes + self.cache_bytes(tokens))

    def decode(self, batch: int, context: int) -> Work:
        products = 2 * (self.layers * self.layer_parameters + self.head_parameters)
        attention = 4 * self.layers * self.hidden * context
        return Work(batch * (products + attention), self.weight_bytes + batch * self.cache_bytes(context))

    def training(self, tokens: int, checkpointing: bool) -> Work:
        """A backward pass is two forward passes; checkpointing does the layers' forward pass once more."""
        layers = 2 * self.layers * self.layer_parameters * tokens + self.causal_attention(tokens)
        head = 2 * self.head_parameters * tokens
        passes = 4 if checkpointing else 3
        return Work(passes * layers + 3 * head, passes * self.weight_bytes)


SHAPES = {
    "internlm2": Shape(4096, 14336, 32, 32, 8, 92544, bias=False),
    "internlm": Shape(4096, 11008, 32, 32, 32, 103168, bias=True),
}
NAMES = {"internlm2": "InternLM2", "internlm": "InternLM"}


def chosen_shape(family: str, arguments: argparse.Namespace) -> Shape:
    """The family's 7B shape, with fewer layers where the command line asks for a trial."""
    return replace(SHAPES[family], layers=arguments.layers or SHAPES[family].layers)


def build(family: str, shape: Shape) -> Any:
    """A model of `shape` with random weights on the GPU; `family` may be "llama"."""
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            if family == "llama":
                return LlamaForCausalLM(
                    LlamaConfig(num_key_value_heads=shape.kv_heads, attention_bias=shape.bias, **sizes)
                ).eval()
            if family == "internlm2":
                return InternLM2ForCausalLM(
                    InternLM2Config(num_key_value_heads=shape.kv_heads, bias=shape.bias, **sizes)
                ).eval()
            rotary = {"base": 10000, "type": "origin"}
            return InternLMForCausalLM(InternLMConfig(bias=shape.bias, rotary=rotary, **sizes)).eval()
    finally:
        torch.set_default_dtype(before)


def random_tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(length)
    return torch.randint(3, 90000, (batch, length), device="cuda", generator=generator)


def milliseconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Ceilings:
    """What the GPU can do, measured on random data."""

    @cached_property
    def bytes_per_second(self) -> float:
        """Bytes read and written by a copy of 4 GiB."""
        source = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        time = statistics.median(milliseconds(lambda: target.copy_(source)) for _ in range(12))
        return 2 * source.numel() * BYTES / time * 1e3

    @cached_property
    def flops_per_second(self) -> float:
        """Operations of a product of two 8192 x 8192 matrices."""
        left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        time = statistics.median(milliseconds(lambda: left @ right) for _ in range(30))
        return 2 * 8192**3 / time * 1e3

    def floor(self, work: Work) -> float:
        """Milliseconds that `work` takes at least."""
        return 1e3 * max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)


def announced_ceilings(gpus: str) -> Ceilings:
    """What one of the GPUs can do; printed, and before it their name and what runs on them."""
    ceilings = Ceilings()
    print(f"{gpus}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"copy {ceilings.bytes_per_second / 1e9:.0f} GB/s, product {ceilings.flops_per_second / 1e12:.0f} TFLOP/s\n")
    torch.cuda.empty_cache()
    return ceilings


def never_end_early(model: Any) -> None:
    """Has every generate() make as many tokens as it is asked for."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0


@dataclass
class Measurement:
    """Times of a round's pass in milliseconds, and the peak of memory in bytes."""

    times: list[float] = field(default_factory=list)
    peak: int = 0
    warm_up: float = 0.0

    @property
    def time(self) -> float | None:
        """The median, or None where the memory did not suffice."""
        return statistics.median(self.times) if self.times else None


Pass = Callable[[Any], float]
"""Runs a pass with a model and returns its milliseconds."""


def parameter_bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def attempt(run: Pass, model: Any) -> float | None:
    """The milliseconds of a pass, or None where the memory does not suffice."""
    try:
        return run(model)
    except torch.OutOfMemoryError:
        return None


def measure(models: dict[str, Any], run: Pass, rounds: int) -> dict[str, Measurement]:
    """Alternates the models, after a round that warms up; a model that runs out of memory is left out from there."""
    results = {name: Measurement() for name in models}
    running = dict(models)
    for number in range(rounds + 1):
        for name, model in list(running.items()):
            held = torch.cuda.memory_allocated() - parameter_bytes(model)
            torch.cuda.reset_peak_memory_stats()
            time = attempt(run, model)
            results[name].peak = max(results[name].peak, torch.cuda.max_memory_allocated() - held)
            if time is None:
                del running[name]
                results[name].times.clear()
                torch.cuda.empty_cache()
            elif number:
                results[name].times.append(time)
            else:
                results[name].warm_up = time
    return results


@torch.no_grad()
def prefill(model: Any, tokens: int) -> float:
    ids = random_tokens(1, tokens)
    return milliseconds(lambda: model(ids, use_cache=True, logits_to_keep=1))


@torch.no_grad()
def decode(model: Any, batch: int, context: int) -> float:
    """Milliseconds a step of DECODE_STEPS."""
    cache = model(random_tokens(batch, context), use_cache=True, logits_to_keep=1).past_key_values
    token = random_tokens(batch, 1)

    def steps() -> None:
        for _ in range(DECODE_STEPS):
            model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return milliseconds(steps) / DECODE_STEPS


def generate(model: Any, batch: int, context: int, **how: Any) -> float:
    """Milliseconds a token of GENERATED, greedy, from a prompt of `context` tokens."""
    ids = random_tokens(batch, context)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": GENERATED, "do_sample": False, **how}
    return milliseconds(lambda: model.generate(ids, **settings)) / GENERATED


def batching(model: Any) -> float:
    """Milliseconds a new token of REQUESTS requests in continuous batching, greedy; by the clock, as it has threads."""
    prompts = [random_tokens(1, 64 + 8 * number)[0].tolist() for number in range(REQUESTS)]
    greedy = GenerationConfig(max_new_tokens=GENERATED, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=2048)
    start = time.perf_counter()
    outcomes = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=sizes)
    seconds = time.perf_counter() - start
    made = sum(len(outcome.generated_tokens) for outcome in outcomes.values())
    if made != REQUESTS * GENERATED:
        raise SystemExit(f"Continuous batching made {made} tokens, not {REQUESTS * GENERATED}.")
    return seconds * 1e3 / made


@contextmanager
def one_layer_for_all(model: Any) -> Iterator[None]:
    """Has torch.compile make kernels for one decoder layer and use them in all: they are tuned once, and alike."""
    layers = model.model.layers
    forward = torch.compiler.nested_compile_region(type(layers[0]).forward)
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def compiled_decoding(model: Any, context: int) -> Pass:
    """The pass of one sequence with a static cache; compiles at its first call."""
    forward = torch.compile(model.forward, fullgraph=True, options=COMPILE_OPTIONS)
    cache = StaticCache(config=model.config, max_cache_len=STATIC_CACHE)
    token = random_tokens(1, 1)

    @torch.no_grad()
    def run(model: Any) -> float:
        cache.reset()
        model(random_tokens(1, context), past_key_values=cache, use_cache=True, logits_to_keep=1)

        def steps() -> None:
            for _ in range(COMPILED_STEPS):
                forward(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return milliseconds(steps) / COMPILED_STEPS

    run(model)  # compiles, and records the graph
    return run


def training(model: Any, checkpointing: bool) -> float:
    ids = random_tokens(1, TRAINING_TOKENS)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        return milliseconds(lambda: model(ids, labels=ids, use_cache=False).loss.backward())
    finally:
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_disable()
        model.eval()


Row = tuple[str, str, Work, dict[str, Measurement]]
"""Backend, what was measured, its work, and the measurement of each model."""


@dataclass
class Bench:
    """Two models of one shape, and the choices of the command line."""

    family: str
    arguments: argparse.Namespace
    ceilings: Ceilings

    @property
    def shape(self) -> Shape:
        return chosen_shape(self.family, self.arguments)

    @cached_property
    def models(self) -> dict[str, Any]:
        models = {family: build(family, self.shape) for family in ("llama", self.family)}
        for model in models.values():
            never_end_early(model)
        return models

    def with_backend(self, backend: str) -> dict[str, Any]:
        for model in self.models.values():
            model.config._attn_implementation = backend
        return self.models

    def prefill(self) -> Iterator[Row]:
        for backend in self.arguments.backends:
            for tokens in self.arguments.lengths:
                if backend == "eager" and tokens > LONGEST_EAGER:
                    continue
                models = self.with_backend(backend)
                results = measure(models, partial(prefill, tokens=tokens), self.arguments.rounds)
                yield backend, f"{tokens} tokens", self.shape.prefill(tokens), results

    def decode(self) -> Iterator[Row]:
        context = self.arguments.context
        for backend in self.arguments.backends:
            for batch in self.arguments.batches:
                models = self.with_backend(backend)
                results = measure(models, partial(decode, batch=batch, context=context), self.arguments.rounds)
                work = self.shape.decode(batch, context + DECODE_STEPS // 2)
                yield backend, f"batch {batch}", work, results

    def generate(self) -> Iterator[Row]:
        context = self.arguments.context
        for backend in self.arguments.backends:
            for what in self.arguments.generate:
                how = GENERATE[what]
                for batch in self.arguments.batches if what == "dynamic cache" else [1]:
                    if what != "dynamic cache" and "flash" in backend:  # reads all slots of a static cache
                        continue
                    torch.compiler.reset()
                    models = self.with_backend(backend)
                    run = partial(generate, batch=batch, context=context, **how())
                    results = measure(models, run, self.arguments.rounds)
                    work = self.shape.decode(batch, context + GENERATED // 2)
                    first = " and ".join(f"{result.warm_up * GENERATED / 1e3:.1f}" for result in results.values())
                    yield backend, f"{what}, batch {batch} (first call {first} s)", work, results

    def batching(self) -> Iterator[Row]:
        for backend in self.arguments.backends:
            if backend == "eager":
                continue
            results = measure(self.with_backend(backend), batching, self.arguments.rounds)
            step = self.shape.decode(REQUESTS, 316 + GENERATED // 2)  # 316: the mean prompt
            work = Work(step.flops / REQUESTS, step.bytes / REQUESTS)
            yield f"paged, {backend}", f"{REQUESTS} requests", work, results

    def training(self) -> Iterator[Row]:
        for backend in self.arguments.backends:
            for checkpointing in (False, True):
                models = self.with_backend(backend)
                results = measure(models, partial(training, checkpointing=checkpointing), self.arguments.rounds)
                name = "checkpointing" if checkpointing else "no checkpointing"
                yield backend, name, self.shape.training(TRAINING_TOKENS, checkpointing), results

    def compiled(self) -> Iterator[Row]:
        context = self.arguments.context
        work = self.shape.decode(1, context + COMPILED_STEPS // 2)
        for backend in self.arguments.backends:
            if "flash" in backend:  # reads all slots of a static cache, filled or not
                continue
            results = {}
            for name, model in self.with_backend(backend).items():
                torch.compiler.reset()
                held = torch.cuda.memory_allocated() - parameter_bytes(model)
                with one_layer_for_all(model):
                    run = compiled_decoding(model, context)
                    results.update(measure({name: model}, run, self.arguments.rounds))
                results[name].peak = torch.cuda.max_memory_allocated() - held  # the cache and the graph included
                del run
                gc.collect()
            yield backend, "batch 1", work, results


def milliseconds_cell(time: float | None) -> str:
    return "out of memory" if time is None else f"{time:.2f}"


def table(rows: Iterator[Row], family: str, ceilings: Ceilings) -> None:
    """Prints rows as they come; memory in GiB."""
    name = NAMES[family]
    print(
        f"| backend | | Llama ms | {name} ms | speed | TFLOP | GB | floor ms | floor / time "
        f"| Llama GiB | {name} GiB | memory |"
    )
    print("| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |")
    for backend, what, work, results in rows:
        llama, own = results["llama"], results[family]
        floor = ceilings.floor(work)
        cells = [
            backend,
            what,
            milliseconds_cell(llama.time),
            milliseconds_cell(own.time),
            f"{llama.time / own.time:.2f} x" if llama.time and own.time else "",
            f"{work.flops / 1e12:.3g}",
            f"{work.bytes / 1e9:.3g}",
            f"{floor:.2f}",
            f"{floor / own.time:.0%}" if own.time else "",
            f"{llama.peak / GIB:.2f}",
            f"{own.peak / GIB:.2f}",
            f"{own.peak / llama.peak:.3f} x" if llama.time and own.time else "",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print()


def main() -> None:
    backends = ["eager", "sdpa", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]
    sections = ["generate", "batching", "prefill", "decode", "compiled", "training"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument("--backends", nargs="+", choices=backends, default=backends)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 8192, 32768], help="prompts, in tokens")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--generate", nargs="+", choices=GENERATE, default=list(GENERATE), help="rows of that section")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache before decoding")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer layers than the real shape, for a trial")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA GPU, and torch sees none.")

    transformers.logging.set_verbosity_error()
    ceilings = announced_ceilings(torch.cuda.get_device_name())
    for family in arguments.families:
        bench = Bench(family, arguments, ceilings)
        print(f"## {NAMES[family]} {bench.shape}\n")
        for section in arguments.sections:
            print(f"### {NAMES[family]}, {section}\n")
            table(getattr(bench, section)(), family, ceilings)
            torch.cuda.empty_cache()
        del bench
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
