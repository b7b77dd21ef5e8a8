"""revert --src on a training checkpoint: from one layout to another. Random layouts are in test_conversion_fuzz.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.conversion.test_conversion import (
    CARRIED,
    FAMILIES,
    assert_same,
    convert,
    names_of,
    real_checkpoints,
    revert,
    shards,
    weights,
)
from tests.support.checkpoints import SHAPES, Recipe, Shape, build, model_config
from tests.support.tokenizer_fixture import train_tokenizer
from weight_conversion.command_line import revert_parser, run_revert
from weight_conversion.mapping.family import builds_intermediate_size, mlp_ratio
from weight_conversion.mapping.rules import ModelShape


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def settings(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "model_config.pt", weights_only=True)


def refusal(family: str, capsys: pytest.CaptureFixture[str], source: Path, target: Path, *flags: str) -> str:
    parser = revert_parser("revert", family, versions=family == "internlm")
    words = ["--src", str(source), "--tgt", str(target), "--tp_size", "1", *flags]
    assert run_revert(family, parser.parse_args(words)) == 1
    assert not target.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("source", real_checkpoints())
def test_the_training_models_logits_survive_another_layout(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    family, _, _ = names_of(source)
    revert(family, source, tmp_path / "there", 2, "--pp_size", "2", "--embed_split", "--verify")
    revert(family, tmp_path / "there", tmp_path / "back", 1, "--wp_size", "4", "--mlp_layer_fusion", "--verify")
    convert(family, tmp_path / "back", tmp_path / "hf", tokenizer, "--dtype", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    record = torch.load(source / "expected_logits.pt")
    with torch.no_grad():
        logits = model(record["input_ids"]).logits
    torch.testing.assert_close(logits, record["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_converting_and_reverting_without_the_folder_between(
    family: str, tokenizer: Path, tmp_path: Path
) -> None:
    full = build(tmp_path / "a", family, tp=2, pp=2, bias=True, interleaved=True, config={"rope_base": 5e5})
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer, "--dtype", "float32", "--max_pos", "2048")
    assert_same(weights(tmp_path / "hf"), full)
    flags = ("--wp_size", "2", "--pp_size", "2", "--verify")
    revert(family, tmp_path / "hf", tmp_path / "by way of it", 2, *flags)
    revert(family, tmp_path / "a", tmp_path / "at once", 2, *flags)
    expected, found = shards(tmp_path / "by way of it"), shards(tmp_path / "at once")
    assert expected.keys() == found.keys()
    for name in expected:
        assert_same(found[name], expected[name])
    there, here = settings(tmp_path / "by way of it"), settings(tmp_path / "at once")
    free = {"mlp_ratio", "use_flash_attn"}  # as training had them: the same model
    assert {key: (there[key], here.get(key)) for key in there.keys() - free if there[key] != here.get(key)} == {}


@pytest.mark.parametrize("flags", [(), ("--wp_size", "2"), ("--wp_size", "2", "--isp", "2025")], ids=" ".join)
def test_the_shards_of_any_layout_may_be_replaced(flags: tuple[str, ...], tmp_path: Path) -> None:
    build(tmp_path / "a", "internlm2")
    for size in (2, 1):
        revert("internlm2", tmp_path / "a", tmp_path / "b", size, "--force", *flags)
        for path in (tmp_path / "b").glob("model_*p0.pt"):
            path.with_name(path.name + ".md5").write_text("0")


def test_settings_of_training_stay(tmp_path: Path) -> None:
    """The output weight is not normalised: the flag says that training does it."""
    kept = {"norm_head": True, "embed_grad_scale": 0.1, "rope_base": 1000000, "layer_norm_epsilon": 1e-4}
    build(tmp_path / "a", "internlm2", tp=2, norm_head=True, config=kept | {"use_flash_attn": True})
    revert("internlm2", tmp_path / "a", tmp_path / "b", 2, "--embed_split")
    found, expected = shards(tmp_path / "b"), shards(tmp_path / "a")
    for name in expected:
        assert_same(found[name], expected[name])
    assert {key: settings(tmp_path / "b")[key] for key in kept} == kept
    assert settings(tmp_path / "b")["use_flash_attn"]


OF_TRAINING: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "use_dynamic_ntk_rope": True,
    "residual_in_fp32": True,
    "drop_rate": 0.1,
    "checkpoint": 0.5,
    "parallel_output": False,
    "norm_type": "layernorm",
    "apply_post_layer_norm": True,
    "deepnorm": True,
    "init_type": "normal",
    "rope_scaling_factor": 3.0,
    "model_type": "INTERNLM2_PUBLIC",
    "of a version to come": [None, {"a": (1, 2.5)}],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_stays_but_those_of_the_layout(family: str, tmp_path: Path) -> None:
    config = OF_TRAINING | {"vocab_parallel": True, "no_bias": None}
    build(tmp_path / "a", family, interleaved=True, config=config)
    flags = ("--wp_size", "2", "--pp_size", "2", "--num_chunks", "2", "--mlp_layer_fusion")
    revert(family, tmp_path / "a", tmp_path / "b", 1, *flags)
    before = model_config(Recipe(family, SHAPES[family], interleaved=True, config=config))
    after = settings(tmp_path / "b")
    of_the_layout = {
        "num_chunks": 2,
        "embed_split_hidden": True,
        "mlp_layer_fusion": True,
        "qk_interleaved": False,
        "vocab_parallel": False,
        "no_bias": True,
        **({"adapt_hf": True} if family == "internlm2" else {}),
    }
    assert {key: after[key] for key in before | of_the_layout} == before | of_the_layout


@pytest.mark.parametrize("family", FAMILIES)
def test_converting_warns_of_the_positions_after_another_layout_too(
    family: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "a", family, config={"max_position_embeddings": 8192})
    revert(family, tmp_path / "a", tmp_path / "b", 1)
    capsys.readouterr()
    convert(family, tmp_path / "b", tmp_path / "hf", tokenizer)
    assert "max_position_embeddings = 8192" in capsys.readouterr().err


@pytest.mark.parametrize("ratio", [None, 5.0, 4.7, float("nan"), 10**400, "4", 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_intermediate_size_is_that_of_the_sources_own_multiple(
    family: str, ratio: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = Shape(hidden=64, layers=1, kv_heads=4, intermediate=320)
    build(tmp_path / "a", family, shape=shape, config={"multiple_of": 64, "mlp_ratio": ratio})
    revert(family, tmp_path / "a", tmp_path / "b", 1)
    found = settings(tmp_path / "b")
    assert found["multiple_of"] == 64
    assert found["mlp_ratio"] == (4.7 if ratio == 4.7 else 5.0)  # both build 320
    assert ("mlp_ratio" in capsys.readouterr().err) == (ratio not in (None, 5.0, 4.7))


@given(st.integers(1, 9000), st.integers(1, 300), st.integers(1, 300))
def test_a_ratio_builds_the_size_that_it_is_of(hidden: int, multiple: int, count: int) -> None:
    shape = ModelShape(hidden, multiple * count, 1, 1, 1, 1)
    assert builds_intermediate_size(shape, mlp_ratio(shape, multiple), multiple)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_or_setting_that_cannot_be_told_is_refused(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = Shape(layers=1, kv_heads=4, intermediate=320)
    build(tmp_path / "size", family, shape=shape)
    assert "320 is not a multiple of 256" in refusal(family, capsys, tmp_path / "size", tmp_path / "b")
    for key, value in (("multiple_of", 0), ("multiple_of", "64"), ("weights", [torch.ones(2)]), ("long", 1 << 3000)):
        build(tmp_path / "odd", family, config={key: value})
        assert key in refusal(family, capsys, tmp_path / "odd", tmp_path / "b")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_source_is_refused_by_name(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "b"
    build(tmp_path / "class", family, hf_class=True)
    assert "--config" in refusal(family, capsys, tmp_path / "class", target)
    build(tmp_path / "a", family)
    assert "--safetensors" in refusal(family, capsys, tmp_path / "a", target, "--safetensors")
    build(tmp_path / "odd", family, config={"norm_head": [1]})
    assert "norm_head" in refusal(family, capsys, tmp_path / "odd", target)
    build(tmp_path / "twice", family, embedding="vocabulary")
    shard = torch.load(tmp_path / "twice" / "model_tp0_pp0.pt", weights_only=True)
    name = next(name for name in shard if "word_embeddings" in name)
    second = name.replace(".word_embeddings", "")
    torch.save(shard | {second: shard[name].clone()}, tmp_path / "twice" / "model_tp0_pp0.pt")
    assert f"twice, as '{second}' and as '{name}'" in refusal(family, capsys, tmp_path / "twice", target)
    build(tmp_path / "mixed", family, tp=2)
    shard = torch.load(tmp_path / "mixed" / "model_tp1_pp0.pt", weights_only=True)
    torch.save(shard | {"norm.weight": shard["norm.weight"] + 1}, tmp_path / "mixed" / "model_tp1_pp0.pt")
    assert "differs" in refusal(family, capsys, tmp_path / "mixed", target)


def test_a_folder_with_both_is_a_hugging_face_folder(tokenizer: Path, tmp_path: Path) -> None:
    """Its config.json says so; shards that lie beside it are not looked at."""
    convert("internlm2", CARRIED / "internlm2_tp2", tmp_path / "hf", tokenizer, "--dtype", "float32")
    build(tmp_path / "hf", "internlm2", seed=1)
    revert("internlm2", tmp_path / "hf", tmp_path / "b", 1, "--embed_split")
    assert settings(tmp_path / "b")["hidden_size"] == 64  # the shards' is 32
