"""revert --src on a training checkpoint: from one layout to another. Random layouts are in test_conversion_fuzz.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import SHAPES, Recipe, Shape, build, model_config
from tests.support.conversions import (
    CARRIED,
    FAMILIES,
    assert_same,
    convert,
    convert_refusal,
    names_of,
    real_checkpoints,
    revert,
    revert_refusal,
    shards,
    weights,
)
from weight_conversion.mapping.rules import ModelShape
from weight_conversion.mapping.sizes import builds_intermediate_size, mlp_ratio


def settings(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "model_config.pt", weights_only=True)


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
    "norm_type": "rmsnorm",
    "apply_post_layer_norm": None,
    "deepnorm": False,
    "num_experts": 1,
    "init_type": "normal",
    "model_type": "INTERNLM2_PUBLIC",
    "rope_scaling_factor": 3.0,
    "of a version to come": [None, {"a": (1, 2.5)}],
}
"""The last two are no setting of a model that is known here."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_stays_but_those_of_the_layout(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OF_TRAINING | {"vocab_parallel": True, "no_bias": None}
    build(tmp_path / "a", family, interleaved=True, config=config)
    flags = ("--wp_size", "2", "--pp_size", "2", "--num_chunks", "2", "--mlp_layer_fusion")
    revert(family, tmp_path / "a", tmp_path / "b", 1, *flags)
    assert "not known here: 'of a version to come', 'rope_scaling_factor'." in capsys.readouterr().err
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


ANOTHER_MODEL = {
    "norm_type": "layernorm",
    "apply_post_layer_norm": True,
    "use_swiglu": False,
    "is_reward": True,
    "deepnorm": True,
    "num_experts": 4,
}


NO_YES_OR_NO = [("adapt_hf", "no"), ("qk_interleaved", float("nan")), ("norm_head", -1), ("mlp_layer_fusion", 2)]


@pytest.mark.parametrize(("key", "value"), [*ANOTHER_MODEL.items(), *NO_YES_OR_NO, ("norm_type", ["rmsnorm"])])
@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_another_model_are_refused_on_every_way(
    family: str, key: str, value: object, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensors have the same names and shapes with most of them, so nothing else would tell."""
    build(tmp_path / "a", family, config={key: value})
    assert f"{key} " in revert_refusal(family, tmp_path / "a", capsys)
    assert f"{key} " in convert_refusal(family, tmp_path / "a", tokenizer, capsys)


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_nobody_here_knows_are_told_of(
    family: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "plain", family, bias=True, interleaved=True, config={"multiple_of": 256, "use_swiglu": True})
    convert(family, tmp_path / "plain", tmp_path / "a", tokenizer)
    revert(family, tmp_path / "a", tmp_path / "b", 1)
    convert(family, tmp_path / "b", tmp_path / "c", tokenizer, "--max_pos", "2048")
    assert "not known here" not in capsys.readouterr().err
    build(tmp_path / "new", family, config={"sliding_window": 4096})
    convert(family, tmp_path / "new", tmp_path / "d", tokenizer)
    assert "not known here: 'sliding_window'." in capsys.readouterr().err


@pytest.mark.parametrize("fused", [True, False, None])
def test_three_weights_stay_three_and_pieces_become_one(fused: bool | None, tmp_path: Path) -> None:
    """A run with enable_qkv_fusion=False would cut a wqkv where the rows of q and of k would end."""
    omit = ("enable_qkv_fusion",) if fused is None else ()
    choices = {"bias": True, "tp": 2, "omit": omit}
    build(tmp_path / "a", "internlm2", fused=fused is not False, pieces=fused is not False, **choices)
    revert("internlm2", tmp_path / "a", tmp_path / "b", 2, "--embed_split", "--verify")
    build(tmp_path / "expected", "internlm2", fused=fused is not False, **choices)
    expected, found = shards(tmp_path / "expected"), shards(tmp_path / "b")
    assert expected.keys() == found.keys()
    for name in expected:
        assert_same(found[name], expected[name])
    assert settings(tmp_path / "b").get("enable_qkv_fusion") is fused
    build(tmp_path / "odd", "internlm2", config={"enable_qkv_fusion": False})  # as reverting once wrote them
    revert("internlm2", tmp_path / "odd", tmp_path / "c", 2, "--embed_split")
    assert settings(tmp_path / "c")["enable_qkv_fusion"] is True


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


@pytest.mark.parametrize(("size", "given", "multiple"), [(320, None, 64), (333, None, 1), (384, 256, 128), (6, 4, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_intermediate_size_is_written_with_what_builds_it(
    family: str, size: int, given: int | None, multiple: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = Shape(layers=1, kv_heads=4, intermediate=size)
    build(tmp_path / "a", family, shape=shape, config={"multiple_of": given})
    revert(family, tmp_path / "a", tmp_path / "b", 1)
    found = settings(tmp_path / "b")
    assert found["multiple_of"] == multiple
    assert builds_intermediate_size(ModelShape(32, size, 1, 1, 1, 1), found["mlp_ratio"], multiple)
    assert f"needs multiple_of = {multiple}" in capsys.readouterr().err


@given(st.integers(1, 9000), st.integers(1, 300), st.integers(1, 300))
def test_a_ratio_builds_the_size_that_it_is_of(hidden: int, multiple: int, count: int) -> None:
    shape = ModelShape(hidden, multiple * count, 1, 1, 1, 1)
    assert builds_intermediate_size(shape, mlp_ratio(shape), multiple)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_setting_that_cannot_be_written_is_refused(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in (("multiple_of", 0), ("multiple_of", "64"), ("weights", [torch.ones(2)]), ("long", 1 << 3000)):
        build(tmp_path / "odd", family, config={key: value})
        assert key in revert_refusal(family, tmp_path / "odd", capsys)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_source_is_refused_by_name(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "class", family, hf_class=True)
    assert "--config" in revert_refusal(family, tmp_path / "class", capsys)
    build(tmp_path / "a", family)
    assert "--safetensors" in revert_refusal(family, tmp_path / "a", capsys, "--safetensors")
    build(tmp_path / "odd", family, config={"norm_head": [1]})
    assert "norm_head" in revert_refusal(family, tmp_path / "odd", capsys)
    build(tmp_path / "twice", family, embedding="vocabulary")
    shard = torch.load(tmp_path / "twice" / "model_tp0_pp0.pt", weights_only=True)
    name = next(name for name in shard if "word_embeddings" in name)
    second = name.replace(".word_embeddings", "")
    torch.save(shard | {second: shard[name].clone()}, tmp_path / "twice" / "model_tp0_pp0.pt")
    assert f"twice, as '{second}' and as '{name}'" in revert_refusal(family, tmp_path / "twice", capsys)
    build(tmp_path / "mixed", family, tp=2)
    shard = torch.load(tmp_path / "mixed" / "model_tp1_pp0.pt", weights_only=True)
    torch.save(shard | {"norm.weight": shard["norm.weight"] + 1}, tmp_path / "mixed" / "model_tp1_pp0.pt")
    assert "differs" in revert_refusal(family, tmp_path / "mixed", capsys)


def test_a_folder_with_both_is_a_hugging_face_folder(tokenizer: Path, tmp_path: Path) -> None:
    """Its config.json says so; shards that lie beside it are not looked at."""
    convert("internlm2", CARRIED / "internlm2_tp2", tmp_path / "hf", tokenizer, "--dtype", "float32")
    build(tmp_path / "hf", "internlm2", seed=1)
    revert("internlm2", tmp_path / "hf", tmp_path / "b", 1, "--embed_split")
    assert settings(tmp_path / "b")["hidden_size"] == 64  # the shards' is 32
