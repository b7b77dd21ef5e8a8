"""--format llama: the same model as transformers' own LlamaForCausalLM, without remote code, and back to the shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

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
    settings,
    shards,
    weights,
)
from tests.support.real_tokenizers import golden_cases, real_model
from weight_conversion.mapping.families import FAMILIES as MAPPED

LLAMA = ("--format", "llama", "--dtype", "float32")
LENGTHS = (33, 48, 7, 40)  # Llama keeps the base of the longest until one is within the trained length


def loaded(folder: Path) -> Any:
    """The model as a Llama, without remote code; every tensor of the folder is in it."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert type(model) is LlamaForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


# ---------------------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("source", real_checkpoints())
def test_logits_are_those_of_the_training_model(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    family, tp, flags = names_of(source)
    convert(family, source, tmp_path / "llama", tokenizer, *LLAMA, "--verify")
    record = torch.load(source / "expected_logits.pt")
    with torch.no_grad():
        logits = loaded(tmp_path / "llama")(record["input_ids"]).logits
    torch.testing.assert_close(logits, record["logits"], atol=1e-4, rtol=0)

    revert(family, tmp_path / "llama", tmp_path / "back", tp, *flags, "--verify")
    convert(family, source, tmp_path / "own", tokenizer, "--dtype", "float32")
    convert(family, tmp_path / "back", tmp_path / "again", tokenizer, "--dtype", "float32")
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "own"))
    if not any(word in source.name for word in ("pp2", "adapt0", "isp")):  # one stage, rows in halves
        before, after = shards(source), shards(tmp_path / "back")
        assert before.keys() == after.keys()
        for name in before:
            assert_same(after[name], before[name])


@pytest.mark.parametrize("rotary", ["origin", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_family_s_own_class(
    family: str, rotary: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sequence at a time, also beyond the trained length, with a trained base of its own; a warning says so."""
    build(tmp_path / "a", family, tp=2, bias=True, config={"rope_base": 1000000})
    flags = ["--rotary_type", rotary, "--scaling_factor", "3", "--max_pos", "32"]
    warning = (
        "warning: beyond 32 tokens, dynamic NTK scaling of a Llama is that of this model for one sequence at a time"
    )
    convert(family, tmp_path / "a", tmp_path / "own", tokenizer, "--dtype", "float32", *flags)
    assert warning not in capsys.readouterr().err
    convert(family, tmp_path / "a", tmp_path / "llama", tokenizer, *LLAMA, *flags)
    assert (warning in capsys.readouterr().err) is (rotary == "dynamic")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_remote_code=True).eval()
    llama = loaded(tmp_path / "llama")
    for length in LENGTHS:
        ids = torch.randint(3, 320, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            found, expected = llama(ids).logits, own(ids).logits  # of weights that are not small: of size 20
        assert (found - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize(("family", "choices"), LAYOUTS, ids=lambda value: str(value))
def test_every_layout_gives_the_same_model(
    family: str, choices: dict[str, Any], tokenizer: Path, tmp_path: Path
) -> None:
    full = build(tmp_path / "a", family, **choices)
    convert(family, tmp_path / "a", tmp_path / "llama", tokenizer, *LLAMA, "--verify")
    revert(family, tmp_path / "llama", tmp_path / "back", 2)
    convert(family, tmp_path / "back", tmp_path / "own", tokenizer, "--dtype", "float32")
    assert_same(weights(tmp_path / "own"), full)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_revert_of_convert_gives_the_shards(family: str, tp: int, bias: bool, tokenizer: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", family, shape=EIGHT_HEADS[family], tp=tp, bias=bias, dtype=torch.bfloat16)
    convert(family, tmp_path / "a", tmp_path / "llama", tokenizer, "--format", "llama")
    revert(family, tmp_path / "llama", tmp_path / "back", tp, "--embed_split")
    before, after = shards(tmp_path / "a"), shards(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        assert_same(after[name], before[name])


def test_a_normalised_head_is_written_normalised(tokenizer: Path, tmp_path: Path) -> None:
    full = build(tmp_path / "a", "internlm2", norm_head=True)
    convert("internlm2", tmp_path / "a", tmp_path / "llama", tokenizer, *LLAMA, "--verify")
    assert torch.equal(weights(tmp_path / "llama")["lm_head.weight"], full["output.weight"])


# --------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("rotary", ["origin", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_one_of_save_pretrained(family: str, rotary: str, tokenizer: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", family, tp=2, bias=True)
    flags = ["--format", "llama", "--max_shard", "100KB", "--rotary_type", rotary, "--scaling_factor", "2"]
    convert(family, tmp_path / "a", tmp_path / "llama", tokenizer, *flags)
    loaded(tmp_path / "llama").save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert_files_are_those_of(tmp_path / "saved", tmp_path / "llama")
    written, by_transformers = settings(tmp_path / "llama"), settings(tmp_path / "saved")
    by_transformers.pop("transformers_version")
    for rope, name in (("rope_parameters", "type"), ("rope_scaling", "rope_type")):  # the other's name, added
        (by_transformers.get(rope) or {}).pop(name, None)
    assert not {key: (value, written.get(key)) for key, value in by_transformers.items() if written.get(key) != value}
    older = {"rope_theta", "rope_scaling", "torch_dtype"}  # what readers before transformers 5 look for
    assert written.keys() - by_transformers.keys() <= older | {"head_dim", "pretraining_tp"}
    revert(family, tmp_path / "saved", tmp_path / "back", 2)  # a folder that transformers saved, as after training
    revert(family, tmp_path / "llama", tmp_path / "straight", 2)
    for name, state in shards(tmp_path / "straight").items():
        assert_same(shards(tmp_path / "back")[name], state)
    configs = [torch.load(tmp_path / folder / "model_config.pt") for folder in ("straight", "back")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_asks_for_remote_code(family: str, tokenizer: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", family)
    convert(family, tmp_path / "a", tmp_path / "llama.1", tokenizer, *LLAMA)
    assert not list((tmp_path / "llama.1").glob("*.py"))
    for path in (tmp_path / "llama.1").glob("*.json"):
        assert "auto_map" not in path.read_text(encoding="utf-8")
    written = AutoTokenizer.from_pretrained(tmp_path / "llama.1")
    text = "the  river,\n 天上有云 🙂"
    assert written.decode(written(text).input_ids, skip_special_tokens=True) == text
    assert written(text).input_ids[0] == 1
    ids = written("the river", return_tensors="pt")
    assert loaded(tmp_path / "llama.1").generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > 3


@pytest.mark.parametrize("chat", [False, True], ids=["base", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_real_tokens_are_the_recorded_ones(family: str, chat: bool, tmp_path: Path) -> None:
    model = real_model(family)
    names = {"internlm": Shape(layers=1, kv_heads=4, vocab=103168), "internlm2": Shape(layers=1, vocab=92544)}
    build(tmp_path / "a", family, shape=names[family])
    convert(family, tmp_path / "a", tmp_path / "llama", model, *LLAMA, *(["--chat"] if chat else []))
    written = AutoTokenizer.from_pretrained(tmp_path / "llama")
    cases = golden_cases("internlm2_chat" if chat and family == "internlm2" else family)
    assert len(cases) >= 10
    for case in cases:
        assert written(case["text"]).input_ids == case["ids"], case["text"]
    spec = MAPPED[family].tokenizer
    generation = json.loads((tmp_path / "llama" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == spec.eos_token_ids(chat)
    if chat:
        messages = [{"role": "user", "content": "Hello  there"}]
        prompt = written.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert "Hello  there" in prompt
        assert spec.end_of_turn in prompt or "<eoh>" in prompt


# ------------------------------------------------------------------------------------------------------------ refused


def test_a_tokenizer_that_has_no_fast_form_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sentencepiece

    lines = iter(["the river runs under the old stone bridge", "ten trains leave the northern station"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(tmp_path / "rewriting"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    build(tmp_path / "a", "internlm2")
    message = convert_refusal("internlm2", tmp_path / "a", tmp_path / "rewriting.model", capsys, *LLAMA)
    assert "no tokenizer that loads without remote code" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp_bias": True}, ["mlp_bias", "True"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "True"]),
        ({"attention_bias": True}, ["attention_bias", "none of the biases"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"head_dim": 64}, ["head_dim", "64"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"auto_map": {"AutoModel": "x.Y"}}, ["auto_map"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling", "yarn"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["rope_parameters", "llama3"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5}},
            ["rope_parameters", "partial_rotary_factor"],
        ),
        ({"sliding_window": 4096}, ["sliding_window", "4096"]),
        ({"model_type": "mistral"}, ["mistral", "internlm2", "llama"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_llama_that_is_no_internlm2_is_refused_by_name(
    change: dict[str, Any], words: list[str], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "a", "internlm2")
    convert("internlm2", tmp_path / "a", tmp_path / "llama", tokenizer, *LLAMA)
    change_settings(tmp_path / "llama", change)
    assert_revert_refused("internlm2", tmp_path / "llama", words, capsys)


@pytest.mark.parametrize("family", ["internlm", "internlm2"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"head_dim": 64}, ["head_dim", "64"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"bias": True}, ["bias is True", "none of the biases"]),
        ({"sliding_window": 4096}, ["sliding_window", "4096"]),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"attention_chunk_size": 64}, ["attention_chunk_size", "64"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, ["rope_parameters", "full_attention"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "beta_fast": 32}}, ["rope_scaling", "beta_fast"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "transformers 4", "false to keep"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_folder_of_its_own_class_that_training_computes_otherwise_is_refused_by_name(
    family: str,
    change: dict[str, Any],
    words: list[str],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build(tmp_path / "a", family)
    convert(family, tmp_path / "a", tmp_path / "llama", tokenizer)
    change_settings(tmp_path / "llama", change)
    assert_revert_refused(family, tmp_path / "llama", words, capsys)


@pytest.mark.parametrize("form", ["internlm", "llama"])
def test_shared_key_value_heads_are_refused_for_internlm(
    form: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "a", "internlm2")
    convert("internlm2", tmp_path / "a", tmp_path / "llama", tokenizer, *LLAMA)
    change_settings(tmp_path / "llama", {"model_type": form})
    assert_revert_refused("internlm", tmp_path / "llama", ["share 2 key/value heads", "InternLM2"], capsys)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.bias", "score.weight"])
def test_a_tensor_that_the_family_has_not_is_refused(
    name: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    build(tmp_path / "a", "internlm2", bias=True)
    convert("internlm2", tmp_path / "a", tmp_path / "llama", tokenizer, *LLAMA)
    save_file(weights(tmp_path / "llama") | {name: torch.zeros(256)}, tmp_path / "llama" / "model.safetensors")
    assert_revert_refused("internlm2", tmp_path / "llama", [name, "not expected"], capsys)
