"""InternEvo itself (PyPI, on a CPU): it trains these models by the page's four steps, and loads what revert writes.

`make internevo` runs it. The framework lies in a folder of its own beside the environment (FRAMEWORK in the Makefile).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.model_families import FAMILIES, Family
from tests.support.tokenizer_fixture import train_tokenizer
from weight_conversion.command_line import convert_parser, revert_parser, run_convert, run_revert

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
HEADING = "Training Hugging Face models with InternEvo"
SHAPE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
"""Of the models that are trained here, where those of the page are of 7B parameters."""
SETTINGS: dict[str, dict[str, Any]] = {
    "internlm": {"num_attention_heads": 4, "rms_norm_eps": 1e-6},
    "internlm2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bias": False,
        "rms_norm_eps": 1e-3,
        "rope_theta": 1000000,
    },
}
MODELS = {"internlm": "internlm-7b", "internlm2": "internlm2-7b"}


# ----------------------------------------------------------------------------------------------------- the four steps


def page() -> str:
    """The section of README.md, and the page that continues it."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {HEADING}$\n(.*?)^## ", readme, re.M | re.S)
    assert section is not None
    return section[1] + (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")


def added_blocks() -> Iterator[tuple[str, str]]:
    """(file, text) of the Python blocks: a block goes into the file that is named last before it."""
    text = page()
    for fence in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        yield re.findall(r"`([\w/.-]+\.py)`", text[: fence.start()])[-1], fence[1]


@pytest.fixture(scope="session")
def framework(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The framework's folder with the page's blocks in its files, and this repository in it as huggingface_model."""
    folder = tmp_path_factory.mktemp("InternEvo")
    installed = importlib.util.find_spec("internlm")
    assert installed is not None, "run it by `make internevo`, which installs the framework"
    shutil.copytree(Path(str(installed.origin)).parent, folder / "internlm")
    for package in ("internlm_model", "internlm2_model"):
        shutil.copytree(REPOSITORY / package, folder / "huggingface_model" / package)
    (folder / "configs").mkdir()
    for name, text in added_blocks():
        path = folder / name
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(f"{before}\n\n{text}", encoding="utf-8")
    for family in FAMILIES:
        save_model(family, folder / "huggingface_model" / MODELS[family.name])
    for command in re.findall(r"^cp .*", page(), re.M):
        subprocess.run(command, shell=True, cwd=folder, check=True)
    config = (folder / "configs" / "7B_hf.py").read_text(encoding="utf-8")
    renamed = config.replace("INTERNLM_FROM_HF", "INTERNLM2_FROM_HF").replace(*MODELS.values())
    (folder / "configs" / "internlm2.py").write_text(renamed, encoding="utf-8")
    (folder / "configs" / "internlm.py").write_text(config, encoding="utf-8")
    return folder


def save_model(family: Family, folder: Path, **more: Any) -> None:
    """What step 1 downloads: a small random model in the place of the published one, without code."""
    torch.manual_seed(0)
    settings = {**SHAPE, **SETTINGS[family.name], **more}
    config = family.cls("Config")(**settings, initializer_range=0.15)  # logits of about 1
    model = family.cls("ForCausalLM")(config)
    for name, parameter in model.named_parameters():  # fresh ones are 1 and 0, which would hide a mistake
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.save_pretrained(folder)
    for module in folder.glob("*.py"):
        module.unlink()


def in_framework(folder: Path, script: str, *words: Any) -> str:
    """What a script of this room prints in the framework's folder; it has the environment, and the installed rest."""
    paths = os.pathsep.join((str(folder), os.environ["PYTHONPATH"]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / script), *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# ------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Trained:
    """What a run said, and the folder that it saved."""

    losses: list[float]
    norms: list[dict[str, float]]
    tokens: list[int]
    evaluated: float
    folder: Path


def trained(framework: Path, family: Family, folder: Path, *flags: Any) -> Trained:
    shape = json.dumps({**SHAPE, **SETTINGS[family.name]}) if family.name == "internlm" else "{}"
    printed = in_framework(framework, "train.py", f"configs/{family.name}.py", folder, "--default_shape", shape, *flags)
    return Trained(**json.loads(printed.splitlines()[-1]), folder=folder)


@pytest.fixture(params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def convert(family: Family, source: Path, target: Path, tokenizer: Path, *flags: str) -> int:
    parser = convert_parser("convert", family.name, 1.0, versions=family.name == "internlm")
    paths = ["--src", str(source), "--tgt", str(target), "--tokenizer", str(tokenizer), "--verify"]
    return run_convert(family.name, parser.parse_args([*paths, *flags]))


@pytest.mark.parametrize(
    "flags",
    [
        ("--dtype", "float32"),
        ("--dtype", "bfloat16"),
        ("--dtype", "float32", "--unpacked"),
        ("--dtype", "bfloat16", "--unpacked"),
        ("--dtype", "float32", "--mode", "isp"),
    ],
    ids=" ".join,
)
def test_the_four_steps_train_and_what_they_save_converts(
    framework: Path,
    family: Family,
    flags: tuple[str, ...],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = trained(framework, family, tmp_path / "saved", *flags)
    assert convert(family, run.folder, tmp_path / "refused", tokenizer) == 1
    assert "--config" in capsys.readouterr().err
    print(f"{family} {' '.join(flags)}: loss {[round(loss, 3) for loss in run.losses]}, then {run.evaluated:.3f}")
    dtype = flags[1]
    config = str(run.folder / "class")
    assert convert(family, run.folder, tmp_path / "hf", tokenizer, "--dtype", dtype, "--config", config) == 0
    check_converted(run.folder, tmp_path / "hf", family)


def check_converted(saved: Path, converted: Path, family: Family) -> None:
    """Every tensor is the one saved, every setting the class's, and the logits are the trained model's."""
    expected = torch.load(min(saved.glob("model_tp*.pt")), weights_only=True)
    found = load_file(converted / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((converted / "config.json").read_text(encoding="utf-8"))
    assert {name: config[name] for name in SETTINGS[family.name]} == SETTINGS[family.name]
    logits = torch.load(saved / "class" / "logits.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True, torch_dtype="auto").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(logits["ids"]).logits, logits["logits"].to(model.dtype), atol=1e-4, rtol=0)


def tokenized(family: Family, tokenizer: Path, folder: Path) -> list[str]:
    """What the framework's tools/tokenizer.py makes of lines of text, with this repository's class; the lines.

    A line of JSON for each, and where it begins and how many tokens it has in a table beside it.
    """
    words = family.cls("Tokenizer")(vocab_file=str(tokenizer), add_bos_token=True, add_eos_token=True)
    lines = [f"{number} trains leave the station, and {number + 1} return" for number in range(400)]
    content, table = b"", []
    for line in lines:
        ids = words.encode(line)
        table.append((len(content), len(ids)))
        content += json.dumps({"tokens": ids}).encode() + b"\n"
    (folder / "en").mkdir(parents=True)
    (folder / "en" / "train.bin").write_bytes(content)
    with (folder / "en" / "train.bin.meta").open("wb") as file:
        np.save(file, np.array(table, dtype=np.int32))
    return lines


@pytest.mark.parametrize("flags", [(), ("--unpacked",)], ids=["packed", "unpacked"])
def test_the_frameworks_loader_feeds_what_our_tokenizer_made(
    framework: Path, family: Family, flags: tuple[str, ...], tokenizer: Path, tmp_path: Path
) -> None:
    lines = tokenized(family, tokenizer, tmp_path / "data")
    run = trained(framework, family, tmp_path / "saved", "--data", tmp_path / "data", "--steps", "8", *flags)
    print(f"{family} {' '.join(flags)}: loss {[round(loss, 3) for loss in run.losses]}")
    words = family.cls("Tokenizer")(vocab_file=str(tokenizer))
    ends = [place for place, token in enumerate(run.tokens) if token == words.eos_token_id]
    assert len(ends) > 1  # several lines in a row, of which the first and the last may be cut
    whole = itertools.pairwise(ends) if not flags else itertools.pairwise([-1, *ends])
    for before, end in whole:
        assert words.decode(run.tokens[before + 1 : end], skip_special_tokens=True) in lines
    more = ("--dtype", "float32", "--config", str(run.folder / "class"))
    assert convert(family, run.folder, tmp_path / "hf", tokenizer, *more) == 0
    check_converted(run.folder, tmp_path / "hf", family)


def test_ranks_train_alike(framework: Path, family: Family, tokenizer: Path, tmp_path: Path) -> None:
    """Two processes, which hold all of the model each: the losses and norms are those of one, and so is what is saved.

    Both have the same batch, so the mean of their gradients is that of one.
    """
    alone = trained(framework, family, tmp_path / "alone")
    for flags in (("--tp", "2"), ("--mode", "isp", "--wp", "2"), ()):
        folder = tmp_path / " ".join(flags)
        together = trained(framework, family, folder / "saved", "--processes", "2", *flags)
        assert together.losses == pytest.approx(alone.losses, abs=1e-3)
        for one, other in zip(together.norms, alone.norms, strict=True):
            assert sum(one.values()) == pytest.approx(sum(other.values()), rel=1e-3)
        more = ("--dtype", "float32", "--config", str(together.folder / "class"))
        assert convert(family, together.folder, folder / "hf", tokenizer, *more) == 0
        check_converted(together.folder, folder / "hf", family)


def test_the_frameworks_modules_take_the_places_of_ours(
    framework: Path, family: Family, tokenizer: Path, tmp_path: Path
) -> None:
    """As InternEvo does since autumn 2024, in isp: the same training, and weights that are cut over the ranks."""
    runs = {"ours": trained(framework, family, tmp_path / "ours", "--mode", "isp")}
    for ranks in (1, 2):
        flags = ("--mode", "isp", "--wp", ranks, "--processes", ranks, "--replaced")
        runs[f"theirs{ranks}"] = trained(framework, family, tmp_path / f"theirs{ranks}", *flags)
    tensors = {}
    for name, run in runs.items():
        assert run.losses == pytest.approx(runs["ours"].losses, abs=1e-3)
        more = ("--dtype", "float32", "--config", str(run.folder / "class"))
        assert convert(family, run.folder, tmp_path / f"hf_{name}", tokenizer, *more) == 0
        tensors[name] = load_file(tmp_path / f"hf_{name}" / "model.safetensors")
    ours = tensors.pop("ours")
    for theirs in tensors.values():
        assert ours.keys() == theirs.keys()
        assert not {name for name in ours if not torch.allclose(ours[name], theirs[name], atol=1e-3)}


# --------------------------------------------------------------------------------------------- what revert writes

RUNS = [
    "--tp 1",
    "--tp 2",
    "--tp 2 --pp 2",
    "--tp 1 --wp 2",
    "--tp 1 --wp 4 --pp 2",
    "--tp 2 --wp 4",
    "--tp 1 --pp 2 --chunks 2",
    "--tp 1 --wp 2 --mlp_layer_fusion",
]
"""Sizes of the run; what follows them is in model_config.pt alone."""


def downloaded(framework: Path, family: Family) -> Path:
    return framework / "huggingface_model" / MODELS[family.name]


def reverted(source: Path, family: Family, folder: Path, *flags: str) -> Path:
    """Shards in `folder`, and beside them the logits that their model must give."""
    parser = revert_parser("revert", family.name, versions=family.name == "internlm")
    assert run_revert(family.name, parser.parse_args(["--src", str(source), "--tgt", str(folder), *flags])) == 0
    model = family.cls("ForCausalLM").from_pretrained(source).eval()
    ids = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        torch.save({"input_ids": ids, "logits": model(ids).logits}, folder.with_suffix(".logits"))
    return folder


@pytest.mark.parametrize("sizes", RUNS)
def test_the_framework_loads_what_revert_writes(
    framework: Path, family: Family, sizes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = re.sub(r"--(tp|pp|wp)", r"--\1_size", sizes).replace("--chunks", "--num_chunks")
    folder = reverted(downloaded(framework, family), family, tmp_path / "shards", "--embed_split", *words.split())
    run = re.sub(r"--chunks \d|--mlp_layer_fusion", "", sizes).split()
    capsys.readouterr()
    logits = folder.with_suffix(".logits")
    print(in_framework(framework, "load_shards.py", folder, family.name, *run, "--logits", logits).strip())


def test_a_vocabulary_split_embedding_loads_where_one_rank_has_it(
    framework: Path, family: Family, tmp_path: Path
) -> None:
    """This version looks for the other embedding alone, and says so in its log."""
    whole = reverted(downloaded(framework, family), family, tmp_path / "whole", "--tp_size", "1")
    logits = whole.with_suffix(".logits")
    in_framework(framework, "load_shards.py", whole, family.name, "--allow-second-name", "--logits", logits)
    cut = reverted(downloaded(framework, family), family, tmp_path / "cut", "--tp_size", "2")
    with pytest.raises(AssertionError, match=r"missing keys \['(tok_embeddings|embedding)\.weight'\]"):
        in_framework(framework, "load_shards.py", cut, family.name, "--tp", "2")


def test_an_intermediate_size_that_256_does_not_divide_loads(framework: Path, family: Family, tmp_path: Path) -> None:
    """With the multiple_of of model_config.pt, from which the framework builds the size."""
    save_model(family, tmp_path / "hf", intermediate_size=200)
    folder = reverted(tmp_path / "hf", family, tmp_path / "shards", "--embed_split", "--tp_size", "2")
    flags = ("--tp", "2", "--logits", folder.with_suffix(".logits"))
    print(in_framework(framework, "load_shards.py", folder, family.name, *flags).strip())
