"""The fault tests at full size: every moment, every byte of structure, thousands of layouts.

    python benchmarks/fault_campaign.py --layouts 2000 --cuts 2000 --payload 2000 --random 500

Runs what `make test` runs a few times of, with counts as arguments, and writes them with what happened to
benchmarks/fault_campaign.md. Ends with status 1 where a promise was broken; the first cases of each kind are printed.

    python benchmarks/fault_campaign.py --only layouts --layouts 1000

runs one part, and prints what happened.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import os
import platform
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.faults import fault_moments as moments  # noqa: E402
from tests.faults.fault_harness import quick_folder, train_quick_tokenizer  # noqa: E402
from tests.faults.fuzzing import (  # noqa: E402
    KINDS,
    SOURCES,
    Subject,
    check_layout,
    payload,
    random_layout,
    structure,
    with_cut,
    with_flip,
)
from tests.faults.hostile_pickles import EXHAUSTING, HOSTILE, hostile_surroundings, in_dict, write_archive  # noqa: E402
from weight_conversion.signals import ENDING  # noqa: E402

FAMILIES = ("internlm", "internlm2")
BROKEN = "BROKEN"
SHOWN = 3
PARTS = ("disturbances", "damage", "tokenizers", "layouts")


@dataclass
class Line:
    """One line of the results."""

    name: str
    verdicts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, description: str, check: Callable[[], Iterable[str]]) -> None:
        """Counts what a check says, or that it failed."""
        start = time.perf_counter()
        try:
            self.verdicts.update(check())
        except Exception:  # a broken promise shows as any kind of error
            self.verdicts[BROKEN] += 1
            if self.verdicts[BROKEN] <= SHOWN:
                print(f"{self.name}: {description}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        self.seconds += time.perf_counter() - start

    def row(self) -> str:
        said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(self.verdicts.items()))
        return f"| {self.name} | {self.verdicts.total()} | {said} | {self.seconds:.0f} |"


def layouts(count: int, random: Random, tokenizer: Path) -> Iterable[Line]:
    """Random layouts through convert, revert, convert."""
    line = Line("random layouts: convert, revert, convert, all with --verify")
    for _ in range(count):
        layout = random_layout(random)

        def check() -> list[str]:
            with quick_folder() as folder:
                check_layout(layout, folder, tokenizer)  # noqa: B023 - called before the next one is drawn
            return ["exact"]

        line.add(repr(layout), check)
    yield line


def damage(arguments: argparse.Namespace, random: Random, tokenizer: Path) -> Iterable[Line]:
    """Cut files and changed bytes, under --verify."""
    for kind, source in SOURCES.items():
        has_checksums = kind != "safetensors"
        with quick_folder() as folder:
            subjects = [Subject(folder / family, family, kind, tokenizer) for family in FAMILIES]
            yield cut_files(source.what, subjects, arguments.cuts, random)
            yield other_kinds(source.what, subjects)
            if has_checksums:
                yield pickles(source.what, subjects)
            for group, name in (
                ("weights", "of the weight files outside tensors"),
                ("settings", "of index and config"),
            ):
                every = f"one in {arguments.one_byte_in} bytes" if arguments.one_byte_in > 1 else "every byte"
                flips = Line(f"{source.what}: {every} {name} changed, {arguments.masks} ways")
                for subject in subjects:
                    for path in getattr(subject, group):
                        flip_structure(flips, subject, path, arguments, random)
                if flips.verdicts:
                    yield flips
            if has_checksums:
                yield flipped_tensors(source.what, subjects, arguments.payload, random)


def cut_files(what: str, subjects: list[Subject], count: int, random: Random) -> Line:
    line = Line(f"{what}: a file cut at a random length")
    for _ in range(count):
        subject = random.choice(subjects)
        path = random.choice(subject.weights + subject.settings)
        _try(line, subject, path, with_cut(path, length := random.randrange(path.stat().st_size)), f"{length}")
    return line


def other_kinds(what: str, subjects: list[Subject]) -> Line:
    """What is no file under the name of each one."""
    line = Line(f"{what}: {', '.join(KINDS)} for a file")
    for subject in subjects:
        for path in subject.weights + subject.settings:
            for other, make in KINDS.items():
                line.add(f"{path} {other}", lambda: [subject.check_replaced(path, make)])  # noqa: B023
    return line


def flip_structure(line: Line, subject: Subject, path: Path, arguments: argparse.Namespace, random: Random) -> None:
    """Changes bytes of a file that are not a tensor's, one at a time."""
    for position in structure(path)[:: arguments.one_byte_in]:
        for mask in random.sample(range(1, 256), arguments.masks):
            _try(line, subject, path, with_flip(path, position, mask), f"{position} {mask}")


def flipped_tensors(what: str, subjects: list[Subject], count: int, random: Random) -> Line:
    line = Line(f"{what}: a random byte of a tensor changed")
    for _ in range(count):
        subject = random.choice(subjects)
        path = random.choice([path for path in subject.weights if path.name != "model_config.pt"])
        position, mask = random.choice(payload(path)), random.randrange(1, 256)
        _try(line, subject, path, with_flip(path, position, mask), f"{position} {mask}")
    return line


def pickles(what: str, subjects: list[Subject]) -> Line:
    """Pickles that run code in an ordinary unpickler, and those that exhaust one, for each file of a source."""
    line = Line(f"{what}: a pickle that runs code, or never ends, for a file")
    for subject in subjects:
        for path in subject.weights:
            for name, make in {**HOSTILE, **EXHAUSTING}.items():
                with (
                    quick_folder() as folder,
                    hostile_surroundings(folder, on_import=name.startswith("import")) as mark,
                ):
                    for pickled in (make(mark), in_dict(make(mark))):
                        content = write_archive(folder / "archive", pickled).read_bytes()

                        def check() -> list[str]:
                            verdict = subject.check(path, content)  # noqa: B023 - called at once
                            assert not mark.exists()
                            return [verdict]

                        line.add(f"{path} {name}", check)
    return line


def tokenizers(count: int, random: Random, tokenizer: Path) -> Iterable[Line]:
    """Changed bytes of a tokenizer.model."""
    line = Line("tokenizer.model: a random byte changed")
    with quick_folder() as folder:
        subject = Subject(folder / "subject", "internlm2", "shards", tokenizer)
        for _ in range(count):
            position, mask = random.randrange(subject.tokenizer.stat().st_size), random.randrange(1, 256)
            content = with_flip(subject.tokenizer, position, mask)
            _try(line, subject, subject.tokenizer, content, f"{position} {mask}")
    yield line


def _try(line: Line, subject: Subject, path: Path, content: bytes, description: str) -> None:
    line.add(f"{path.name} {description}", lambda: [subject.check(path, content)])


def disturbances(arguments: argparse.Namespace, tokenizer: Path) -> Iterable[Line]:
    """Kills, signals and errors at every file operation, signals at random moments and while one never returns."""
    errors = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
    for direction in moments.COMMANDS:
        killed = Line(f"{direction}: SIGKILL before each file operation, with and without --force")
        failing = Line(f"{direction}: each file operation fails, {', '.join(errors)}, with and without --force")
        signalled = {
            number: Line(f"{direction}: {number.name} before each file operation, with and without --force")
            for number in ENDING
        }
        for family in FAMILIES:
            for force in (False, True):
                case = (direction, force)
                _at_moments(killed, family, tokenizer, moments.killed_before_operations, *case, arguments.one_in)
                for number, line in signalled.items():
                    _at_moments(
                        line, family, tokenizer, moments.signalled_before_operations, *case, number, arguments.one_in
                    )
                for error in errors.values():
                    _at_moments(
                        failing, family, tokenizer, moments.failing_at_operations, *case, error, arguments.one_in
                    )
        yield from (killed, *signalled.values(), failing)
        seed = arguments.seed
        for number in (signal.SIGKILL, *ENDING):
            line = Line(f"{direction}: {number.name} at a random moment")
            when = (direction, number, arguments.random, seed)
            _at_moments(line, "internlm2", tokenizer, moments.signalled_at_random, *when)
            yield line
        for number in ENDING:
            line = Line(f"{direction}: {number.name} while a random file operation never returns")
            when = (direction, number, arguments.hanging, seed)
            _at_moments(line, "internlm2", tokenizer, moments.signalled_while_hanging, *when)
            yield line


def _at_moments(line: Line, family: str, tokenizer: Path, disturb: Callable[..., Iterable[str]], *case: object) -> None:
    with quick_folder() as folder:
        place = moments.make_place(folder / "work", family, tokenizer)
        line.add(f"{family} {case}", lambda: disturb(place, *case))


def report(lines: list[Line], arguments: argparse.Namespace) -> str:
    import safetensors
    import torch

    disturbed = "each file operation" if arguments.one_in == 1 else f"one in {arguments.one_in} file operations"
    left_out = ("output", "only")
    words = " ".join(f"--{name} {value}" for name, value in vars(arguments).items() if name not in left_out)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, safetensors {safetensors.__version__}"
    broken = sum(line.verdicts[BROKEN] for line in lines)
    return "\n".join(
        [
            "# Results of the fault campaign",
            "",
            f"    python benchmarks/fault_campaign.py {words}",
            "",
            f"{datetime.date.today().isoformat()}, {versions}, Linux {platform.release()}, {os.cpu_count()} cores. "
            f"{sum(line.verdicts.total() for line in lines)} cases, {broken} promises broken.",
            "",
            "| what | tried | what happened | seconds |",
            "|---|---|---|---|",
            *(line.row().replace("each file operation", disturbed) for line in lines),
            "",
            "- refused: exit status 1, one sentence, nothing written and nothing left beside the target",
            "- exact: everything written is as without the damage, to the byte (the change was in padding, in fields "
            "that nobody reads, or cut off a last line break)",
            "- setting: all weights are exact; a value in config.json that nothing else confirms was changed (epsilon, "
            "rotary base, the number of InternLM's heads, ...), and model_config.pt has it as changed",
            "- pieces: all but the tokenizer is exact; a changed tokenizer.model that still is a SentencePiece model "
            "is copied as it is",
            "- as before, complete: how the target was left; afterwards the next run completed and left nothing else",
            "",
            "What cannot be told: a changed byte of a tensor in a safetensors file, which has no checksum; the "
            "settings and pieces above.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layouts", type=int, default=2000, help="random layouts")
    add("--cuts", type=int, default=2000, help="cut files, for each kind of source")
    add("--masks", type=int, default=1, help="ways to change each byte of structure")
    add("--one_byte_in", type=int, default=1, help="change one in so many bytes of structure")
    add("--payload", type=int, default=2000, help="changed bytes of tensors, for each kind of source with checksums")
    add("--tokenizers", type=int, default=1000, help="changed bytes of a tokenizer.model")
    add("--one_in", type=int, default=1, help="disturb one in so many file operations")
    add("--random", type=int, default=500, help="signals at random moments, for each direction and signal")
    add("--hanging", type=int, default=50, help="operations that never return, for each direction and signal")
    add("--seed", type=int, default=0)
    add("--only", choices=PARTS, help="one part, written to no page")
    add("--output", type=Path, default=REPOSITORY / "benchmarks" / "fault_campaign.md")
    arguments = parser.parse_args()
    lines: list[Line] = []
    with quick_folder() as folder:
        tokenizer, random = train_quick_tokenizer(folder / "tokenizer.model"), Random(arguments.seed)
        parts = (
            disturbances(arguments, tokenizer),
            damage(arguments, random, tokenizer),
            tokenizers(arguments.tokenizers, random, tokenizer),
            layouts(arguments.layouts, random, tokenizer),
        )
        for name, part in zip(PARTS, parts, strict=True):
            for line in part if arguments.only in (None, name) else ():
                lines.append(line)
                print(line.row(), flush=True)
    if arguments.only is None:
        arguments.output.write_text(report(lines, arguments), encoding="utf-8")
    return 1 if any(line.verdicts[BROKEN] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
