"""Try both families on every transformers version of environments.py, and tell the result as Markdown tables.

    make compat       # all versions; writes tests/versions/compatibility.md and the table in both docs/versions pages
    make compat-ci    # the oldest and the newest; writes nothing
    make newest       # what the package index has today, unpinned, release candidates too; writes nothing

Each version runs in its own environment, in processes of its own: first the checks of checks.py on folders like
published ones, then what the conversion scripts write is saved by every version and loaded by every version.

Exit status 1 if anything fails that LIMITS does not list, or if something listed there works. The tracebacks are in
.build/compatibility/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import folders
import torch
from environments import NEWEST, PINS, environment_variables, make_newest, newest_versions
from layout import CONTINUOUS_BATCHING, MODELS, TOKENIZER, TOKENIZERS
from page_table import table_in_chinese, with_table

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
REPORT = HERE / "compatibility.md"
PAGES = (REPOSITORY / "docs" / "versions.md", REPOSITORY / "docs" / "versions-zh-Hans.md")
LOGS = REPOSITORY / ".build" / "compatibility"
FAMILIES = {"internlm": "InternLM", "internlm2": "InternLM2"}
CONVERTER = "converter"
PROCESSES = 2

FEATURES = "Features"
EXPLANATIONS = {
    FEATURES: "On folders like published ones (config.json of transformers 4, remote code), loaded with the Auto "
    "classes. Golden numbers are what the published model code computes.",
    MODELS: "The converter's folders (rotary base 1e6, without scaling and with dynamic NTK), saved by each version "
    "and loaded by each: config.json says what it said, the rotary setting is the same, and logits beyond the trained "
    "length are equal but for rounding. The converter's own also generate: one prompt and a padded batch, dynamic and "
    "static cache and beams, eager and sdpa, give the tokens of use_cache=False.",
    TOKENIZERS: "The tokenizers in the same folders: the ids of SentencePiece, and decoding gives the text back.",
}

GENERIC_TOKENIZER = (
    "transformers 5.3 to 5.11 put a generic tokenizer of their own in the place of InternLM2's, also with "
    "trust_remote_code=True. It gives the same ids, from tokenizer.json, but saves that file alone, while its "
    "tokenizer_config.json still names the files it left out. Copy tokenizer.model and tokenization_internlm2*.py "
    "from the original folder, or load what was saved with PreTrainedTokenizerFast."
)
UNSIZED_PAGES = (
    "The paged cache of transformers before 5.4 takes all the memory that there is, and its settings cannot say "
    "otherwise, so it was not tried. Use generate there."
)
GENERIC_TOKENIZER_VERSIONS = ("5.4.0", "5.8.0")


@dataclass(frozen=True, order=True)
class Cell:
    """A result's place: the table, its row and column, and the family."""

    table: str
    row: str
    column: str
    family: str


LIMITS: Mapping[Cell, str] = {
    Cell(TOKENIZERS, saved, loaded, "internlm2"): GENERIC_TOKENIZER
    for saved in GENERIC_TOKENIZER_VERSIONS
    for loaded in PINS
    if loaded not in GENERIC_TOKENIZER_VERSIONS
} | {
    Cell(FEATURES, CONTINUOUS_BATCHING, version, family): UNSIZED_PAGES
    for version in ("4.57.6", "5.0.0")
    for family in FAMILIES
}
"""What cannot be right, and why."""


@dataclass(frozen=True)
class Table:
    """Errors by place, "" where there is none; rows and columns in the order they came in."""

    title: str
    corner: str
    columns: Sequence[str]
    errors: dict[Cell, str] = field(default_factory=dict)

    def add(self, row: str, column: str, family: str, error: str) -> None:
        self.errors[Cell(self.title, row, column, family)] = error

    def markdown(self, reasons: Sequence[str]) -> str:
        """The table; a "no" that cannot be helped has the number of its reason."""
        lines = [f"| {self.corner} | {' | '.join(self.columns)} |", f"| --- |{' :---: |' * len(self.columns)}"]
        for row in dict.fromkeys(cell.row for cell in self.errors):
            lines.append(f"| {row} | {' | '.join(self._text(row, column, reasons) for column in self.columns)} |")
        return "\n".join(lines)

    def _text(self, row: str, column: str, reasons: Sequence[str]) -> str:
        wrong = []
        for family, name in FAMILIES.items():
            cell = Cell(self.title, row, column, family)
            if self.errors[cell]:
                wrong.append(f"{name} no{f' [{reasons.index(LIMITS[cell]) + 1}]' if cell in LIMITS else ''}")
        return ", ".join(wrong) or "yes"

    def failures(self) -> Iterator[str]:
        """What was not to be expected, a sentence each."""
        for cell, error in self.errors.items():
            where = f"{self.title}, {cell.row}, transformers {cell.column}, {FAMILIES[cell.family]}"
            if error and cell not in LIMITS:
                yield f"{where}: {error}"
            if not error and cell in LIMITS:
                yield f"{where}: works, though LIMITS says that it cannot. Remove it there."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("versions", nargs="*", default=list(PINS), help=f"of {', '.join(PINS)} (default: all)")
    parser.add_argument("--newest", action="store_true", help="what the package index has today instead")
    arguments = parser.parse_args()
    versions: list[str] = list(newest()) if arguments.newest else arguments.versions
    with tempfile.TemporaryDirectory() as scratch:
        tables = run(versions, Path(scratch))
    report = render(tables)
    print(report)
    if versions == list(PINS):
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(report, encoding="utf-8")
        in_pages = "\n\n".join([tables[0].markdown(reasons := reasons_of(tables[:1])), *notes(reasons)])
        for page, table in zip(PAGES, (in_pages, table_in_chinese(in_pages)), strict=True):
            page.write_text(with_table(page.read_text(encoding="utf-8"), table), encoding="utf-8")
    failures = [failure for table in tables for failure in table.failures()]
    print(*(f"FAILED {failure}" for failure in failures), sep="\n", file=sys.stderr)
    return 1 if failures else 0


def newest() -> Iterator[str]:
    """Make the environments without pins, say what is in them, and yield their names."""
    tried: list[dict[str, str]] = []
    for name in NEWEST:
        found = newest_versions(make_newest(name))
        if found in tried:
            print(f"{name}: nothing newer than {' '.join(found.values())}")
            continue
        tried.append(found)
        print(f"{name}: {', '.join(f'{package} {version}' for package, version in sorted(found.items()))}", flush=True)
        yield name


def run(versions: Sequence[str], scratch: Path) -> list[Table]:
    """The three tables, from folders made under `scratch`."""
    golden, converted, saved = (scratch / name for name in ("golden", "converted", "saved"))
    for folder in (golden, converted, saved):
        folder.mkdir()
    LOGS.mkdir(parents=True, exist_ok=True)
    folders.write_golden(golden)
    folders.write_converted(converted)
    for kept in (*converted.glob("*_by_converter"), converted / TOKENIZER):
        (saved / kept.name).symlink_to(kept)
    environments = {version: _environment(version, scratch) for version in versions}

    def each(*arguments: str | Path) -> dict[str, dict[str, dict[str, str]]]:
        with ThreadPoolExecutor(PROCESSES) as pool:
            results = pool.map(lambda version: _check(version, environments[version], *arguments), versions)
            return dict(zip(versions, results, strict=True))

    features = _feature_table(each("features", golden))
    saving = each("save", converted, saved)
    return [features, *_cross_tables(saving, each("load", saved))]


def _environment(version: str, scratch: Path) -> dict[str, str]:
    variables = environment_variables(version)
    path = os.pathsep.join((variables["PYTHONPATH"], str(REPOSITORY)))
    modules = scratch / f"modules_{version}"  # remote code is copied here, apart from the user's
    return variables | {"PYTHONPATH": path, "HF_MODULES_CACHE": str(modules), "OMP_NUM_THREADS": "1"}


def _check(version: str, environment: dict[str, str], *arguments: str | Path) -> dict[str, dict[str, str]]:
    """What checks.py found with these arguments; RuntimeError if it broke off or ran on another version."""
    log, results = (LOGS / f"{version}-{arguments[0]}.{suffix}" for suffix in ("log", "json"))
    results.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "checks.py"), *map(str, arguments), str(results)]
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(command, env=environment, stdout=stream, stderr=stream).returncode
    if status:
        raise RuntimeError(f"checks.py {arguments[0]} broke off on transformers {version}; see {log}.")
    found = json.loads(results.read_text(encoding="utf-8"))
    if found.pop("transformers") != version and version not in NEWEST:
        raise RuntimeError(f"The environment of transformers {version} has another version; remove .compat/{version}.")
    return found


def _feature_table(found: Mapping[str, dict[str, dict[str, str]]]) -> Table:
    table = Table(FEATURES, "on a folder as published", list(found))
    for version, checks in found.items():
        for title, errors in checks.items():
            for family, error in errors.items():
                table.add(title, version, family, error)
    return table


def _cross_tables(
    saving: Mapping[str, dict[str, dict[str, str]]], loading: Mapping[str, dict[str, dict[str, str]]]
) -> list[Table]:
    """Models and tokenizers: a row for each version that saved them, a column for each that loaded them."""
    tables = [Table(title, "saved by \\ loaded by", list(loading)) for title in (MODELS, TOKENIZERS)]
    for table in tables:
        for saver in (CONVERTER, *saving):
            for loader in loading:
                for family in FAMILIES:
                    saved = _errors_of(saving.get(saver, {}).get(table.title, {}), family, saver)
                    loaded = _errors_of(loading[loader][table.title], family, saver)
                    table.add(saver, loader, family, "; ".join(saved + loaded))
    return tables


def _errors_of(errors: Mapping[str, str], family: str, saver: str) -> list[str]:
    """What went wrong with the folders of a family that `saver` saved."""
    ending = f"_by_{saver.replace('.', '_')}"
    return [
        error for name, error in errors.items() if error and name.startswith(f"{family}_") and name.endswith(ending)
    ]


def render(tables: Sequence[Table]) -> str:
    """The report: every table with what its cells mean, and the reason behind each "no" that cannot be helped."""
    parts = ["# Compatibility with transformers", f"Made by `make compat`, with torch {torch.__version__}."]
    reasons = reasons_of(tables)
    for table in tables:
        right = sum(not error for error in table.errors.values())
        parts.append(f"## {table.title}")
        parts.append(
            f"{EXPLANATIONS[table.title]} {right} of {len(table.errors)} tries with the two families are right."
        )
        parts.append(table.markdown(reasons))
    return "\n\n".join([*parts, *notes(reasons)]) + "\n"


def reasons_of(tables: Sequence[Table]) -> list[str]:
    """What stands behind each "no" of the tables that cannot be helped, in their order."""
    return list(dict.fromkeys(LIMITS[cell] for table in tables for cell in table.errors if cell in LIMITS))


def notes(reasons: Sequence[str]) -> list[str]:
    return [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]


if __name__ == "__main__":
    sys.exit(main())
