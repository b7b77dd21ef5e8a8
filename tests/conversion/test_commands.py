"""The scripts in every way to call them, and the version that they tell and write."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.faults.fault_harness import TINY, convert_words, revert_words, train_quick_tokenizer
from tests.support.checkpoints import build
from tests.support.tokenizer_fixture import train_tokenizer
from weight_conversion import PROJECT, __version__

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = ("convert2hf_internlm", "convert2hf_internlm2", "revert_internlm", "revert_internlm2")
HELD_AS = "huggingface_model"
VERSION_LINE = f"{PROJECT} {__version__}"

over_scripts = pytest.mark.parametrize("script", SCRIPTS)


def run(words: list[str], folder: Path, **variables: str) -> str:
    """What a program of its own, called in `folder`, prints; it must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, `ckpt`, and a tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    train_quick_tokenizer(folder / "tokenizer.model")
    build(folder / "ckpt", "internlm2", shape=TINY["internlm2"], tp=2)
    return folder


# ------------------------------------------------------------------------------------------------------ ways to call


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `pip install .` put a copy of the tree: packages, and the commands in bin/."""
    setuptools = importlib.metadata.version("setuptools") if found("setuptools") else "0"
    if int(setuptools.split(".")[0]) < 77:
        pytest.skip("pip would fetch the setuptools that builds the package from the package index")
    copy, target = (tmp_path_factory.mktemp(name) for name in ("copy", "installed"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    for name in {package.split(".")[0] for package in project["tool"]["setuptools"]["packages"]}:
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*(f"{script}.py" for script in SCRIPTS), "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(copy)], copy)
    return target


def found(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@over_scripts
def test_an_installed_script_is_a_command(script: str, installed: Path, tmp_path: Path) -> None:
    command, path = str(installed / "bin" / script), str(installed)
    assert run([command, "--version"], tmp_path, PYTHONPATH=path) == f"{VERSION_LINE}\n"
    printed = run([command, "--help"], tmp_path, PYTHONPATH=path)
    assert printed.startswith(f"usage: {script} ")
    assert f"example:\n  {script} --src " in printed


def test_installed_commands_convert_and_revert(installed: Path, sources: Path, tmp_path: Path) -> None:
    """With the modules of the installation, in a folder that has nothing of the project."""
    words = convert_words(sources / "ckpt", tmp_path / "hf", sources / "tokenizer.model")
    run([str(installed / "bin" / "convert2hf_internlm2"), *words], tmp_path, PYTHONPATH=str(installed))
    words = revert_words(tmp_path / "hf", tmp_path / "back")
    run([str(installed / "bin" / "revert_internlm2"), *words], tmp_path, PYTHONPATH=str(installed))
    assert (tmp_path / "hf" / "modeling_internlm2.py").is_file()
    assert sorted(path.name for path in (tmp_path / "back").glob("*.pt")) == [
        "model_config.pt",
        "model_tp0_pp0.pt",
        "model_tp1_pp0.pt",
    ]


def test_the_installation_has_the_version(installed: Path) -> None:
    (found,) = importlib.metadata.distributions(path=[str(installed)])
    assert (found.metadata["Name"], found.version) == (PROJECT, __version__)


@over_scripts
def test_a_script_runs_as_a_module_of_the_folder_that_holds_it(script: str, tmp_path: Path) -> None:
    (tmp_path / HELD_AS).symlink_to(REPOSITORY)
    printed = run([sys.executable, "-m", f"{HELD_AS}.{script}", "--version"], tmp_path)
    assert printed == f"{VERSION_LINE}\n"
    printed = run([sys.executable, "-m", f"{HELD_AS}.{script}", "--help"], tmp_path)
    assert printed.startswith(f"usage: python -m {HELD_AS}.{script} ")
    assert f"example:\n  python -m {HELD_AS}.{script} --src " in printed


def test_modules_convert_and_revert(sources: Path, tmp_path: Path) -> None:
    (tmp_path / HELD_AS).symlink_to(REPOSITORY)
    words = convert_words(sources / "ckpt", tmp_path / "hf", sources / "tokenizer.model")
    run([sys.executable, "-m", f"{HELD_AS}.convert2hf_internlm2", *words], tmp_path)
    run([sys.executable, "-m", f"{HELD_AS}.revert_internlm2", *revert_words(tmp_path / "hf", tmp_path / "b")], tmp_path)
    assert (tmp_path / "b" / "model_tp1_pp0.pt").is_file()


# --------------------------------------------------------------------------------------------------------- versions


@over_scripts
def test_version_alone_and_help_tell_the_version(script: str) -> None:
    assert run([sys.executable, f"{script}.py", "--version"], REPOSITORY) == f"{VERSION_LINE}\n"
    assert VERSION_LINE in run([sys.executable, f"{script}.py", "--help"], REPOSITORY)


@over_scripts
def test_version_beside_other_flags_is_not_that(script: str) -> None:
    """There it is InternLM's flag, which needs a value."""
    words = [sys.executable, f"{script}.py", "--tgt", "somewhere", "--version"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error:" in done.stderr


def test_there_is_one_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == PROJECT
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "weight_conversion.__version__"}
    for family in ("internlm", "internlm2"):
        text = (REPOSITORY / f"{family}_model" / f"configuration_{family}.py").read_text(encoding="utf-8")
        assert re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE) == [__version__]


def test_the_changes_name_the_version() -> None:
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## ([\d.]+)", changes, re.MULTILINE)
    assert headings[0] == __version__
    assert headings == sorted(headings, key=lambda text: [int(part) for part in text.split(".")], reverse=True)


@pytest.mark.parametrize("format", ["internlm2", "llama"])
def test_a_converted_folder_names_what_wrote_it(format: str, sources: Path, tmp_path: Path) -> None:
    """Also after transformers has loaded and saved it; reverting is as before."""
    folder = tmp_path / "hf"
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model") if format == "llama" else sources / "tokenizer.model"
    build(tmp_path / "ckpt", "internlm2")
    words = convert_words(tmp_path / "ckpt", folder, tokenizer, "--format", format)
    run([sys.executable, "convert2hf_internlm2.py", *words], REPOSITORY)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["converted_by"] == VERSION_LINE
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.converted_by == VERSION_LINE

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert saved["converted_by"] == VERSION_LINE
    for name in ("hf", "saved"):
        words = revert_words(tmp_path / name, tmp_path / f"{name}_back")
        run([sys.executable, "revert_internlm2.py", *words], REPOSITORY)
    for shard in (tmp_path / "hf_back").glob("model_tp*.pt"):
        assert shard.read_bytes() == (tmp_path / "saved_back" / shard.name).read_bytes()


def test_the_code_of_a_folder_tells_its_version(sources: Path, tmp_path: Path) -> None:
    words = convert_words(sources / "ckpt", tmp_path / "hf", sources / "tokenizer.model")
    run([sys.executable, "convert2hf_internlm2.py", *words], REPOSITORY)
    config = AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert sys.modules[type(config).__module__].__version__ == __version__  # type: ignore[attr-defined]
