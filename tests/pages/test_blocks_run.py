"""The commands and programs of all pages run.

A page and its translation have the same blocks (test_languages.py), so the English ones run for both. They run as they
stand, in folders where the names that they use lead to tiny checkpoints (INPUTS); REPLACED and CHECKED_ONLY list the
exceptions.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.pages.pages import ENGLISH, HELD_AS, PAGES, README, REPOSITORY, SCRIPTS, blocks, code, commands, prose
from tests.support.checkpoints import Shape, build
from tests.support.tokenizer_fixture import NORMAL, USER_DEFINED, append_pieces, train_tokenizer

CHAT_VOCABULARY = 92544
FIRST_UNUSED = 92397
INPUTS: dict[str, dict[str, Any]] = {
    "ckpt/internlm": {"family": "internlm", "shape": Shape(64, 2, 8, 8), "tp": 2, "pp": 2, "bias": True},
    "ckpt/internlm2": {"family": "internlm2", "shape": Shape(64, 2, 8, 8), "tp": 2, "pp": 2},
    "ckpt/internlm2_chat": {"family": "internlm2", "shape": Shape(64, 1, 8, 8, vocab=CHAT_VOCABULARY)},
    "ckpt/1000": {"family": "internlm2", "shape": Shape(64, 2, 8, 8, vocab=CHAT_VOCABULARY), "tp": 2, "pp": 2},
}
"""The checkpoints that the pages name. Eight heads, because they revert to eight shards."""

TYPED = ("Why is the sky blue?", "And at sunset?", "")
"""What a program that asks is told."""

REPLACED = {
    '"flash_attention_2"': '"sdpa"',  # FlashAttention needs a GPU and a package that is not installed
    ".cuda()": "",  # no GPU
}
"""What is replaced in the programs before they run."""

CHECKED_ONLY = {
    "make": "would run this test again: the target must be in the Makefile",
    "pip": "installs into this environment: the extras must be in pyproject.toml",
    "hf": "needs the network: its flags must be in its --help",
    "cp": "copies into such a download: it must copy the modules of a package",
    ".venv/bin/python": "runs tests: the file must exist",
}
"""Commands that are not run, and what is looked at instead."""

FOR_THE_FRAMEWORK = REPOSITORY / "docs" / "training.md"
"""Its Python blocks belong into the files of the training framework, where `make internevo` runs them."""

COMMANDS = [command for page in ENGLISH for command in commands(page)]
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
    """`inside` looks like this folder, `holder` like a repository that holds it; the pages' commands ran there."""

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


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_what_the_pages_make_in_this_folder_is_no_change_to_git(workplace: Workplace, tmp_path: Path) -> None:
    """Nor to the linter, which leaves out what git ignores."""
    made = {path.name for path in workplace.inside.iterdir() if not path.is_symlink() or path.name.endswith(".model")}
    written = {"chat.py", "shapes.py", "internlm-7b", "internlm2-7b"}  # by whoever follows example.md and training.md
    for name in (".gitignore", *made, *written):
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).touch()
    for folder in (path for path in tmp_path.iterdir() if path.is_dir()):
        (folder / "config.json").touch()
    shutil.copy(REPOSITORY / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    status = ["git", "status", "--porcelain", "--untracked-files=all"]
    changed = subprocess.run(status, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert changed.split() == ["??", ".gitignore"]


def test_both_forms_of_every_command_are_shown() -> None:
    """In this folder, and from the repository that holds it; README.md, where somebody sees them first."""
    shown = [command for command in commands(README) if command.startswith("python ")]
    inside = [command for command in shown if HELD_AS not in command]
    held = [command for command in shown if HELD_AS in command]
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
        elif program == "cp":
            assert copies_a_package(command)
        else:
            assert (REPOSITORY / words[-1]).is_file(), command
    assert seen == set(CHECKED_ONLY)


def copies_a_package(command: str) -> bool:
    """Whether `cp PACKAGE/PATTERN FOLDER` copies what the converters do: the package's modules, not its __init__.py."""
    pattern = Path(shlex.split(command)[1])
    package = REPOSITORY / pattern.parent.name
    modules = set(package.glob("*_*.py")) - {package / "__init__.py"}
    return bool(modules) and set(package.glob(pattern.name)) == modules


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_are_there(page: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    assert {words.split()[1] for words in code(prose(page)) if words.startswith("make ")} <= targets
    assert all((REPOSITORY / name).is_file() for name in re.findall(r"python (\S+\.py)", prose(page)))
    assert all(copies_a_package(words) for words in code(prose(page)) if words.startswith("cp "))


def test_every_make_target_is_explained() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    explained = set(
        re.findall(r"`make ([\w-]+)`", (REPOSITORY / "docs" / "contributing.md").read_text(encoding="utf-8"))
    )
    assert explained == set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


# ---------------------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Program:
    """A python block, or one of the models that a block offers for choice, with what stands before them."""

    where: str
    text: str


def programs(page: Path) -> Iterator[Program]:
    for block in blocks(page):
        if block.language == "python" and page != FOR_THE_FRAMEWORK:
            yield from (Program(f"{block}{which}", text) for which, text in choices(block.text))


def choices(text: str) -> Iterator[tuple[str, str]]:
    """Each assignment to `model` of a block that has several, after what is not one; else the block."""
    statements = [(node, ast.get_source_segment(text, node) or "") for node in ast.parse(text).body]
    models = [node for node, _ in statements if isinstance(node, ast.Assign) and is_model(node.targets[0])]
    if len(models) < 2:
        yield "", text
        return
    before = "\n".join(source for node, source in statements if node not in models)
    for number, model in enumerate(models, start=1):
        yield f" model {number}", f"{before}\n{ast.get_source_segment(text, model)}\n"


def is_model(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "model"


PROGRAMS = [program for page in ENGLISH for program in programs(page)]


class Registry:
    """Stands in for the training framework's registry of models."""

    def __init__(self) -> None:
        self.modules: dict[str, Any] = {}

    def register_module(self, name: str, module: Any) -> None:
        self.modules[name] = module


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.where)
def test_every_program_of_the_pages_runs(
    program: Program, workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = program.text
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    monkeypatch.chdir(workplace.inside)
    monkeypatch.syspath_prepend(str(workplace.holder))
    answers = iter(TYPED)
    names: dict[str, Any] = {
        "__name__": "__main__",
        "model_initializer": Registry(),
        "input": lambda prompt: next(answers),
    }
    if text.startswith("from ."):
        names["__name__"] = names["__package__"] = f"{HELD_AS}.internlm_model"
    with imported_modules_forgotten(HELD_AS):
        exec(compile(text, program.where, "exec"), names)
    if "from_pretrained" in text:
        check_loaded(text, names["model"])
    if "input(" in text:
        assert [query for query, _ in names["history"]] == [query for query in TYPED if query]
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
    given = r"(torch_dtype|attn_implementation|device_map)="
    flags = [set(re.findall(given, program.text)) for program in programs(README)]
    dtype, flash, devices = "torch_dtype", "attn_implementation", "device_map"
    expected = [set(), {dtype}, {dtype}, {dtype, flash}, {dtype, devices}, {dtype, flash, devices}]
    assert flags[:6] == expected
