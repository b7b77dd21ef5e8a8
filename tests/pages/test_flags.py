"""The tables of flags on the first pages say what `--help` of the scripts says; wrong flags are answered."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.pages.pages import README, README_CHINESE, REPOSITORY, SCRIPTS, code, rows, section
from tests.pages.test_blocks_run import run_script
from weight_conversion import command_line


@dataclass(frozen=True)
class Flag:
    name: str
    required: bool
    default: str | None
    choices: tuple[str, ...]


def flags_of_help(script: str) -> list[Flag]:
    """The flags as `script --help` tells them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "1000")
        status, text = run_script([str(REPOSITORY / script), "--help"])
    assert status == 0
    usage, _, options = text.partition("options:")
    flags = []
    entries = re.sub(r"\n {8,}", "  ", options.partition("example:")[0])  # explanations on a line of their own
    for line in entries.splitlines():
        found = re.match(r"  (--\w+)(?: \{([^}]+)\}| \w+)?  +(.+)", line)
        if found:
            name, choices, explanation = found.groups()
            required = re.search(rf"\[{name}\b", usage) is None
            default = re.search(r"\(default: (.+)\)$", explanation)
            stated = None if required or not default or default[1] == "None" else default[1]
            flags.append(Flag(name, required, stated, tuple(choices.split(",")) if choices else ()))
    return flags


def flags_of_page(page: Path, script: str) -> list[Flag]:
    """The flags as the text under the script's heading tells them: a table of its own, or what differs from another's.

    "The flags of [other.py](#otherpy) but `--this`" takes the other's; a table after it has those with other values.
    """
    text = section(page, script)
    own = [flag_of_row(row, page) for row in rows(text)]
    other = re.search(r"\[(\w+\.py)\]\(#", text.partition("|")[0])
    if not other:
        return own
    left_out = [word for word in code(text.partition("|")[0]) if word.startswith("--")]
    assert left_out, f"{page.name}: {script} has a table of its own then"
    changed = {flag.name: flag for flag in own}
    kept = [flag for flag in flags_of_page(page, other[1]) if flag.name not in left_out]
    assert changed.keys() <= {flag.name for flag in kept}
    assert not [flag for flag in own if flag in kept], f"{page.name}: a row of {script} changes nothing"
    return [changed.get(flag.name, flag) for flag in kept]


def flag_of_row(row: list[str], page: Path) -> Flag:
    name, default, choices, meaning = row
    assert meaning, f"{page.name}: {name} is not explained"
    value = {"required": None, "必填": None, "none": None, "无": None, "off": "False", "关": "False"}
    stated = value[default] if default in value else code(default)[0]
    return Flag(code(name)[0], default in ("required", "必填"), stated, tuple(code(choices)))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("page", [README, README_CHINESE], ids=lambda page: page.name)
def test_the_pages_flags_are_those_of_help(page: Path, script: str) -> None:
    assert flags_of_page(page, script) == flags_of_help(script)


def example(script: str) -> str:
    _, text = run_script([str(REPOSITORY / script), "--help"])
    return text.partition("example:\n")[2].strip()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_example_of_help_parses(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def keep(family: str, arguments: Any) -> int:
        given.append(arguments)
        return 0

    monkeypatch.setattr(command_line, "run_convert", keep)
    monkeypatch.setattr(command_line, "run_revert", keep)
    python, name, *words = shlex.split(example(script))
    assert (python, name) == ("python", script)
    assert run_script([str(REPOSITORY / script), *words])[0] == 0
    assert len(given) == 1


SOME = {"convert2hf": "--src a --tgt b --tokenizer c", "revert": "--src a --tgt b --tp_size 2"}
WRONG = [
    ("convert2hf", "--src a --tgt b", "the following arguments are required: --tokenizer"),
    ("convert2hf", "{} --shards 2", "unrecognized arguments: --shards 2"),
    ("convert2hf", "{} --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ("convert2hf", "{} --max_pos 0", "argument --max_pos: '0' is not a whole number of at least 1"),
    ("convert2hf", "{} --rotary_type linear", "argument --rotary_type: invalid choice: 'linear'"),
    ("convert2hf", "{} --scaling_factor 0.5", "argument --scaling_factor: '0.5' is not a number of at least 1.0"),
    ("convert2hf", "{} --rotary dynamic", "unrecognized arguments: --rotary dynamic"),
    ("revert", "{} --isp 2025", "argument --isp says nothing without --wp_size: give that too, or leave it out"),
    ("revert", "--tgt b --tp_size 2", "the following arguments are required: --src"),
    ("revert", "{} --dtype float16", "unrecognized arguments: --dtype float16"),
    ("revert", "--src a --tgt b --tp_size two", "argument --tp_size: 'two' is not a whole number of at least 1"),
]


@pytest.mark.parametrize(("kind", "words", "message"), WRONG)
@pytest.mark.parametrize("family", ["internlm", "internlm2"])
def test_a_wrong_flag_is_answered_with_what_is_wrong_and_an_example(
    kind: str, words: str, message: str, family: str
) -> None:
    script = f"{kind}_{family}.py"
    status, printed = run_script([str(REPOSITORY / script), *words.format(SOME[kind]).split()])
    assert status == 2
    assert printed.startswith(f"usage: {script}")
    assert message in printed
    assert printed.endswith(f"example: {example(script)}\n")


@pytest.mark.parametrize("script", ["convert2hf_internlm.py", "revert_internlm.py"])
def test_version_is_1_or_2(script: str) -> None:
    words = SOME[script.partition("_")[0]].split()
    status, printed = run_script([str(REPOSITORY / script), *words, "--version", "3"])
    assert status == 2
    assert "argument --version: invalid choice: 3 (choose from 1, 2)" in printed


@pytest.mark.parametrize("family", ["internlm", "internlm2"])
@pytest.mark.parametrize(("rotary", "warned"), [([], True), (["--rotary_type", "dynamic"], False)])
def test_a_scaling_factor_without_scaling_is_warned_of(
    rotary: list[str], warned: bool, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(command_line, "run_convert", lambda family, arguments: given.append(arguments) or 0)
    words = [*SOME["convert2hf"].split(), "--scaling_factor", "3", *rotary]
    status, printed = run_script([str(REPOSITORY / f"convert2hf_{family}.py"), *words])
    assert status == 0
    assert given[0].scaling_factor == 3.0
    assert (
        printed == "warning: --scaling_factor says nothing without --rotary_type dynamic: it has no effect.\n" * warned
    )
