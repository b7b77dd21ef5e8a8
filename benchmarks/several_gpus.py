"""How the models run on two GPUs: device_map="auto" and tp_plan="auto" beside one GPU.

    python benchmarks/several_gpus.py                                 # both families
    python benchmarks/several_gpus.py --families internlm2 --layers 4 # a trial

Needs two CUDA GPUs, torch, transformers and accelerate; FlashAttention is used where flash-attn is installed. It saves
a model of the 7B shape with random weights, and loads it in float16 in three processes, one after the other:

    one GPU       device_map={"": 0}
    device_map    device_map="auto", with a limit for each GPU that spreads the layers over both: one works at a time
    tp_plan       torchrun --nproc-per-node 2, tp_plan="auto", NCCL: every GPU holds half of every layer

Each gives the logits of a prompt and greedy tokens, which are compared with one GPU's, and times of prefilling, of
decoding with a dynamic cache, and of `generate()` with a static cache, which compiles the step (with sdpa; not with
device_map): as it does by itself, and unguarded, without looking before every step whether modules and parameters are
those that were compiled. Medians after a round that warms up. Steps of generate() are profiled once
(`step_profile.py`). The floor is one GPU's, from the bytes and operations counted in `model_speed.py`; two GPUs that
share every layer could reach half of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from model_speed import (
    DECODE_STEPS,
    GENERATE,
    GENERATED,
    GIB,
    NAMES,
    SHAPES,
    Ceilings,
    Shape,
    Work,
    announced_ceilings,
    build,
    chosen_shape,
    decode,
    generate,
    never_end_early,
    prefill,
    random_tokens,
)
from step_profile import StepProfile, profile_steps
from transformers import CompileConfig
from transformers.utils import is_flash_attn_2_available

from internlm2_model import InternLM2ForCausalLM
from internlm_model import InternLMForCausalLM

MODELS: dict[str, Any] = {"internlm": InternLMForCausalLM, "internlm2": InternLM2ForCausalLM}
WAYS = ("one GPU", "device_map", "tp_plan")
LENGTHS, BATCHES, CONTEXT = (2048, 8192), (1, 8, 32), 512
PROMPT, NEW_TOKENS = 256, 32
PASSES = ("prefill", "decode", "generate", "unguarded")
COMPILED: dict[str, Callable[[], dict[str, Any]]] = {
    "generate": GENERATE["static cache"],
    "unguarded generate": lambda: {"cache_implementation": "static", "compile_config": unguarded()},
}
"""With a static cache, what generate() is asked for."""


def unguarded() -> CompileConfig:
    """What generate() compiles with by itself, less the guards on modules.

    They take 2.7 ms of InternLM2's step with tp_plan on two H200s.
    """
    skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    options = {"triton.cudagraphs": True, "guard_filter_fn": skip}
    return CompileConfig(mode=None, options=options)  # type: ignore[arg-type] # torch takes no options beside a mode


def load(family: str, folder: str, way: str, backend: str) -> Any:
    arguments: dict[str, Any] = {"torch_dtype": torch.float16, "attn_implementation": backend}
    if way == "tp_plan":
        arguments["tp_plan"] = "auto"
    elif way == "device_map":
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        arguments.update(device_map="auto", max_memory={0: int(0.6 * size), 1: size})
    else:
        arguments["device_map"] = {"": 0}
    return MODELS[family].from_pretrained(folder, **arguments).eval()


def split_layers(model: Any) -> int:
    """Layers whose parameters lie on more than one device."""
    return sum(len({parameter.device for parameter in layer.parameters()}) > 1 for layer in model.model.layers)


def passes(shape: Shape) -> dict[str, tuple[Any, Work]]:
    """What is timed, and its work."""
    prefills = {f"prefill {n}": (partial(prefill, tokens=n), shape.prefill(n)) for n in LENGTHS}
    decodes = {
        f"decode, batch {n}": (partial(decode, batch=n, context=CONTEXT), shape.decode(n, CONTEXT + DECODE_STEPS // 2))
        for n in BATCHES
    }
    step = shape.decode(1, CONTEXT + GENERATED // 2)
    compiled = {name: (partial(generate, batch=1, context=CONTEXT, **how()), step) for name, how in COMPILED.items()}
    return {**prefills, **decodes, **compiled}


def chosen_passes(shape: Shape, arguments: argparse.Namespace) -> dict[str, tuple[Any, Work]]:
    return {name: timed for name, timed in passes(shape).items() if name.split()[0].strip(",") in arguments.passes}


def chosen_ways(arguments: argparse.Namespace) -> list[str]:
    """A graph is of one GPU: with device_map generate() compiles none."""
    return [way for way in WAYS if way != "device_map" or {"prefill", "decode"} & set(arguments.passes)]


def profiled(model: Any, how: dict[str, Any]) -> StepProfile:
    """A step of generate(), already compiled."""
    return profile_steps(model, random_tokens(1, CONTEXT), max_new_tokens=GENERATED, do_sample=False, **how)


def time_passes(
    model: Any, shape: Shape, arguments: argparse.Namespace
) -> tuple[dict[str, float | None], dict[str, dict[str, Any]]]:
    """Median milliseconds of each pass, None where this way has none, and the profiled steps of those that compile."""
    times: dict[str, float | None] = {}
    steps = {}
    for name, (run, _) in chosen_passes(shape, arguments).items():
        if name in COMPILED:
            if arguments.way == "device_map":
                times[name] = None
                continue
            torch.compiler.reset()
            model.config._attn_implementation = "sdpa"  # FlashAttention reads all slots of a static cache
        times[name] = statistics.median([run(model) for _ in range(arguments.rounds + 1)][1:])
        if name in COMPILED:
            steps[name] = asdict(profiled(model, COMPILED[name]()))
    return times, steps


def peaks_of_gpus(way: str) -> list[float]:
    """The peak of memory of every GPU, in GiB."""
    peaks = [torch.cuda.max_memory_allocated(device) / GIB for device in range(torch.cuda.device_count())]
    if way != "tp_plan":
        return peaks
    everybodys: list[list[float]] = [[] for _ in peaks]  # each process sees its own memory alone
    dist.all_gather_object(everybodys, peaks)
    return [peak[rank] for rank, peak in enumerate(everybodys)]


@torch.no_grad()
def work(arguments: argparse.Namespace, shape: Shape) -> None:
    """One way of running the model; process 0 writes what came out."""
    in_parallel = arguments.way == "tp_plan"
    if in_parallel:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    model = load(arguments.families[0], arguments.folder, arguments.way, arguments.backend)
    ids = random_tokens(1, PROMPT)
    logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    never_end_early(model)
    times, steps = time_passes(model, shape, arguments)
    peaks = peaks_of_gpus(arguments.way)
    if not in_parallel or dist.get_rank() == 0:
        placed = Counter(str(parameter.device) for parameter in model.parameters())
        said = {"times": times, "split": split_layers(model), "placed": placed, "peak": peaks, "steps": steps}
        (Path(arguments.out) / "said.json").write_text(json.dumps(said))
        torch.save((logits.float().cpu(), generated.cpu()), Path(arguments.out) / "tensors.pt")
    if in_parallel:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # an orderly end waits for ever: NCCL's communicator is held by the recorded graphs


Result = tuple[dict[str, Any], Any]
"""What a process says, and its logits and tokens."""


def run_way(way: str, family: str, folder: Path, arguments: argparse.Namespace) -> Result:
    """One way in processes of its own."""
    out = folder / way.replace(" ", "_")
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if way == "tp_plan" else []
    command = [sys.executable, *launcher, __file__, "--families", family, "--rounds", str(arguments.rounds)]
    command += ["--backend", arguments.backend, "--way", way, "--folder", str(folder / "model"), "--out", str(out)]
    command += ["--passes", *arguments.passes]
    if arguments.layers:
        command += ["--layers", str(arguments.layers)]
    subprocess.run(command, check=True)
    return json.loads((out / "said.json").read_text()), torch.load(out / "tensors.pt")


def compare(family: str, shape: Shape, arguments: argparse.Namespace, ceilings: Ceilings) -> None:
    """Prints the tables of a family."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        model = build(family, shape)
        model.save_pretrained(folder / "model")
        del model
        torch.cuda.empty_cache()
        results: dict[str, Result] = {}
        for way in chosen_ways(arguments):
            results[way] = run_way(way, family, folder, arguments)
            print(way, results[way][0]["times"], file=sys.stderr, flush=True)
    print(f"### {NAMES[family]}, {arguments.backend}, {shape}\n")
    print_agreement(results)
    floors = {name: ceilings.floor(amount) for name, (_, amount) in chosen_passes(shape, arguments).items()}
    print_times(results, floors)
    for name in COMPILED:
        profiles = {way: said["steps"][name] for way, (said, _) in results.items() if name in said["steps"]}
        if profiles:
            print(f"\nA step of {name}, static cache:")
            print_profiles(profiles)
    print(flush=True)


def print_agreement(results: dict[str, Result]) -> None:
    """Where each way's parameters lie, how far it is from one GPU, and its memory."""
    logits, generated = results["one GPU"][1]
    print("| way | parameters on | layers split | error of logits | same greedy tokens | peak GiB |")
    print("| --- | --- | --: | --: | --: | --- |")
    for way, (said, (found, tokens)) in results.items():
        error = ((found - logits).double().norm() / logits.double().norm()).item()
        placed = ", ".join(f"{device}: {count}" for device, count in said["placed"].items())
        same = int((tokens == generated)[:, PROMPT:].sum())
        peak = ", ".join(f"{value:.2f}" for value in said["peak"])
        print(f"| {way} | {placed} | {said['split']} | {error:.2e} | {same} of {NEW_TOKENS} | {peak} |")


def print_times(results: dict[str, Result], floors: dict[str, float]) -> None:
    """Milliseconds of each pass by its name, beside its floor on one GPU."""
    ways = list(results)
    print(
        "\n| ms | floor of one | " + " | ".join(ways) + " | tp_plan, speed |\n| --- " + "| --: " * (len(ways) + 2) + "|"
    )
    for name, floor in floors.items():
        times = [said["times"][name] for said, _ in results.values()]
        cells = " | ".join("" if time is None else f"{time:.2f}" for time in (floor, *times))
        print(f"| {name} | {cells} | {times[0] / times[-1]:.2f} x |")


def print_profiles(profiles: dict[str, dict[str, Any]]) -> None:
    """Steps by kind of kernel, and the kernels that take most."""
    print("\n| ms a step (kernels) | " + " | ".join(profiles) + " |\n| --- " + "| --: " * len(profiles) + "|")
    for name in ("wall", "busy"):
        print(f"| {name}, profiled | " + " | ".join(f"{profile[name]:.2f}" for profile in profiles.values()) + " |")
    for kind in dict.fromkeys(kind for profile in profiles.values() for kind in profile["times"]):
        cells = (f"{p['times'].get(kind, 0):.2f} ({p['counts'].get(kind, 0):.0f})" for p in profiles.values())
        print(f"| {kind} | " + " | ".join(cells) + " |")
    for way, profile in profiles.items():
        print(f"\n{way}:", *(f"  {time:.3f} ms {name[:110]}" for name, time in profile["longest"]), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer layers than the real shape, for a trial")
    parser.add_argument("--backend", default="flash_attention_2" if is_flash_attn_2_available() else "sdpa")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--folder", help="where the checkpoint is made: 16 GB")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # of a process that this program starts
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if torch.cuda.device_count() < 2:
        raise SystemExit(f"This benchmark needs two CUDA GPUs, and torch sees {torch.cuda.device_count()}.")
    transformers.logging.set_verbosity_error()
    if arguments.way:
        work(arguments, chosen_shape(arguments.families[0], arguments))
        return
    ceilings = announced_ceilings(f"2 x {torch.cuda.get_device_name()}")
    for family in arguments.families:
        compare(family, chosen_shape(family, arguments), arguments, ceilings)


if __name__ == "__main__":
    main()
