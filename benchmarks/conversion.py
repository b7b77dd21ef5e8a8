"""How fast the scripts convert and revert, beside `cp` of the same bytes and beside the plain way.

    python benchmarks/conversion.py --preset 1.8b --tp 2 --pp 2 --runs 5

Makes an InternEvo checkpoint of a real shape with random weights, then alternates, `--runs` times each:

    help       --help
    start-up   the script's interpreter and imports alone       cp        cp -r of the source folder
    convert    convert2hf, same type                            revert    back, to the sizes that the source has
    cast       convert2hf to another 16-bit type                plain     torch.load all, merge, save_pretrained-like

With `--wp` the checkpoint is one of isp, and reverting writes isp's files again.

Every command is followed by `sync`, and its time counts, so that nobody's bytes are still only in memory. Before each,
free memory is filled with cached pages, as on a machine that has run for a while, and the command's source is read.
Without that, memory that a virtual machine has given back to its host must be got again page by page, which can
triple the time of any command, `cp` included, and hits whichever runs a few seconds after a deletion. The floor is one
read and one write of the bytes; a run's ratio to `cp`, start-up included, says how close it comes. Medians are printed
with the range, and the peak of anonymous and of all resident memory of the command and its children, sampled from /proc
while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


@dataclass(frozen=True)
class Preset:
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


PRESETS = {
    "tiny": Preset("internlm2", 256, 2, 4, 2, 512, 92544),
    "1.8b": Preset("internlm2", 2048, 24, 16, 8, 8192, 92544),
    "7b": Preset("internlm2", 4096, 32, 32, 8, 14336, 92544),
    "20b": Preset("internlm2", 6144, 48, 48, 8, 16384, 92544),
    "internlm-1.8b": Preset("internlm", 2048, 24, 16, 16, 5632, 103168),
    "internlm-7b": Preset("internlm", 4096, 32, 32, 32, 11008, 103168),
}


def make_checkpoint(folder: Path, preset: Preset, tp: int, wp: int, pp: int, dtype_name: str) -> None:
    """Random weights of `preset` in the shards of a tp x pp grid, of isp where `wp` is not 0; a stage in memory."""
    import torch

    from weight_conversion.folders.grid import ISP_FILES, TENSOR_PARALLEL_FILES, grid_of
    from weight_conversion.folders.internevo_folder import MODEL_CONFIG
    from weight_conversion.folders.numbering import shared_out
    from weight_conversion.mapping.choices import HALVES, HIDDEN_SPLIT, common_choices
    from weight_conversion.mapping.families import FAMILIES
    from weight_conversion.mapping.matching import copies_of, part_shapes
    from weight_conversion.mapping.rules import ModelShape

    family = FAMILIES[preset.family]
    shape = ModelShape(preset.hidden, preset.intermediate, preset.vocab, preset.layers, preset.heads, preset.kv_heads)
    dtype = getattr(torch, dtype_name)
    grid = grid_of(ISP_FILES if wp else TENSOR_PARALLEL_FILES, tp, wp or 1, pp)
    numbering = shared_out(preset.layers, pp)
    common = common_choices(grid.names, HIDDEN_SPLIT, HALVES, joined=False, bias=preset.family == "internlm")
    entries = family.table.entries(family.layout_written(common, 2, common), shape)
    folder.mkdir(parents=True)
    for stage in range(pp):
        states: list[dict[str, torch.Tensor]] = [{} for _ in grid.members]
        for entry in (entry for entry in entries if numbering.place_of(entry.layer) == (0, stage)):
            name = numbering.saved_name(entry.training[0], (0, stage))
            (size,) = part_shapes(entry, grid, shape)
            for parts in zip(*copies_of(entry.rule, grid), strict=True):  # the ranks that hold the same part
                tensor = torch.randn(size).to(dtype)
                for rank in parts:
                    states[rank][name] = tensor
        for member, state in zip(grid.members, states, strict=True):
            torch.save(state, folder / grid.name(member, stage))
    torch.save(model_config(preset, dtype), folder / MODEL_CONFIG)
    (folder / "source.json").write_text(json.dumps({"preset": vars(preset), "tp": tp, "wp": wp, "pp": pp}))


def model_config(preset: Preset, dtype: Any) -> dict[str, Any]:
    """The settings that training saves beside shards of this shape, whose weights are of the torch `dtype`."""
    config = {
        "hidden_size": preset.hidden,
        "num_attention_heads": preset.heads,
        "num_layers": preset.layers,
        "vocab_size": preset.vocab,
        "layer_norm_epsilon": 1e-5,
        "dtype": dtype,
    }
    if preset.family == "internlm2":
        config |= {"num_kv_attention_heads": preset.kv_heads, "no_bias": True, "adapt_hf": True}
    return config


@dataclass
class Series:
    """Measurements of one command."""

    wall: list[float] = field(default_factory=list)
    user: list[float] = field(default_factory=list)
    system: list[float] = field(default_factory=list)
    anonymous: int = 0
    resident: int = 0


def settle(work: Path, source: Path) -> None:
    """Fills free memory with cached pages, then reads the source: twice, or the kernel gives up its pages first."""
    ballast = work / "ballast"
    with ballast.open("ab") as file:  # a hole: its pages take memory and no disk
        file.truncate(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in (ballast, *2 * sorted(source.iterdir())):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def measure(command: list[str], series: Series) -> None:
    """Runs a command and `sync`; adds its times and memory."""
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPOSITORY)
    sampler = threading.Thread(target=_sample_memory, args=(process, series))
    sampler.start()
    _, errors = process.communicate()
    sampler.join()
    os.sync()
    series.wall.append(time.perf_counter() - start)
    after = os.times()
    series.user.append(after.children_user - before.children_user)
    series.system.append(after.children_system - before.children_system)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")


def _sample_memory(process: subprocess.Popen[bytes], series: Series) -> None:
    """The peaks of a process and its children together; a page that they share is counted once."""
    while process.poll() is None:
        found = [_memory(pid) for pid in _family(process.pid)]
        series.anonymous = max(series.anonymous, sum(one.get("Pss_Anon", 0) for one in found))
        series.resident = max(series.resident, sum(one.get("Pss", 0) for one in found))
        time.sleep(0.005)


def _memory(pid: int) -> dict[str, int]:
    """What /proc says of the memory of a process, in kB; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}


def _family(pid: int) -> Iterator[int]:
    """A process and what it has started."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _family(int(child))


PLAIN = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
source, target, tp, pp, layers = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6])
target.mkdir()
merged = {}
for stage in range(pp):
    states = [torch.load(source / f"model_tp{r}_pp{stage}.pt", map_location="cpu") for r in range(tp)]
    for name in states[0]:
        tensors = [state[name] for state in states if name in state]
        if tensors[0].dim() == 1:
            merged[f"{stage}.{name}"] = tensors[0].clone()
        else:
            columns = "wo." in name or "w2." in name or "embedding" in name or "out_proj" in name
            merged[f"{stage}.{name}"] = torch.cat(tensors, 1 if columns else 0)
save_file(merged, target / "model.safetensors", metadata={"format": "pt"})
"""
"""The usual converter: everything in memory, merged, saved."""


class Command(NamedTuple):
    """What is timed, the folder that it reads, and the one that it writes."""

    words: list[str]
    reads: Path
    writes: Path


def commands_of(arguments: argparse.Namespace, source: Path, tokenizer: Path) -> dict[str, Command]:
    """Every command of a round, in its order."""
    python, preset, work = sys.executable, PRESETS[arguments.preset], arguments.folder
    hf, back, copy, plain, nothing = (work / name for name in (*OUTPUTS, "nothing"))
    other = "float16" if arguments.dtype == "bfloat16" else "bfloat16"

    def convert(dtype: str, *flags: str) -> Command:
        words = [python, f"convert2hf_{preset.family}.py", "--src", str(source), "--tgt", str(hf)]
        words += ["--tokenizer", str(tokenizer), *(["--format", "llama"] if arguments.llama else [])]
        return Command([*words, "--dtype", dtype, "--max_shard", arguments.max_shard, *flags], source, hf)

    def revert(*flags: str) -> Command:
        words = [python, f"revert_{preset.family}.py", "--src", str(hf), "--tgt", str(back)]
        words += ["--tp_size", str(arguments.tp), "--pp_size", str(arguments.pp)]
        words += ["--wp_size", str(arguments.wp)] if arguments.wp else []
        return Command([*words, "--embed_split", *flags], hf, back)

    commands = {
        "help": Command([python, f"convert2hf_{preset.family}.py", "--help"], source, nothing),
        "start-up": Command([python, "-c", IMPORTS], source, nothing),
        "cp": Command(["cp", "-r", str(source), str(copy)], source, copy),
        "cast": convert(other),
        "convert": convert(arguments.dtype),
        "revert": revert(),
        "convert --verify": convert(arguments.dtype, "--verify"),
        "revert --verify": revert("--verify"),
    }
    if arguments.plain:
        sizes = map(str, (arguments.tp, arguments.pp, preset.layers))
        commands["plain"] = Command([python, "-c", PLAIN, str(source), str(plain), *sizes], source, plain)
    return commands


IMPORTS = (
    "import weight_conversion.running.convert, weight_conversion.mapping.families, weight_conversion.running.reporting"
)
OUTPUTS = ("hf", "back", "copy", "plain")
STARTS = ("help", "start-up")
"""Commands that move no bytes."""


def chosen(commands: dict[str, Command], only: list[str] | None) -> dict[str, Command]:
    """Those that --only names, and those without which they cannot be; all without --only."""
    if not only:
        return commands
    names = {*STARTS, "cp", *only, *(["convert"] if "revert" in only else [])}
    names |= {name for name in commands if "verify" in only and name.endswith("--verify")}
    return {name: command for name, command in commands.items() if name in names}


def alternate(commands: dict[str, Command], runs: int, work: Path) -> dict[str, Series]:
    """Every command in turn, `runs` times; leaves nothing in `work` that was not there."""
    series = {name: Series() for name in commands}
    try:
        for _ in range(runs):
            for name, command in commands.items():
                shutil.rmtree(command.writes, ignore_errors=True)
                os.sync()
                settle(work, command.reads)
                measure(command.words, series[name])
                if name not in ("convert", "convert --verify", *STARTS):  # what was converted is reverted next
                    shutil.rmtree(command.writes)
    finally:
        for left in OUTPUTS:
            shutil.rmtree(work / left, ignore_errors=True)
        (work / "ballast").unlink(missing_ok=True)
    return series


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="1.8b", help="shape of the model; default: 1.8b")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size of the checkpoint; default: 2")
    parser.add_argument("--pp", type=int, default=2, help="its pipeline stages; default: 2")
    parser.add_argument("--wp", type=int, default=0, help="weight-parallel size of an isp checkpoint; default: not isp")
    parser.add_argument("--runs", type=int, choices=range(1, 100), metavar="N", default=5, help="default: 5")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="default: bfloat16")
    parser.add_argument("--max_shard", default="10GB", help="as for convert2hf; default: 10GB")
    parser.add_argument("--llama", action="store_true", help="convert with --format llama, without remote code")
    parser.add_argument(
        "--folder",
        type=Path,
        default=REPOSITORY / ".build" / "benchmark",
        help="where to work; the checkpoint stays there, and up to three times its size is needed. "
        "Default: .build/benchmark",
    )
    parser.add_argument(
        "--plain", action="store_true", help="also run the plain way (needs the model's size in memory)"
    )
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model; default: a small one trained for the run")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=["convert", "cast", "revert", "verify"],
        help="measure these alone, beside start-up and cp",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    preset, work = PRESETS[arguments.preset], arguments.folder
    isp = f"_wp{arguments.wp}" if arguments.wp else ""
    source = work / f"{arguments.preset}_tp{arguments.tp}{isp}_pp{arguments.pp}_{arguments.dtype}"
    if not (source / "source.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        make_checkpoint(source, preset, arguments.tp, arguments.wp, arguments.pp, arguments.dtype)
    tokenizer = arguments.tokenizer or _small_tokenizer(work)
    nbytes = sum(path.stat().st_size for path in source.glob("model_*_pp*.pt"))
    commands = chosen(commands_of(arguments, source, tokenizer), arguments.only)
    _print(arguments, nbytes, _pieces_in(tokenizer), alternate(commands, arguments.runs, work))


def _small_tokenizer(work: Path) -> Path:
    from tests.support.tokenizer_fixture import train_tokenizer

    return train_tokenizer(work / "tokenizer.model")


def _pieces_in(tokenizer: Path) -> int:
    from weight_conversion.tokenizer.tokenizer_files import Tokenizer

    return Tokenizer.read(tokenizer).vocab_size


def _print(arguments: argparse.Namespace, nbytes: int, pieces: int, series: dict[str, Series]) -> None:
    tokenizer = "that was named" if arguments.tokenizer else "trained for the run"
    print(
        f"{arguments.preset}, tp {arguments.tp}, wp {arguments.wp}, pp {arguments.pp}, {arguments.dtype}, ",
        f"{nbytes / 1e9:.2f} GB, max_shard {arguments.max_shard}, {'format llama, ' if arguments.llama else ''}",
        f"a tokenizer of {pieces} pieces {tokenizer}, ",
        f"{os.cpu_count()} cores, {arguments.runs} runs each, median (range)\n",
        sep="",
    )
    copying = statistics.median(series["cp"].wall)
    print("| run | wall s | user s | system s | GB/s | wall / cp | peak anonymous MB | peak resident MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, one in series.items():
        wall, user, system = map(statistics.median, (one.wall, one.user, one.system))
        ratio = "" if name in STARTS else f"{wall / copying:.2f}"
        rate = "" if name in STARTS else f"{nbytes / 1e9 / wall:.2f}"
        times = f"{wall:.2f} ({min(one.wall):.2f} - {max(one.wall):.2f}) | {user:.2f} | {system:.2f}"
        print(f"| {name} | {times} | {rate} | {ratio} | {one.anonymous / 1024:.0f} | {one.resident / 1024:.0f} |")


if __name__ == "__main__":
    main()
