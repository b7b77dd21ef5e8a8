"""What other tools read from a folder: raw JSON keys, file names, and names of modules and tensors.

Each reader below takes what one tool takes from config.json, with that tool's defaults for what is missing, so a
folder is right for a tool when its reader finds the model's true settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.checkpoints import build
from tests.support.conversions import convert
from tests.support.model_families import FAMILIES, INTERNLM, INTERNLM2, Family
from tests.support.tokenizer_fixture import train_tokenizer

Raw = dict[str, Any]

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)


class Settings(NamedTuple):
    """What a tool makes of config.json. `scaling` is ("dynamic", factor), or None."""

    theta: float
    scaling: tuple[str, float] | None
    bias: bool
    kv_heads: int
    tied: bool


# ------------------------------------------------------------------------------------------------------- folders

THETA, FACTOR = 1000000, 2.0
BIAS = {INTERNLM: True, INTERNLM2: False}


class Saved(NamedTuple):
    """A folder, its family and its true settings."""

    folder: Path
    family: Family
    settings: Settings

    def raw(self, name: str = "config.json") -> Raw:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def converted(family: Family, rope: str, folder: Path) -> Path:
    """What the conversion script writes."""
    build(folder / "training", family.name, tp=2, bias=BIAS[family], config={"rope_base": THETA}, dtype=torch.bfloat16)
    tokenizer = train_tokenizer(folder / "tokenizer.model")
    flags = ["--rotary_type", rope, "--scaling_factor", "2"]
    convert(family.name, folder / "training", folder / "hf", tokenizer, *flags)
    return folder / "hf"


def loaded_and_saved(family: Family, rope: str, folder: Path) -> Path:
    """What save_pretrained writes of it."""
    source = converted(family, rope, folder)
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        settings = {"dtype": "auto"} if auto is AutoModelForCausalLM else {}
        auto.from_pretrained(source, trust_remote_code=True, **settings).save_pretrained(folder / "again")
    return folder / "again"


def built_and_saved(family: Family, rope: str, folder: Path) -> Path:
    """What save_pretrained writes of a model made in Python, its rotary factor an int."""
    scaling = {"type": "dynamic", "factor": 2} if rope == "dynamic" else {"rope_type": "default"}
    golden = {key: value for key, value in family.golden.config().items() if key not in ("rotary", "rope_scaling")}
    settings = golden | {"rope_theta": THETA, "rope_scaling": scaling, "bias": BIAS[family], "dtype": "bfloat16"}
    family.cls("ForCausalLM")(family.cls("Config")(**settings)).bfloat16().save_pretrained(folder / "built")
    return folder / "built"


WAYS: dict[str, Callable[[Family, str, Path], Path]] = {
    "converted": converted,
    "loaded and saved": loaded_and_saved,
    "built and saved": built_and_saved,
}


@pytest.fixture(
    scope="module",
    params=[(family, way, rope) for family in FAMILIES for way in WAYS for rope in ("origin", "dynamic")],
    ids=lambda param: " ".join(map(str, param)),
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    family, way, rope = request.param
    folder = WAYS[way](family, rope, tmp_path_factory.mktemp("consumers"))
    scaling = ("dynamic", FACTOR) if rope == "dynamic" else None
    return Saved(folder, family, Settings(THETA, scaling, BIAS[family], 4 if family is INTERNLM else 2, False))


# ------------------------------------------------------------------------------------------------------- readers


def kind_of(rope: Raw) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def scaling_of(rope: Raw | None) -> tuple[str, float] | None:
    return None if not rope or kind_of(rope) == "default" else (kind_of(rope), rope["factor"])


def transformers_4(raw: Raw) -> Settings:
    """Also lmdeploy, SGLang, TensorRT-LLM and ExLlamaV2 of that time: the legacy keys, two of them in rope_scaling."""
    scaling = raw["rope_scaling"]
    if scaling is not None:
        assert set(scaling) == {"type", "factor"}
        assert type(scaling["factor"]) is float
    return Settings(
        raw["rope_theta"], scaling_of(scaling), raw["bias"], raw["num_key_value_heads"], raw["tie_word_embeddings"]
    )


def transformers_5(raw: Raw) -> Settings:
    """Also vLLM: everything about the rotary embedding in one dict."""
    rope = raw["rope_parameters"]
    return Settings(
        rope["rope_theta"], scaling_of(rope), raw["bias"], raw["num_key_value_heads"], raw["tie_word_embeddings"]
    )


def llama_cpp(raw: Raw) -> Settings:
    """rope_parameters before rope_scaling, `type` taken for `rope_type`, a theta outside the dict taken into it."""
    rope = {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_parameters") or raw.get("rope_scaling") or {})}
    return Settings(rope["rope_theta"], scaling_of(rope), raw["bias"], raw["num_key_value_heads"], False)


def lmdeploy(raw: Raw) -> Settings:
    """A rope_parameters without a theta in it means 10000; `bias` has no default."""
    if "rope_parameters" in raw:
        theta, rope = raw["rope_parameters"].get("rope_theta", 10000), raw["rope_parameters"]
    else:
        theta, rope = raw["rope_theta"], raw["rope_scaling"]
    return Settings(theta, scaling_of(rope), raw["bias"], raw["num_key_value_heads"], raw["tie_word_embeddings"])


def mlx_lm(raw: Raw) -> Settings:
    """Legacy keys with defaults (bias!), rope_parameters unknown; rope_scaling must have "type" and "factor"."""
    scaling = raw.get("rope_scaling")
    if scaling:
        assert {"type", "factor"} <= set(scaling)
        assert scaling["type"] in ("linear", "dynamic")
    return Settings(
        raw.get("rope_theta", 10000),
        (scaling["type"], scaling["factor"]) if scaling else None,
        raw.get("bias", True),
        raw.get("num_key_value_heads", raw["num_attention_heads"]),
        raw.get("tie_word_embeddings", False),
    )


def published_internlm(raw: Raw) -> Settings:
    """The published InternLM code: `rotary`, dynamic where it is missing."""
    rotary = raw.get("rotary", {"base": 10000, "type": "dynamic"})
    scaling = ("dynamic", rotary.get("scaling_factor", 1.0)) if rotary["type"] == "dynamic" else None
    return Settings(rotary["base"], scaling, raw["bias"], raw["num_attention_heads"], raw["tie_word_embeddings"])


# --------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("reader", [transformers_4, transformers_5, llama_cpp, lmdeploy, mlx_lm])
def test_every_reader_finds_the_models_settings(saved: Saved, reader: Callable[[Raw], Settings]) -> None:
    assert reader(saved.raw()) == saved.settings


def test_the_published_internlm_code_finds_them(saved: Saved) -> None:
    if saved.family is INTERNLM:
        assert published_internlm(saved.raw()) == saved.settings
    else:
        assert "rotary" not in saved.raw()


def test_sizes_and_names_are_explicit_and_of_the_right_type(saved: Saved) -> None:
    raw, family = saved.raw(), saved.family
    sizes = {key: raw[key] for key in SIZES}
    assert {type(size) for size in sizes.values()} == {int}
    assert type(raw["rms_norm_eps"]) is float
    assert {type(raw[key]) for key in ("bias", "tie_word_embeddings", "use_cache")} == {bool}
    assert raw["hidden_act"] == "silu"
    assert raw["model_type"] == family.name
    assert raw["architectures"] == [f"{family.prefix}ForCausalLM"]
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    assert raw["attn_implementation"] == "eager"
    assert raw["bos_token_id"] == 1
    assert raw["eos_token_id"] == 2
    assert type(raw["pad_token_id"]) is int


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def test_auto_map_names_classes_in_files_beside_it(saved: Saved) -> None:
    auto_map = saved.raw()["auto_map"]
    heads = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    assert set(auto_map) == {"AutoConfig", "AutoModel", *(f"AutoModelFor{head}" for head in heads)}
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (saved.folder / f"{module}.py").read_text(encoding="utf-8")


def test_vocab_size_is_the_number_of_rows(saved: Saved) -> None:
    weights, names = load_file(saved.folder / "model.safetensors"), TENSORS[saved.family.name]
    assert weights[names["embedding"]].shape[0] == weights[names["head"]].shape[0] == saved.raw()["vocab_size"]
    assert any(name.endswith(".bias") for name in weights) is saved.raw()["bias"]


# ---------------------------------------------------------------------------------------------- names that tools use

TENSORS = {
    "internlm": {
        "embedding": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        "norm": "model.norm.weight",
        "layer": (
            *(f"self_attn.{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias")),
            *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        ),
    },
    "internlm2": {
        "embedding": "model.tok_embeddings.weight",
        "head": "output.weight",
        "norm": "model.norm.weight",
        "layer": (
            "attention.wqkv.weight",
            "attention.wo.weight",
            *(f"feed_forward.{x}.weight" for x in ("w1", "w2", "w3")),
            "attention_norm.weight",
            "ffn_norm.weight",
        ),
    },
}


def test_tensor_names_are_the_published_ones(saved: Saved) -> None:
    names = TENSORS[saved.family.name]
    layers = range(saved.raw()["num_hidden_layers"])
    expected = {f"model.layers.{layer}.{name}" for layer in layers for name in names["layer"]}
    assert set(load_file(saved.folder / "model.safetensors")) == expected | {
        names["embedding"],
        names["head"],
        names["norm"],
    }


@over_families
def test_module_and_class_names_are_the_published_ones(family: Family) -> None:
    """AutoAWQ, GPTQ, xtuner and LoRA settings find modules by these names."""
    model = family.model()
    classes = {
        "internlm": ("InternLMDecoderLayer", "InternLMAttention", "InternLMMLP", "InternLMRMSNorm"),
        "internlm2": ("InternLM2DecoderLayer", "InternLM2Attention", "InternLM2MLP", "InternLM2RMSNorm"),
    }[family.name]
    layer = model.model.layers[0]
    children = dict(layer.named_children())
    attention, mlp = ("self_attn", "mlp") if family is INTERNLM else ("attention", "feed_forward")
    norms = ("input_layernorm", "post_attention_layernorm") if family is INTERNLM else ("attention_norm", "ffn_norm")
    assert set(children) == {attention, mlp, *norms}
    found = (layer, children[attention], children[mlp], children[norms[0]])
    assert tuple(type(module).__name__ for module in found) == classes
    assert type(model.model).__name__ == f"{family.prefix}Model"
    assert set(model._no_split_modules) == {classes[0]}


# ------------------------------------------------------------------------------------------------- files beside them


def test_tokenizer_files_are_all_there(saved: Saved) -> None:
    if saved.folder.name == "built":
        pytest.skip("a model alone has no tokenizer")
    files = {path.name for path in saved.folder.iterdir()}
    assert {
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        f"tokenization_{saved.family.name}.py",
    } <= files
    config = saved.raw("tokenizer_config.json")
    assert config["auto_map"]["AutoTokenizer"] == [
        f"tokenization_{saved.family.name}.{saved.family.prefix}Tokenizer",
        f"tokenization_{saved.family.name}_fast.{saved.family.prefix}TokenizerFast",
    ]
    assert config["tokenizer_class"] == f"{saved.family.prefix}Tokenizer"
    contents = {index: token["content"] for index, token in config["added_tokens_decoder"].items()}
    assert contents == {"0": "<unk>", "1": "<s>", "2": "</s>"}
    assert config["add_bos_token"] is True
    assert config["add_eos_token"] is False


def test_generation_config_ends_where_the_model_ends(saved: Saved) -> None:
    raw = saved.raw("generation_config.json")
    assert raw["bos_token_id"] == 1
    assert raw["eos_token_id"] in (2, [2])


@over_families
def test_a_saved_tokenizer_has_a_tokenizer_json_that_is_true_of_it(family: Family, tmp_path: Path) -> None:
    source = converted(family, "origin", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    tokenizer.save_pretrained(tmp_path / "same")
    assert ids_of_file(tmp_path / "same", "one<new>") == tokenizer("one<new>")["input_ids"]
    tokenizer.save_pretrained(source)  # onto itself
    assert (tmp_path / "same/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "more")
    assert len(tokenizer) - 1 in ids_of_file(tmp_path / "more", "one<new>")
    assert ids_of_file(tmp_path / "more", "one<new>") == tokenizer("one<new>")["input_ids"]
    ended = AutoTokenizer.from_pretrained(source, trust_remote_code=True, add_eos_token=True)
    ended.save_pretrained(tmp_path / "ended")
    assert ids_of_file(tmp_path / "ended", "one") == ended("one")["input_ids"]
    assert ended("one")["input_ids"][-1] == 2


def ids_of_file(folder: Path, text: str) -> list[int]:
    """What readers without our code make of a text."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
