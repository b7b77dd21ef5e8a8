"""A --src that the script does not take is answered with what it is and what to give instead."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fault_harness import (
    TINY,
    assert_refused,
    convert_words,
    revert_words,
    run_script,
    train_quick_tokenizer,
)
from tests.support.checkpoints import build
from weight_conversion.files.copying import Copier

FAMILIES = ("internlm", "internlm2")
STEP = "the folder of one step of an InternEvo checkpoint, such as ckpt/1000."
EITHER = f"--src takes a Hugging Face folder, or {STEP}"

over_families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family a checkpoint in ckpt/1000 and what it is converted to, in hf; and a tokenizer."""
    root = tmp_path_factory.mktemp("sources")
    tokenizer = train_quick_tokenizer(root / "tokenizer.model")
    for family in FAMILIES:
        build(root / family / "ckpt" / "1000", family, shape=TINY[family])
        words = convert_words(root / family / "ckpt" / "1000", root / family / "hf", tokenizer)
        assert run_script(f"convert2hf_{family}", words).status == 0
    return root


@pytest.fixture
def place(bases: Path, tmp_path: Path, family: str) -> Path:
    shutil.copytree(bases / family, tmp_path / "place")
    shutil.copy(bases / "tokenizer.model", tmp_path)
    return tmp_path / "place"


def command(script: str, source: Path, tmp_path: Path) -> list[str]:
    if script == "convert2hf":
        return convert_words(source, tmp_path / "out", tmp_path / "tokenizer.model")
    return revert_words(source, tmp_path / "out", 1)


def refused(script: str, family: str, source: Path, tmp_path: Path, *words: str) -> None:
    outcome = run_script(f"{script}_{family}", command(script, source, tmp_path))
    assert_refused(outcome, str(source), *words)
    assert outcome.output == ""
    assert not (tmp_path / "out").exists()


@over_families
def test_the_folder_above_the_steps_is_answered_with_the_steps(family: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "ckpt" / "1000", place / "ckpt" / "200")
    (place / "ckpt" / "logs").mkdir()
    steps = f"Shards are in {place / 'ckpt' / '1000'}, {place / 'ckpt' / '200'}."
    refused("revert", family, place / "ckpt", tmp_path, "holds neither config.json nor shards", EITHER, steps)
    refused("convert2hf", family, place / "ckpt", tmp_path, "holds no shard", f"--src takes {STEP}", steps)


@over_families
def test_a_folder_of_something_else(family: str, place: Path, tmp_path: Path) -> None:
    (place / "docs").mkdir()
    (place / "docs" / "notes.md").touch()
    refused("revert", family, place / "docs", tmp_path, "holds neither config.json nor shards", EITHER)
    refused("convert2hf", family, place / "docs", tmp_path, "holds no shard", f"--src takes {STEP}")


@over_families
@pytest.mark.parametrize(("script", "taken"), [("revert", EITHER), ("convert2hf", f"--src takes {STEP}")])
def test_a_source_that_is_missing_or_a_file(script: str, taken: str, family: str, place: Path, tmp_path: Path) -> None:
    refused(script, family, place / "nowhere", tmp_path, "is missing", taken)
    shard = place / "ckpt" / "1000" / "model_tp0_pp0.pt"
    refused(script, family, shard, tmp_path, "is not a folder", taken[:-1], f"give {shard.parent}.")


@over_families
def test_a_hugging_face_folder_is_for_revert(family: str, place: Path, tmp_path: Path) -> None:
    refused("convert2hf", family, place / "hf", tmp_path, "is a Hugging Face folder already (revert_*.py takes it)")


@over_families
def test_weights_without_their_config(family: str, place: Path, tmp_path: Path) -> None:
    (place / "hf" / "config.json").unlink()
    refused("revert", family, place / "hf", tmp_path, "config.json is missing. Copy it there")


@over_families
@pytest.mark.parametrize("flags", [[], ["--safetensors"]])
def test_a_folder_without_weights(flags: list[str], family: str, place: Path, tmp_path: Path) -> None:
    (place / "hf" / "model.safetensors").unlink()
    words = revert_words(place / "hf", tmp_path / "out", 1)
    outcome = run_script(f"revert_{family}", [*words, *flags])
    assert_refused(outcome, "holds neither model.safetensors nor", "no .bin files (pytorch_model.bin) either")
    assert outcome.output == ""  # nothing is read
    (place / "hf" / "pytorch_model.bin").touch()
    outcome = run_script(f"revert_{family}", [*words, "--safetensors"])
    assert_refused(outcome, "It holds .bin files (pytorch_model.bin): leave --safetensors out.")


UNSUPPORTED: dict[str, tuple[str, str]] = {
    "fsdp": ("model_tp0_pp0_dp0.pt", "fsdp"),
    "moe": ("model_moe_layer0_expert0_tp0.pt", "MoE"),
    "universal": ("__0_0.distcp", "universal checkpoint"),
}


@over_families
@pytest.mark.parametrize("script", ["revert", "convert2hf"])
@pytest.mark.parametrize("layout", UNSUPPORTED)
def test_a_layout_that_is_not_supported_is_named_by_either_script(
    layout: str, script: str, family: str, place: Path, tmp_path: Path
) -> None:
    name, words = UNSUPPORTED[layout]
    folder = place / "ckpt" / "1000"
    (folder / "model_tp0_pp0.pt").rename(folder / name)
    refused(script, family, folder, tmp_path, name, f"layout {words}", "not supported")


@over_families
@pytest.mark.parametrize("script", ["revert", "convert2hf"])
def test_a_config_json_beside_shards_alone_does_not_hide_them(
    script: str, family: str, place: Path, tmp_path: Path
) -> None:
    folder = place / "ckpt" / "1000"
    shutil.copy(place / "hf" / "config.json", folder)
    outcome = run_script(f"{script}_{family}", command(script, folder, tmp_path))
    assert outcome.status == 0, outcome


NOTES: list[Callable[[Path], object]] = [lambda path: path.unlink(), lambda path: path.write_text("no weights")]


@over_families
@pytest.mark.parametrize("spoil", NOTES, ids=["gone", "damaged"])
def test_weights_that_could_not_be_read_are_not_said_to_be_read(
    spoil: Callable[[Path], object], family: str, place: Path, tmp_path: Path
) -> None:
    spoil(place / "hf" / "model.safetensors")
    assert run_script(f"revert_{family}", revert_words(place / "hf", tmp_path / "out", 1)).output == ""


@over_families
def test_a_size_that_is_refused_comes_with_those_that_work(family: str, place: Path, tmp_path: Path) -> None:
    words = revert_words(place / "hf", tmp_path / "out", 16)
    heads = TINY[family].kv_heads
    works = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
    outcome = run_script(f"revert_{family}", words)
    assert_refused(outcome, f"{heads} key/value heads do not divide by 16, but by {works}")


@over_families
def test_one_chunk_is_not_spoken_of(family: str, place: Path, tmp_path: Path) -> None:
    words = revert_words(place / "hf", tmp_path / "out", 1)
    outcome = run_script(f"revert_{family}", [*words, "--pp_size", "9"])
    assert_refused(outcome, "over --pp_size 9 stages: 2 layers are too few for 9 stages")
    assert "chunk" not in outcome.errors


CHANGES: dict[str, Callable[[Path], object]] = {
    "written again": lambda path: path.write_bytes(path.read_bytes()),
    "another file": lambda path: (shutil.copy(path, path.with_suffix(".new")), path.with_suffix(".new").replace(path)),
    "gone": lambda path: path.unlink(),
}


@over_families
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize(
    ("script", "source", "file"),
    [
        ("convert2hf", "ckpt/1000", "model_tp0_pp0.pt"),
        ("revert", "ckpt/1000", "model_tp0_pp0.pt"),
        ("revert", "hf", "model.safetensors"),
    ],
)
def test_weights_that_change_while_they_are_read_are_not_published(
    script: str,
    source: str,
    file: str,
    change: Callable[[Path], object],
    family: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As training that saves again, or a copy that is not finished, changes them: here once all of it was read."""
    for name in ("gather", "scatter"):
        copied = getattr(Copier, name)

        def and_changed(self: Copier, tasks: Any, copied: Callable = copied) -> Any:
            result = copied(self, tasks)
            change(place / source / file)
            return result

        monkeypatch.setattr(Copier, name, and_changed)
    outcome = run_script(f"{script}_{family}", command(script, place / source, tmp_path))
    assert_refused(outcome, file, "was changed while it was being read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place", "tokenizer.model"]
