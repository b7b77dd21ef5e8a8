"""Convert and revert through the scripts' own functions: what is written, and that nothing is lost on either way."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from tests.support.checkpoints import Shape, build
from tests.support.conversions import (
    EIGHT_HEADS,
    FAMILIES,
    LAYOUTS,
    assert_files_are_those_of,
    assert_revert_refused,
    assert_same,
    change_settings,
    convert,
    convert_refusal,
    names_of,
    real_checkpoints,
    revert,
    run_flags,
    save_as_bin,
    shards,
    weights,
)
from weight_conversion.command_line import _status, convert_parser
from weight_conversion.files.torch_file import read_plain_dict

REPOSITORY = Path(__file__).resolve().parents[2]


def with_both_names(shard: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A shard that is the only one of its stage has a vocabulary-split embedding under the plain name too."""
    return shard | {name.replace(".word_embeddings", ""): tensor for name, tensor in shard.items()}


# ----------------------------------------------------------------------------------- the training framework's own files


@pytest.mark.parametrize("source", real_checkpoints())
def test_logits_are_those_of_the_training_model(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    family, _, _ = names_of(source)
    convert(family, source, tmp_path / "hf", tokenizer, "--dtype", "float32", "--verify")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    record = torch.load(source / "expected_logits.pt")
    with torch.no_grad():
        logits = model(record["input_ids"]).logits
    torch.testing.assert_close(logits, record["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("source", real_checkpoints())
def test_shards_of_the_current_layout_come_back_bit_for_bit(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    family, tp, flags = names_of(source)
    convert(family, source, tmp_path / "hf", tokenizer, "--dtype", "float32")
    revert(family, tmp_path / "hf", tmp_path / "back", tp, *flags, "--verify")
    convert(family, tmp_path / "back", tmp_path / "again", tokenizer, "--dtype", "float32")
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "hf"))
    if "adapt0" in source.name:  # rows in halves are written
        return
    before, after = shards(source), shards(tmp_path / "back")
    assert before.keys() == after.keys()
    old = "2023" in source.name
    for name in before:
        expected = {key.removeprefix("model."): value for key, value in before[name].items()} if old else before[name]
        assert_same(after[name], {key: value for key, value in expected.items() if "inv_freq" not in key})


# --------------------------------------------------------------------------------------------------- every way to split


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_convert_of_revert_changes_nothing(family: str, tp: int, tokenizer: Path, tmp_path: Path) -> None:
    dtypes = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    versions = (1, 2) if family == "internlm" else (None,)
    choices = itertools.product([False, True], ["hidden", "vocabulary"], versions)
    for number, (bias, embedding, version) in enumerate(choices):
        dtype = list(dtypes)[number % len(dtypes)]
        here = tmp_path / str(number)
        more = {"mlp_version": version} if version else {}
        full = build(
            here / "a", family, shape=EIGHT_HEADS[family], tp=tp, bias=bias, embedding=embedding, dtype=dtype, **more
        )
        convert(family, here / "a", here / "hf", tokenizer, "--dtype", dtypes[dtype])
        assert_same(weights(here / "hf"), full)
        flags = ["--embed_split"] if embedding == "hidden" else []
        revert(family, here / "hf", here / "back", tp, *flags, *(["--version", str(version)] if version else []))
        before, after = shards(here / "a"), shards(here / "back")
        assert before.keys() == after.keys()
        for name in before:
            assert_same(after[name], with_both_names(before[name]) if tp == 1 else before[name])
        convert(family, here / "back", here / "again", tokenizer, "--dtype", dtypes[dtype])
        assert_same(weights(here / "again"), full)


@pytest.mark.parametrize(("family", "choices"), LAYOUTS, ids=lambda value: str(value))
def test_every_layout_gives_the_same_model(
    family: str, choices: dict[str, Any], tokenizer: Path, tmp_path: Path
) -> None:
    full = build(tmp_path / "a", family, **choices)
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer, "--dtype", "float32", "--verify")
    assert_same(weights(tmp_path / "hf"), full)


@pytest.mark.parametrize("fused", [True, False, None])
def test_three_weights_and_pieces_of_one_have_the_same_names(
    fused: bool | None, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only enable_qkv_fusion tells: where it is left out, InternLM2 of InternEvo has one weight, and that is said."""
    omit = ("enable_qkv_fusion",) if fused is None else ()
    full = build(tmp_path / "a", "internlm2", tp=2, fused=fused is not False, pieces=fused is not False, omit=omit)
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer, "--dtype", "float32")
    assert ("set enable_qkv_fusion to False" in capsys.readouterr().err) == (fused is None)
    assert_same(weights(tmp_path / "hf"), full)
    names = shards(tmp_path / "a")["model_tp0_pp0.pt"].keys()
    assert "layers.0.attention.wq.weight" in names
    assert "layers.0.attention.wqkv.weight" not in names


def test_three_weights_are_known_by_their_biases(tokenizer: Path, tmp_path: Path) -> None:
    """The framework cuts no bias into pieces."""
    full = build(tmp_path / "a", "internlm2", tp=2, fused=False, bias=True, omit=("enable_qkv_fusion",))
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer, "--dtype", "float32")
    assert_same(weights(tmp_path / "hf"), full)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_of_none_is_not_stated(family: str, tokenizer: Path, tmp_path: Path) -> None:
    sizes = dict.fromkeys(("num_layers", "vocab_size", "intermediate_size"))
    full = build(tmp_path / "a", family, config=sizes)
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer, "--dtype", "float32")
    assert_same(weights(tmp_path / "hf"), full)


@pytest.mark.parametrize("source", [param for param in real_checkpoints() if "internlm_" not in str(param.id)])
def test_pieces_of_a_real_wqkv_give_the_training_models_logits(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    """As InternEvo's save hook since September 2024 cuts them: where the rows of q, and of k, would end."""
    shutil.copytree(source, tmp_path / "a")
    settings = read_plain_dict(source / "model_config.pt")
    heads = settings["num_attention_heads"]
    kv_heads = settings.get("num_kv_attention_heads", heads)
    for path, shard in shards(tmp_path / "a").items():
        for name in [name for name in shard if name.endswith("wqkv.weight")]:
            rows = shard[name].unflatten(0, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads])
            pieces = zip((name.replace("wqkv", x) for x in ("wq", "wk", "wv")), rows, strict=True)
            shard |= {piece: part.flatten(0, 1).clone() for piece, part in pieces}
            del shard[name]
        torch.save(shard, tmp_path / "a" / path)
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer, "--dtype", "float32", "--verify")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    record = torch.load(source / "expected_logits.pt")
    with torch.no_grad():
        logits = model(record["input_ids"]).logits
    torch.testing.assert_close(logits, record["logits"], atol=1e-4, rtol=0)


def test_a_normalised_head_is_written_normalised(tokenizer: Path, tmp_path: Path) -> None:
    full = build(tmp_path / "a", "internlm2", tp=2, norm_head=True, dtype=torch.bfloat16)
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer, "--verify")
    found = weights(tmp_path / "hf")
    one_unit = torch.finfo(torch.bfloat16).eps  # two sums of squares may round to neighbours
    torch.testing.assert_close(found["output.weight"], full["output.weight"].bfloat16(), atol=0, rtol=one_unit)
    assert torch.equal(found["model.tok_embeddings.weight"], full["model.tok_embeddings.weight"])


def test_a_normalised_head_that_training_used_raw(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """InternEvo 0.5.1 and 0.5.2 compute the normalised weight, and then use the raw one."""
    build(tmp_path / "a", "internlm2", tp=2, norm_head=True)
    convert("internlm2", tmp_path / "a", tmp_path / "normalized", tokenizer, "--dtype", "float32")
    assert "--norm_head raw" in capsys.readouterr().err
    convert(
        "internlm2", tmp_path / "a", tmp_path / "said", tokenizer, "--dtype", "float32", "--norm_head", "normalized"
    )
    assert "norm_head" not in capsys.readouterr().err
    assert_same(weights(tmp_path / "said"), weights(tmp_path / "normalized"))
    convert("internlm2", tmp_path / "a", tmp_path / "raw", tokenizer, "--dtype", "float32", "--norm_head", "raw")
    raw = torch.cat([shard["output.weight"] for shard in shards(tmp_path / "a").values()])
    assert torch.equal(weights(tmp_path / "raw")["output.weight"], raw)
    build(tmp_path / "plain", "internlm2")
    refused = convert_refusal("internlm2", tmp_path / "plain", tokenizer, capsys, "--norm_head", "raw")
    assert "does not set norm_head" in refused


@pytest.mark.parametrize(
    ("stored", "written", "rounds"),
    [
        (torch.float32, "bfloat16", True),
        (torch.float16, "bfloat16", True),
        (torch.bfloat16, "bfloat16", False),
        (torch.bfloat16, "float32", False),
    ],
)
def test_the_last_line_says_what_was_rounded(
    stored: torch.dtype, written: str, rounds: bool, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "a", "internlm2", dtype=stored)
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer, "--dtype", written, "--verify")
    text = "".join(capsys.readouterr())
    name = str(stored).removeprefix("torch.")
    assert (f"rounded from {name} to {written} (--dtype)" in text) == rounds
    assert f"equals its source{', rounded' if rounds else ''}." in text


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"wp": 2},
        {"tp": 2, "wp": 1},
        {"wp": 4, "isp_2025": True},
        {"tp": 2, "whole": True},
        {"tp": 2, "wp": 4, "whole": True},
        {"wp": 2, "isp_2025": True, "whole": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_on_the_hugging_face_class_comes_back(
    family: str,
    bias: bool,
    choices: dict[str, Any],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its settings are those of the class, whatever the training configuration says: they are asked for."""
    wrong = {"layer_norm_epsilon": 1e-3, "num_attention_heads": 8, "rope_base": 5}
    full = build(tmp_path / "a", family, hf_class=True, bias=bias, config=wrong, **choices)
    assert "--config" in convert_refusal(family, tmp_path / "a", tokenizer, capsys)
    build(tmp_path / "native", family, bias=bias)
    convert(family, tmp_path / "native", tmp_path / "class", tokenizer)
    config = tmp_path / "class" / "config.json"
    change_settings(config.parent, {"rms_norm_eps": 3e-6})
    for number, given in enumerate((config, config.parent)):
        target = tmp_path / f"hf{number}"
        convert(family, tmp_path / "a", target, tokenizer, "--dtype", "float32", "--config", str(given), "--verify")
        assert_same(weights(target), full)
        written = json.loads((target / "config.json").read_text())
        assert (written["rms_norm_eps"], written["num_attention_heads"], written["bias"]) == (3e-6, 4, bias)
        assert written["rope_theta"] == 10000
    assert "Leave --config out" in convert_refusal(
        family, tmp_path / "native", tokenizer, capsys, "--config", str(config)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_is_not_the_trained_one_is_named(
    family: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "a", family, hf_class=True)
    build(tmp_path / "native", family)
    convert(family, tmp_path / "native", tmp_path / "class", tokenizer)
    config = tmp_path / "class" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"hidden_size": 2 * settings["hidden_size"]}))
    found = convert_refusal(family, tmp_path / "a", tokenizer, capsys, "--config", str(config.parent))
    assert f"ranks by {config} (--config)" in found
    nowhere = tmp_path / "nowhere"
    found = convert_refusal(family, tmp_path / "a", tokenizer, capsys, "--config", str(nowhere))
    assert f"{nowhere} is missing. --config takes the config.json of the class that training ran on" in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"head_dim": 64}, "head_dim is 64"),
        ({"bias": True}, "bias is True, expected False"),
        ({"model_type": "mistral"}, "is of model_type 'mistral'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_that_computed_otherwise_is_refused_by_name(
    family: str,
    change: dict[str, Any],
    words: str,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The folder would say what the families have, and its model give other logits than training."""
    build(tmp_path / "a", family, hf_class=True)
    build(tmp_path / "native", family)
    convert(family, tmp_path / "native", tmp_path / "class", tokenizer)
    change_settings(tmp_path / "class", change)
    assert words in convert_refusal(family, tmp_path / "a", tokenizer, capsys, "--config", str(tmp_path / "class"))


@pytest.mark.parametrize("choices", [{}, {"wp": 4}, {"fused": False}], ids=str)
def test_key_value_heads_are_those_of_the_weights(choices: dict[str, Any], tokenizer: Path, tmp_path: Path) -> None:
    """Where model_config.pt does not say how many there are."""
    full = build(tmp_path / "a", "internlm2", omit=("num_kv_attention_heads",), **choices)
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer, "--dtype", "float32")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_key_value_heads"] == 2
    assert_same(weights(tmp_path / "hf"), full)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_cast_is_the_one_of_torch(dtype: str, tokenizer: Path, tmp_path: Path) -> None:
    full = build(tmp_path / "a", "internlm2", tp=2)
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer, "--dtype", dtype, "--verify")
    assert_same(weights(tmp_path / "hf"), {name: tensor.to(getattr(torch, dtype)) for name, tensor in full.items()})


def test_a_square_mlp_needs_the_version(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    square = Shape(hidden=128, layers=2, heads=4, kv_heads=4, intermediate=256)
    full = build(tmp_path / "a", "internlm", shape=square, tp=2, mlp_version=1)
    assert "--version 1" in convert_refusal("internlm", tmp_path / "a", tokenizer, capsys)
    convert("internlm", tmp_path / "a", tmp_path / "hf", tokenizer, "--version", "1", "--dtype", "float32")
    assert_same(weights(tmp_path / "hf"), full)


# --------------------------------------------------------------------------------------------------- the folder written


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_those_of_save_pretrained(family: str, tokenizer: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", family, tp=2, bias=True)
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer, "--max_shard", "100KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype="auto")
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert_files_are_those_of(tmp_path / "saved", tmp_path / "hf")
    written, by_transformers = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "saved")
    )
    by_transformers.pop("transformers_version")
    assert written == by_transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_auto_class_loads_the_folder(family: str, tokenizer: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", family)
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer)
    name = {"internlm": "InternLM", "internlm2": "InternLM2"}[family]
    assert type(AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True)).__name__ == f"{name}Config"
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert loaded_tokenizer.decode(loaded_tokenizer("云 and  sea").input_ids, skip_special_tokens=True) == "云 and  sea"
    for auto, ending in (
        (AutoModel, "ForCausalLM"),
        (AutoModelForCausalLM, "ForCausalLM"),
        (AutoModelForSequenceClassification, "ForSequenceClassification"),
        (AutoModelForTokenClassification, "ForTokenClassification"),
        (AutoModelForQuestionAnswering, "ForQuestionAnswering"),
    ):
        model = auto.from_pretrained(tmp_path / "hf", trust_remote_code=True)
        assert type(model).__name__ == name + ending
        assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "factor", "is_lost"), [("internlm", 1, True), ("internlm2", 1, False), ("internlm2", 3, True)]
)
def test_a_factor_that_training_does_not_know_is_said(
    family: str, factor: int, is_lost: bool, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "a", family)
    flags = ["--rotary_type", "dynamic", "--scaling_factor", str(factor)]
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer, *flags)
    capsys.readouterr()
    revert(family, tmp_path / "hf", tmp_path / "back", 1)
    assert (f"--rotary_type dynamic --scaling_factor {factor}" in capsys.readouterr().err) == is_lost


def test_published_keys_are_written_as_published(tokenizer: Path, tmp_path: Path) -> None:
    written = {}
    for family in FAMILIES:
        build(tmp_path / family, family)
        flags = ["--rotary_type", "dynamic", "--scaling_factor", "1"]
        convert(family, tmp_path / family, tmp_path / f"{family}_hf", tokenizer, *flags)
        written[family] = json.loads((tmp_path / f"{family}_hf" / "config.json").read_text())
    assert written["internlm"]["rotary"] == {"base": 10000, "type": "dynamic"}
    assert written["internlm"]["rope_scaling"] == {"type": "dynamic", "factor": 1.0}
    assert written["internlm2"]["pretraining_tp"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_flags_and_the_trained_base_take_effect(family: str, tokenizer: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", family, config={"rope_base": 1000000})
    flags = ["--rotary_type", "dynamic", "--scaling_factor", "3", "--max_pos", "64"]
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer, *flags)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == 1000000
    assert config["rope_scaling"] == {"type": "dynamic", "factor": 3.0}
    assert config["max_position_embeddings"] == 64
    if family == "internlm":
        assert config["rotary"] == {"base": 1000000, "type": "dynamic", "scaling_factor": 3.0}
    convert(family, tmp_path / "a", tmp_path / "origin", tokenizer)
    config = json.loads((tmp_path / "origin" / "config.json").read_text())
    assert config["rope_scaling"] is None
    assert config["max_position_embeddings"] == 4096


@pytest.mark.parametrize("family", FAMILIES)
def test_flags_have_the_documented_defaults(family: str) -> None:
    factor = {"internlm": 1.0, "internlm2": 2.0}[family]
    parser = convert_parser("convert", family, factor, versions=family == "internlm")
    arguments = vars(parser.parse_args(["--src", "a", "--tgt", "b", "--tokenizer", "c"]))
    documented = {"dtype": "bfloat16", "max_shard": 10 * 10**9, "max_pos": 4096, "rotary_type": "origin"}
    assert documented.items() <= arguments.items()
    assert arguments["scaling_factor"] == factor


# --------------------------------------------------------------------------------------------------------------- revert


@pytest.mark.parametrize("family", FAMILIES)
def test_each_shard_holds_only_its_own_part(family: str, tokenizer: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", family, shape=EIGHT_HEADS[family], bias=True)
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer)
    revert(family, tmp_path / "hf", tmp_path / "back", 8)
    for path, state in zip(
        sorted((tmp_path / "back").glob("model_tp*")), shards(tmp_path / "back").values(), strict=True
    ):
        nbytes = sum(tensor.nbytes for tensor in state.values())
        assert path.stat().st_size < nbytes + 512 * len(state)
    config = torch.load(tmp_path / "back" / "model_config.pt")  # weights_only: plain data
    assert type(config) is dict
    assert config["embed_split_hidden"] is False


@pytest.mark.parametrize("family", FAMILIES)
def test_bin_and_safetensors_revert_the_same(
    family: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "a", family, tp=2, bias=True)
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer)
    revert(family, tmp_path / "hf", tmp_path / "one", 2, "--safetensors")
    save_as_bin(tmp_path / "hf")
    torch.save({"learning_rate": 1e-4}, tmp_path / "hf" / "training_args.bin")  # beside the weights, not one of them
    capsys.readouterr()
    revert(family, tmp_path / "hf", tmp_path / "two", 2)
    assert "bin" in capsys.readouterr().out
    for name, state in shards(tmp_path / "one").items():
        assert_same(shards(tmp_path / "two")[name], state)


def test_a_tied_head_is_written_as_a_head(tokenizer: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", "internlm2")
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer)
    config = AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(tmp_path / "tied")
    assert "output.weight" not in weights(tmp_path / "tied")
    revert("internlm2", tmp_path / "tied", tmp_path / "back", 2)
    first, second = shards(tmp_path / "back").values()
    head = torch.cat([first["output.weight"], second["output.weight"]])
    assert torch.equal(head, weights(tmp_path / "tied")["model.tok_embeddings.weight"])


def test_what_users_should_know_is_said(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = {"max_position_embeddings": 512, "use_dynamic_ntk_rope": True}
    build(tmp_path / "a", "internlm2", bias=True, config=trained)
    convert("internlm2", tmp_path / "a", tmp_path / "hf.v1", tokenizer)
    said = capsys.readouterr().err
    for words in ("attention biases", "use_dynamic_ntk_rope", "max_position_embeddings = 512", "has a dot"):
        assert words in said
    revert("internlm2", tmp_path / "hf.v1", tmp_path / "back", 2)
    assert "RANDOM embedding" in capsys.readouterr().err
    revert("internlm2", tmp_path / "hf.v1", tmp_path / "flash", 2, "--use_flash")
    assert "0.5.x and later" in capsys.readouterr().err
    revert("internlm2", tmp_path / "hf.v1", tmp_path / "one", 1)
    revert("internlm2", tmp_path / "hf.v1", tmp_path / "isp", 2, "--wp_size", "2")
    revert("internlm2", tmp_path / "hf.v1", tmp_path / "split", 2, "--embed_split")
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("rows", [320 + 1023, 320 + 1024])
def test_a_tokenizer_of_far_fewer_pieces_than_rows_is_warned_of(
    rows: int, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """InternLM2's 92544 pieces for InternLM's 103168 rows; vocabularies that are padded are common."""
    build(tmp_path / "a", "internlm2", shape=Shape(layers=1, vocab=rows))
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer)
    warning = f"{tokenizer} has 320 pieces, the model's vocabulary {rows}: more rows"
    assert (warning in capsys.readouterr().err) == (rows == 320 + 1024)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_shard_holds_the_embedding_under_both_names_once(family: str, tokenizer: Path, tmp_path: Path) -> None:
    """The vocabulary-split name and the one of InternEvo 0.3.13 to 0.5.2 and later: one of them is found by each."""
    full = build(tmp_path / "a", family)
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer, "--dtype", "float32")
    revert(family, tmp_path / "hf", tmp_path / "both", 1, "--verify")
    revert(family, tmp_path / "hf", tmp_path / "hidden", 1, "--embed_split")
    both, hidden = (shards(tmp_path / name)["model_tp0_pp0.pt"] for name in ("both", "hidden"))
    stem = {"internlm": "embedding", "internlm2": "tok_embeddings"}[family]
    assert both.keys() == hidden.keys() | {f"{stem}.word_embeddings.weight"}
    assert_same({name: both[name] for name in hidden}, hidden)
    assert both[f"{stem}.weight"].data_ptr() == both[f"{stem}.word_embeddings.weight"].data_ptr()
    sizes = [(tmp_path / name / "model_tp0_pp0.pt").stat().st_size for name in ("both", "hidden")]
    assert sizes[0] < sizes[1] + 1024
    convert(family, tmp_path / "both", tmp_path / "again", tokenizer, "--dtype", "float32")
    assert_same(weights(tmp_path / "again"), full)


# ------------------------------------------------------------------------------------------------ the run that loads it

RUNS: list[dict[str, Any]] = [
    {"tp": 2, "pp": 2},
    {"tp": 2, "pp": 3},
    {"pp": 2, "chunks": 2},
    {"tp": 2, "pp": 2, "chunks": 2, "embedding": "vocabulary"},
    {"wp": 1},
    {"wp": 4},
    {"wp": 4, "fused_mlp": True},
    {"tp": 2, "wp": 4},
    {"tp": 2, "wp": 2, "pp": 2, "chunks": 2, "fused_mlp": True},
    {"tp": 2, "wp": 1, "pp": 4},
    {"wp": 2, "isp_2025": True, "pp": 2},
    {"wp": 8, "isp_2025": True, "fused_mlp": True},
    {"wp": 16, "pp": 2},
]


@pytest.mark.parametrize("choices", RUNS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_run_gets_the_shards_that_it_saves(
    family: str, bias: bool, choices: dict[str, Any], tokenizer: Path, tmp_path: Path
) -> None:
    """What training saves goes round and is the same to the bit: sizes of all groups, chunks, split, fusion."""
    versions = [{"mlp_version": v} for v in ((2,) if "fused_mlp" in choices else (1, 2))]
    for number, more in enumerate(versions if family == "internlm" else [{}]):
        here = tmp_path / str(number)
        full = build(here / "a", family, bias=bias, **choices, **more)
        convert(family, here / "a", here / "hf", tokenizer, "--dtype", "float32")
        assert_same(weights(here / "hf"), full)
        flags = run_flags({**choices, **more})
        revert(family, here / "hf", here / "back", choices.get("tp", 1), *flags, "--verify")
        before, after = shards(here / "a"), shards(here / "back")
        assert before.keys() == after.keys()
        for name in before:
            assert_same(after[name], before[name])
        assert torch.load(here / "back" / "model_config.pt")["num_chunks"] == choices.get("chunks", 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pp_size", "5"], ["4 layers", "--pp_size 5"]),
        (["--pp_size", "2", "--num_chunks", "3"], ["4 layers", "3 chunks"]),
        (["--num_chunks", "2"], ["--num_chunks 2", "--pp_size"]),
        (["--wp_size", "3"], ["3 weight-parallel ranks"]),
        (["--wp_size", "2", "--tp_size", "4"], ["--tp_size 4", "2 key/value heads"]),
    ],
)
def test_runs_that_cannot_be_are_refused(
    flags: list[str], words: list[str], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "a", "internlm2")
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer)
    assert_revert_refused("internlm2", tmp_path / "hf", words, capsys, *flags)


@pytest.mark.parametrize(
    ("family", "tp", "change", "words"),
    [
        ("internlm2", 3, {}, ["3", "key/value heads"]),
        ("internlm2", 4, {}, ["4", "key/value heads"]),
        ("internlm", 3, {}, ["3", "divide"]),
        ("internlm2", 1, {"intermediate_size": 300}, ["w1", "[300, 32]", "[256, 32]"]),
        ("internlm2", 1, {"num_hidden_layers": 7}, ["layers.4", "lacks"]),
        ("internlm2", 1, {"rope_theta": 5}, ["contradict", "10000"]),
        ("internlm2", 1, {"model_type": "mistral"}, ["mistral", "internlm2", "llama"]),
    ],
)
def test_what_cannot_be_reverted_is_refused_in_a_sentence(
    family: str,
    tp: int,
    change: dict[str, Any],
    words: list[str],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build(tmp_path / "a", family)
    convert(family, tmp_path / "a", tmp_path / "hf", tokenizer)
    change_settings(tmp_path / "hf", change)
    assert_revert_refused(family, tmp_path / "hf", words, capsys, tp=tp)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "hf"]


def test_an_intermediate_size_that_training_would_round_is_told_of(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "a", "internlm2", shape=Shape(layers=2, intermediate=384))
    convert("internlm2", tmp_path / "a", tmp_path / "hf", tokenizer)
    revert("internlm2", tmp_path / "hf", tmp_path / "back", 1)
    assert read_plain_dict(tmp_path / "back" / "model_config.pt")["multiple_of"] == 128
    message = capsys.readouterr().err
    assert "384" in message
    assert "512" in message


def test_a_lack_of_memory_that_says_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise MemoryError

    assert _status(action) == 1
    assert "error: memory ran out. Nothing was written" in capsys.readouterr().err
