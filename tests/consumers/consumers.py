"""Try converted folders in other tools, each in an environment of its own, and tell what came out.

    make consumers                          # all tools; writes tests/consumers/consumers.md
    make consumers TOOLS="vllm llama-cpp"   # some of them; the others keep their rows

Exit status 1 if something is wrong that tools.toml does not list under limits, or right that it lists. What the tools
printed is in .build/consumers/.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.consumers.compare import Result, compare
from tests.consumers.environments import Tool, Way, make, tools
from tests.consumers.folders import CASES, FAMILIES, FORMATS, KINDS, REPOSITORY, Case, convert
from tests.consumers.ours import answers, questions
from weight_conversion import __version__

REPORT = Path(__file__).with_name("consumers.md")
RECORD = REPORT.with_suffix(".json")
SCRATCH = REPOSITORY / ".build" / "consumers"
HERE = Path(__file__).resolve().parent
PATIENCE = 900  # seconds for one folder

INTRODUCTION = """# Converted folders in other tools

Made by `make consumers` on a CPU: small models of random weights in float32, converted by the scripts, loaded by each
tool in an environment of its own, and compared with this project's model and tokenizer. A cell says what was compared:
differences of logits, log-probabilities, embeddings or losses relative to their size (right below 5e-5), greedy tokens
(16 of each of three prompts, asked for at once), texts encoded to the same ids, the prompt of a conversation, the text
of an answer (completion), and the ids that end an answer. Quantized models are compared with this project's model that
has the weights which the quantized ones stand for. "no" has the number of its reason below the table.

Kinds of folders: plain (rotary embedding as trained, no biases, the published tokenizer), biases, dynamic (dynamic NTK
scaling, prompts beyond max_position_embeddings), chat (`--chat`, the published tokenizer).
"""


def main() -> int:
    known = tools()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("tools", nargs="*", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--way", help="this way only; what is known of the others stays")
    parser.add_argument("--folder", help="this folder only, such as internlm2-remote-plain; likewise")
    parser.add_argument("--folders", type=Path, help="make the folders here if they are absent, and keep them")
    arguments = parser.parse_args()
    chosen = arguments.tools or list(known)
    for name in chosen:
        if name not in known:
            parser.error(f"there is no tool {name!r}; the tools are {', '.join(known)}")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    failures = []
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="folders-") as scratch:
        folders = (arguments.folders or Path(scratch)).resolve()
        convert(folders, [case for case in CASES if not (folders / case.name).exists()])
        expected = functools.cache(lambda family, kind: answers(folders / Case(family, FORMATS[0], kind).name))
        for tool in (known[name] for name in chosen):
            if not tool.read:
                tried = _try(tool, folders, expected, _record().get(tool.name, {}), arguments)
                failures += _failures(tool, tried["cells"])
                record = {**_record(), tool.name: tried}
                RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    REPORT.write_text(render(known, _record()), encoding="utf-8")
    print(REPORT.read_text(encoding="utf-8"))
    print(*(f"FAILED {failure}" for failure in failures), sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _record() -> dict[str, Any]:
    """What is known of every tool, from this run and earlier ones."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}


def _try(
    tool: Tool,
    folders: Path,
    expected: Callable[[str, str], dict[str, Any]],
    before: Mapping[str, Any],
    only: argparse.Namespace,
) -> dict[str, Any]:
    """What came of every folder in every way, by the names of way and folder, and the versions that ran."""
    made = make(tool)
    partly = bool(only.way or only.folder)
    start, cells = time.monotonic(), dict(before.get("cells", {})) if partly else {}
    asked = [
        (way, case)
        for way in tool.ways
        for case in way.cases()
        if only.way in (None, way.name) and only.folder in (None, case.name)
    ]
    for (way, case), found in _ask_all(tool, asked, folders):
        result = compare(found, expected(case.family, case.kind))
        cells[f"{way.name} | {case.name}"] = result.as_json()
        print(f"{tool.title}, {way.name}, {case}: {result.wrong or 'right'} {result.agreed}", flush=True)
    return made | {
        "tried_minutes": round((time.monotonic() - start) / 60 + (before.get("tried_minutes", 0) if partly else 0), 1),
        "ours": f"version {__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
        "cells": cells,
    }


def _ask_all(tool: Tool, asked: list[tuple[Way, Case]], folders: Path) -> Iterator[tuple[tuple[Way, Case], Any]]:
    """The answers about each of these folders, {"error": ...} where the tool ends without any."""
    batches = [list(batch) for _, batch in groupby(asked, lambda pair: pair[0].environment)]
    for batch in batches if tool.together else [[pair] for pair in asked]:
        yield from zip(batch, _ask(tool, batch, folders), strict=True)


def _ask(tool: Tool, batch: list[tuple[Way, Case]], folders: Path) -> list[dict[str, Any]]:
    """The answers of one process."""
    stems = [re.sub(r"[^\w-]+", "-", f"{tool.name} {way.name} {case.name}") for way, case in batch]
    log = SCRATCH / f"{stems[0]}.log"
    files = [(SCRATCH / f"{stem}.questions", SCRATCH / f"{stem}.answers") for stem in stems]
    for (way, case), (questioned, target) in zip(batch, files, strict=True):
        questioned.write_text(json.dumps(questions(folders / case.name, way.name).__dict__), encoding="utf-8")
        target.unlink(missing_ok=True)
    command = [tool.python, HERE / "protocol.py", HERE / "tools" / tool.program, *chain.from_iterable(files)]
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
        **batch[0][0].environment,
        "HF_MODULES_CACHE": str(SCRATCH / "modules"),
    }
    patience = PATIENCE * len(batch)
    with log.open("w", encoding="utf-8") as stream:
        try:
            status = subprocess.run(
                [*map(str, command)], env=variables, stdout=stream, stderr=stream, timeout=patience, cwd=SCRATCH
            ).returncode
            missing = f"ended with status {status}; see {log.name}"
        except subprocess.TimeoutExpired:
            missing = f"no answer in {patience} seconds; see {log.name}"
    return [_answers(target) if target.is_file() else {"error": missing} for _, target in files]


def _answers(target: Path) -> dict[str, Any]:
    with np.load(target.with_suffix(".npz")) as arrays:
        return {**{name: arrays[name] for name in arrays.files}, **json.loads(target.read_text(encoding="utf-8"))}


def _failures(tool: Tool, cells: Mapping[str, Any]) -> list[str]:
    """What was not to be expected, a sentence each."""
    failures = []
    for way in tool.ways:
        for case in way.cases():
            if f"{way.name} | {case.name}" not in cells:
                continue  # not run yet
            wrong, why = cells[f"{way.name} | {case.name}"]["wrong"], tool.why(way.name, case)
            if wrong and not why:
                failures.append(f"{tool.title}, {way.name}, {case}: {wrong}")
            if why and not wrong:
                failures.append(f"{tool.title}, {way.name}, {case}: right, though tools.toml has a limit. Remove it.")
    return failures


def render(known: Mapping[str, Tool], record: Mapping[str, Any]) -> str:
    """The report: a table for each tool, and the reasons of each "no"."""
    parts = [INTRODUCTION]
    for tool in known.values():
        parts.append(f"## {tool.title}\n")
        if tool.read:
            parts.append(f"Read, not run: {tool.read}\n")
        elif tool.name in record:
            parts.append(_section(tool, record[tool.name]))
        else:
            parts.append(f"Not run yet: `make consumers TOOLS={tool.name}`.\n")
    return "\n".join(parts)


def _section(tool: Tool, tried: Mapping[str, Any]) -> str:
    versions = [*tool.requirements, *tool.then]
    if tried.get("transformers") and not any(pin.startswith("transformers") for pin in versions):
        versions.append(f"which brought transformers=={tried['transformers']}")
    lines = [
        *([f"{tool.note}\n"] if tool.note else []),
        f"{', '.join(versions)}; ours: {tried['ours']}. Tried on {tried['date']}. Environment: "
        f"{tried['megabytes'] / 1000:.1f} GB, {tried['minutes']} minutes to make; {tried['tried_minutes']} minutes to "
        "try.\n",
        f"| loaded | folder | {' | '.join(KINDS)} |",
        f"| --- | --- |{' --- |' * len(KINDS)}",
    ]
    reasons: list[str] = []
    for way in tool.ways:
        for family, title in FAMILIES.items():
            for format in FORMATS:
                cases = {case.kind: case for case in way.cases() if (case.family, case.format) == (family, format)}
                if cases:
                    cells = [_cell(tool, way, cases.get(kind), tried, reasons) for kind in KINDS]
                    lines.append(f"| {way.name} | {title}, {format} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"[{number}] {reason}\n" for number, reason in enumerate(reasons, 1))])


def _cell(tool: Tool, way: Way, case: Case | None, tried: Mapping[str, Any], reasons: list[str]) -> str:
    if case is None:
        return ""
    cell = tried["cells"].get(f"{way.name} | {case.name}")
    if cell is None:
        return "not run"
    result = Result(**cell)
    if not result.wrong:
        return ", ".join(f"{WORDS.get(name, name)} {text}" for name, text in result.agreed.items())
    why = tool.why(way.name, case) or result.wrong
    if why not in reasons:
        reasons.append(why)
    return f"no [{reasons.index(why) + 1}]"


WORDS = {
    "scores": "log-probabilities",
    "likelihood": "log-likelihood",
    "assistant_loss": "loss of the answer",
    "dequantized": "logits of the dequantized weights",
    "ends": "end",
    "tokens": "texts",
    "chat": "prompt",
}

if __name__ == "__main__":
    sys.exit(main())
