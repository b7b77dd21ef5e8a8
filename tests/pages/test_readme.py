"""README.md and README-zh-Hans.md: their commands and programs run, their tables say what the scripts do.

Both pages have the same code blocks, so those of README.md run for both. They run as they stand, in folders where the
names that they use lead to tiny checkpoints (INPUTS); REPLACED and CHECKED_ONLY list the exceptions.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import Shape, build
from tests.support.tokenizer_fixture import NORMAL, USER_DEFINED, append_pieces, train_tokenizer
from weight_conversion import command_line

REPOSITORY = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = REPOSITORY / "README.md", REPOSITORY / "README-zh-Hans.md"
PAGES = (ENGLISH, CHINESE)
SCRIPTS = ("convert2hf_internlm.py", "convert2hf_internlm2.py", "revert_internlm.py", "revert_internlm2.py")
HELD_AS = "huggingface_model"
"""The name of this folder in the repository that holds it."""

CHAT_VOCABULARY = 92544
FIRST_UNUSED = 92397
INPUTS: dict[str, dict[str, Any]] = {
    "ckpt/internlm": {"family": "internlm", "shape": Shape(64, 2, 8, 8), "tp": 2, "pp": 2, "bias": True},
    "ckpt/internlm2": {"family": "internlm2", "shape": Shape(64, 2, 8, 8), "tp": 2, "pp": 2},
    "ckpt/internlm2_chat": {"family": "internlm2", "shape": Shape(64, 1, 8, 8, vocab=CHAT_VOCABULARY)},
}
"""The checkpoints that the pages name. Eight heads, because they revert to eight shards."""

REPLACED = {
    '"flash_attention_2"': '"sdpa"',  # FlashAttention needs a GPU and a package that is not installed
    ".cuda()": "",  # no GPU
}
"""What is replaced in the programs before they run."""

CHECKED_ONLY = {
    "make": "would run this test again: the target must be in the Makefile",
    "pip": "installs into this environment: the extras must be in pyproject.toml",
    "hf": "needs the network: its flags must be in its --help",
    ".venv/bin/python": "runs tests: the file must exist",
}
"""Commands that are not run, and what is looked at instead."""


# ----------------------------------------------------------------------------------------------------- reading pages


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line on which it starts."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(fence[1], fence[2], text[: fence.start()].count("\n") + 1) for fence in fences]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def section(page: Path, heading: str) -> str:
    """The prose from a heading to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", prose(page), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no heading {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The body rows of the tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [index for index, row in enumerate(cells) if set("".join(row)) <= set("-| ")]
    return [row for index, row in enumerate(cells) if index not in rules and index + 1 not in rules]


def code(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


PROGRAMS = [block for block in blocks(ENGLISH) if block.language == "python"]
COMMANDS = [
    " ".join(line.split())
    for block in blocks(ENGLISH)
    if block.language == "bash"
    for line in block.text.replace("\\\n", "").splitlines()
]
RUN = [command for command in COMMANDS if shlex.split(command)[0] == "python"]


# ---------------------------------------------------------------------------------------------------------- commands


def run_script(words: list[str]) -> tuple[int, str]:
    """Runs `script flags` in this process; the exit status and everything printed."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(words[0], run_name="__main__")
            status: Any = 0
        except SystemExit as stop:
            status = stop.code
    return int(status or 0), printed.getvalue()


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Outcome:
    command: str
    status: int
    printed: str


@dataclass(frozen=True)
class Workplace:
    """`inside` looks like this folder, `holder` like a repository that holds it; the commands of the page ran there."""

    inside: Path
    holder: Path
    outcomes: list[Outcome]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    inputs, inside, holder = (tmp_path_factory.mktemp(name) for name in ("inputs", "inside", "holder"))
    write_inputs(inputs)
    for name in (*SCRIPTS, "internlm_model", "internlm2_model", "weight_conversion"):
        (inside / name).symlink_to(REPOSITORY / name)
    (holder / HELD_AS).symlink_to(REPOSITORY)
    for folder in (inside, holder):
        (folder / "ckpt").mkdir()
        for name in (*INPUTS, "tokenizer.model", "chat_tokenizer.model"):
            (folder / name).symlink_to(inputs / name)
    outcomes = []
    for command in RUN:
        words = shlex.split(command)[1:]
        with working_in(holder if words[0].startswith(HELD_AS) else inside):
            outcomes.append(Outcome(command, *run_script(words)))
    return Workplace(inside, holder, outcomes)


def write_inputs(folder: Path) -> None:
    for name, recipe in INPUTS.items():
        build(folder / name, **recipe)
    train_tokenizer(folder / "tokenizer.model")
    chat = train_tokenizer(folder / "chat_tokenizer.model")
    append_pieces(chat, [f"<{number}>" for number in range(320, FIRST_UNUSED)], NORMAL)
    unused = range(CHAT_VOCABULARY - FIRST_UNUSED)
    append_pieces(chat, [f"[UNUSED_TOKEN_{number}]" for number in unused], USER_DEFINED)


def test_every_command_of_the_pages_succeeds(workplace: Workplace) -> None:
    failed = [outcome for outcome in workplace.outcomes if outcome.status or "tensors," not in outcome.printed]
    assert not failed
    for outcome in workplace.outcomes:
        words = shlex.split(outcome.command)
        where = workplace.holder if words[1].startswith(HELD_AS) else workplace.inside
        target = where / words[words.index("--tgt") + 1]
        assert (target / ("config.json" if "convert2hf" in words[1] else "model_config.pt")).exists()


def test_both_forms_of_every_command_are_shown() -> None:
    inside = [command for command in RUN if HELD_AS not in command and "--chat" not in command]
    held = [command for command in RUN if HELD_AS in command]
    assert [command.replace(f"{HELD_AS}/", "") for command in held] == inside
    assert {shlex.split(command)[1] for command in inside} == set(SCRIPTS)


def test_a_command_works_in_a_process_of_its_own(workplace: Workplace) -> None:
    """From the repository that holds this folder, where only the script's own folder is on the import path."""
    words = shlex.split(next(command for command in RUN if command.startswith(f"python {HELD_AS}/convert2hf")))
    subprocess.run([sys.executable, *words[1:], "--force"], cwd=workplace.holder, check=True, capture_output=True)


def test_commands_that_are_not_run_are_there() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    seen = set()
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if program == "python":
            continue
        seen.add(program)
        if program == "make":
            assert words[0] in targets, command
        elif program == "pip":
            named = re.fullmatch(r"\.(?:\[(\w+)\])?", words[-1])
            assert words[:-1] == ["install"], command
            assert named is not None, command
            assert named[1] in (None, *extras), command
        elif program == "hf":
            tool = Path(sys.executable).with_name("hf")
            known = subprocess.run([tool, words[0], "--help"], check=True, capture_output=True, text=True).stdout
            assert all(word in known for word in words if word.startswith("--")), command
        else:
            assert (REPOSITORY / words[-1]).is_file(), command
    assert seen == set(CHECKED_ONLY)
    for page in PAGES:
        named_targets = {words.split()[1] for words in code(prose(page)) if words.startswith("make ")}
        assert named_targets <= set(targets)
        programs = re.findall(r"python (\S+\.py)", prose(page))
        assert all((REPOSITORY / name).is_file() for name in programs)


# ---------------------------------------------------------------------------------------------------------- programs


class Registry:
    """Stands in for the training framework's registry of models."""

    def __init__(self) -> None:
        self.modules: dict[str, Any] = {}

    def register_module(self, name: str, module: Any) -> None:
        self.modules[name] = module


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda block: f"line{block.line}")
def test_every_program_of_the_pages_runs(
    program: Block, workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = program.text
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    monkeypatch.chdir(workplace.inside)
    monkeypatch.syspath_prepend(str(workplace.holder))
    names: dict[str, Any] = {"__name__": "__main__", "model_initializer": Registry()}
    if text.startswith("from ."):
        names["__name__"] = names["__package__"] = f"{HELD_AS}.internlm_model"
    with imported_modules_forgotten(HELD_AS):
        exec(compile(text, f"README.md:{program.line}", "exec"), names)
    if "from_pretrained" in text:
        check_loaded(text, names["model"])
    if "register_module" in text:
        assert list(names["model_initializer"].modules) == ["INTERNLM_FROM_HF"]
    if "hf_model_conf_map" in text:
        check_map(names["hf_model_conf_map"])


@contextlib.contextmanager
def imported_modules_forgotten(package: str) -> Iterator[None]:
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]


def check_loaded(text: str, model: Any) -> None:
    """The model is of the type and runs the attention that its program asks for."""
    dtype = re.search(r"torch_dtype=\"?([\w.]+)", text)
    expected = {None: "torch.float32", "auto": "torch.bfloat16"}
    given = dtype[1] if dtype else None
    assert str(model.dtype) == expected.get(given, given)
    assert model.config._attn_implementation == ("sdpa" if '"sdpa"' in text else "eager")


def check_map(conf_map: dict[str, tuple[str, str]]) -> None:
    """Each name leads to a configuration class of this folder."""
    for model_type, (module, name) in conf_map.items():
        assert model_type.endswith("_FROM_HF")
        with imported_modules_forgotten(HELD_AS):
            assert getattr(__import__(module, fromlist=[name]), name).model_type == "internlm"


def test_six_loading_examples() -> None:
    """float32, "auto", float16, FlashAttention, several devices, several devices with FlashAttention."""
    flags = [set(re.findall(r"(torch_dtype|attn_implementation|device_map)=", program.text)) for program in PROGRAMS]
    dtype, flash, devices = "torch_dtype", "attn_implementation", "device_map"
    expected = [set(), {dtype}, {dtype}, {dtype, flash}, {dtype, devices}, {dtype, flash, devices}]
    assert flags[:6] == expected


# -------------------------------------------------------------------------------------------------------------- flags


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
    """The flags as the table under the script's heading tells them."""
    flags = []
    for name, default, choices, meaning in rows(section(page, script)):
        assert meaning, f"{page.name}: {script} {name} is not explained"
        value = {"required": None, "必填": None, "none": None, "无": None, "off": "False", "关": "False"}
        stated = value[default] if default in value else code(default)[0]
        flags.append(Flag(code(name)[0], default in ("required", "必填"), stated, tuple(code(choices))))
    return flags


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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


# ------------------------------------------------------------------------------------------------- pages and messages


def test_both_pages_have_the_same_code_blocks() -> None:
    assert [(block.language, block.text) for block in blocks(CHINESE) if block.language != "text"] == [
        (block.language, block.text) for block in blocks(ENGLISH) if block.language != "text"
    ]
    trees = [[line.split()[:2] for line in tree(page)] for page in PAGES]
    assert trees[0] == trees[1]


def tree(page: Path) -> list[str]:
    (drawn,) = (block.text for block in blocks(page) if block.language == "text")
    return [line for line in drawn.splitlines() if "──" in line]


def test_both_pages_have_the_same_structure() -> None:
    """Headings, table sizes, lists and what stands in them as code: names, flags, defaults, messages."""
    outlines = [outline(page) for page in PAGES]
    assert outlines[0] == outlines[1]


def outline(page: Path) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for line in prose(page).splitlines():
        if heading := re.match(r"(#+) ", line):
            found.append(("heading", len(heading[1])))
        elif line.startswith("|"):
            found.append(("row", [sorted(set(code(cell))) for cell in line.strip("|").split("|")]))
        elif item := re.match(r"(\d+\.|-) ", line):
            found.append(("item", item[1]))
    return found


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Anchors that the headings get: lower case, punctuation dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith("#"):
            assert link[1:] in anchors(page), link
        elif not link.startswith("https://"):
            assert (REPOSITORY / link).is_file(), link


def test_both_pages_link_to_the_same_places_and_to_each_other() -> None:
    files = [[link for link in links(page) if not link.startswith("#")] for page in PAGES]
    assert files[0][0] == CHINESE.name
    assert files[1][0] == ENGLISH.name
    assert files[0][1:] == files[1][1:]


def test_the_tree_shows_the_folder() -> None:
    shown = {line.split("── ")[1].split()[0].rstrip("/") for line in tree(ENGLISH)}
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs the repository's own list of files")
    present = {path.split("/")[0] for path in listed.stdout.split() if "/" in path or path.endswith(".py")}
    assert shown == {name for name in present if not name.startswith(".")}


FROM_LIBRARIES = ("contains custom code which must be executed", "FlashAttention2 has been toggled on")
"""Messages that transformers has."""


def messages_of_code() -> list[str]:
    """Every string of the code as a message would show it, with … for what is filled in."""
    found = []
    for package in ("weight_conversion", "internlm_model", "internlm2_model"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_the_messages_of_the_pages_are_those_of_the_code() -> None:
    known = messages_of_code()
    tables = [section(ENGLISH, f"Messages of the {what}") for what in ("scripts", "models and tokenizers")]
    messages = [code(message)[0] for table in tables for message, _ in rows(table)]
    assert len(messages) > 30
    unknown = [message for message in messages if not any(message in text for text in known)]
    assert [message for message in unknown if not message.startswith(FROM_LIBRARIES)] == []
