"""config.json: what is read, what is refused, and what every reader finds in what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from tests.support.model_families import FAMILIES, INTERNLM, INTERNLM2, Family

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)

DYNAMIC = {"type": "dynamic", "factor": 2.0}

# Ways to write base 1000000 with dynamic scaling by 2.
SPELLINGS: list[dict[str, Any]] = [
    {"rope_theta": 1000000, "rope_scaling": DYNAMIC},
    {"rope_theta": 1e6, "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
    {"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000}},
    {"rope_theta": 1000000, "rope_parameters": {"type": "dynamic", "factor": 2.0}},
    {
        "rope_theta": 1000000,
        "rope_scaling": DYNAMIC,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000},
    },
]
ROTARY_SPELLINGS: list[dict[str, Any]] = [
    {"rotary": {"base": 1000000, "type": "dynamic", "scaling_factor": 2.0}},
    {
        "rotary": {"base": 1000000, "type": "dynamic", "scaling_factor": 2},
        "rope_theta": 1000000,
        "rope_scaling": DYNAMIC,
    },
    {"rotary": {"base": 1000000, "type": "dynamic"}, "rope_scaling": DYNAMIC},
]


def saved(config: Any, folder: Path) -> dict[str, Any]:
    """The raw contents of the config.json that `config` writes."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "spelling"),
    [(family, spelling) for family in FAMILIES for spelling in SPELLINGS]
    + [(INTERNLM, spelling) for spelling in ROTARY_SPELLINGS],
    ids=str,
)
def test_every_spelling_of_the_rotary_setting_is_read(family: Family, spelling: dict[str, Any]) -> None:
    assert family.cls("Config")(**spelling).rope() == (1000000, "dynamic", 2)


@over_families
def test_linear_scaling_is_read(family: Family) -> None:
    config = family.cls("Config")(rope_scaling={"type": "linear", "factor": 4.0})
    assert config.rope() == (10000, "linear", 4.0)


def test_defaults() -> None:
    assert INTERNLM2.cls("Config")().rope() == (10000, "origin", 1.0)
    assert INTERNLM2.cls("Config")(rope_scaling=None, rope_parameters={"rope_type": "default"}).rope().type == "origin"
    # The first generation's published configs scale dynamically, by a factor they do not name.
    assert INTERNLM.cls("Config")().rope() == (10000, "dynamic", 1.0)
    assert INTERNLM.cls("Config")(rotary={"base": 10000, "type": "dynamic"}).rope() == (10000, "dynamic", 1.0)
    assert INTERNLM.cls("Config")(rotary={"base": 10000, "type": "origin"}).rope() == (10000, "origin", 1.0)
    for family in FAMILIES:
        config = family.cls("Config")()
        assert config.bias is True
        assert config.tie_word_embeddings is False
        assert config.attn_implementation == "eager"


CONTRADICTIONS: list[dict[str, Any]] = [
    {"rope_theta": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000}},
    {"rope_scaling": DYNAMIC, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": DYNAMIC, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0}},
    {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.0}},
]
ROTARY_CONTRADICTIONS: list[dict[str, Any]] = [
    {"rotary": {"base": 10000, "type": "dynamic"}, "rope_theta": 1000000},
    {"rotary": {"base": 10000, "type": "origin"}, "rope_scaling": DYNAMIC},
    {"rotary": {"base": 10000, "type": "dynamic", "scaling_factor": 1.0}, "rope_scaling": DYNAMIC},
    {"rotary": {"base": 10000, "type": "dynamic"}, "rope_parameters": {"rope_type": "default"}},
]


@pytest.mark.parametrize(
    ("family", "spelling"),
    [(family, spelling) for family in FAMILIES for spelling in CONTRADICTIONS]
    + [(INTERNLM, spelling) for spelling in ROTARY_CONTRADICTIONS],
    ids=str,
)
def test_contradicting_spellings_are_refused(family: Family, spelling: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stated twice and differently: .* Make them agree or remove one"):
        family.cls("Config")(**spelling)


@over_families
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'; .* knows default, origin, linear, dynamic"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "needs a factor of at least 1, not 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "needs a factor of at least 1, not '2'"),
        ({"rope_scaling": "dynamic"}, "rope_scaling must be a dict or None"),
        ({"hidden_size": 100, "num_attention_heads": 3}, r"hidden_size \(100\) must be a multiple"),
    ],
)
def test_unfit_settings_are_refused(family: Family, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family.cls("Config")(**settings)


def test_key_value_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of num_key_value_heads \(3\)"):
        INTERNLM2.cls("Config")(num_attention_heads=32, num_key_value_heads=3)
    with pytest.raises(ValueError, match="num_key_value_heads is 8"):
        INTERNLM.cls("Config")(num_attention_heads=32, num_key_value_heads=8)


def test_internlm2_scaling_needs_its_factor() -> None:
    with pytest.raises(ValueError, match="needs a factor"):
        INTERNLM2.cls("Config")(rope_scaling={"type": "dynamic"})


@over_families
def test_settings_can_be_assigned(family: Family) -> None:
    config = family.config("origin")
    config.rope_scaling = DYNAMIC
    assert config.rope() == (10000, "dynamic", 2.0)
    config.rope_theta = 500000
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 500000, "factor": 2.0}
    config.rope_scaling = None
    assert config.rope() == (500000, "origin", 1.0)
    config.rope_parameters = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000}
    assert config.rope_scaling == {"type": "linear", "factor": 3.0}
    config.rope_parameters["rope_theta"] = 7  # a copy: the setting has one place
    assert config.rope_theta == 10000


def test_rotary_can_be_assigned() -> None:
    config = INTERNLM.config("origin")
    config.rotary = {"type": "dynamic", "scaling_factor": 4.0}
    assert config.rotary == {"base": 10000, "type": "dynamic", "scaling_factor": 4.0}
    assert config.rope_scaling == {"type": "dynamic", "factor": 4.0}


@over_families
@pytest.mark.parametrize("rope", ["origin", "dynamic"])
def test_raw_json_suits_every_reader(family: Family, rope: str, tmp_path: Path) -> None:
    config = family.config(rope, dtype="bfloat16", architectures=[f"{family.prefix}ForCausalLM"])
    raw = saved(config, tmp_path)
    scaled = rope == "dynamic"
    assert raw["rope_theta"] == 10000
    assert raw["rope_scaling"] == (DYNAMIC if scaled else None)
    assert raw["rope_parameters"] == (
        {"rope_theta": 10000, "rope_type": "dynamic", "factor": 2.0}
        if scaled
        else {"rope_theta": 10000, "rope_type": "default"}
    )
    assert raw["torch_dtype"] == raw["dtype"] == "bfloat16"
    assert raw["bias"] is True
    assert raw["tie_word_embeddings"] is False
    assert raw["num_key_value_heads"] == (2 if family is INTERNLM2 else 4)
    assert raw["hidden_act"] == "silu"
    assert raw["attn_implementation"] == "eager"
    assert (raw["pad_token_id"], raw["bos_token_id"], raw["eos_token_id"]) == (0, 1, 2)
    assert raw["model_type"] == family.name
    assert raw["architectures"] == [f"{family.prefix}ForCausalLM"]
    assert raw["auto_map"] == {
        "AutoConfig": f"configuration_{family.name}.{family.prefix}Config",
        "AutoModel": f"modeling_{family.name}.{family.prefix}ForCausalLM",
        "AutoModelForCausalLM": f"modeling_{family.name}.{family.prefix}ForCausalLM",
        "AutoModelForSequenceClassification": f"modeling_{family.name}.{family.prefix}ForSequenceClassification",
    }
    if family is INTERNLM:
        expected = {"base": 10000, "type": rope} | ({"scaling_factor": 2.0} if scaled else {})
        assert raw["rotary"] == expected
    assert not [key for key in raw if key.startswith("_")]


@over_families
@settings(max_examples=25, deadline=None)
@given(
    theta=st.integers(1, 10**8),
    scaling=st.none() | st.tuples(st.sampled_from(["linear", "dynamic"]), st.floats(1, 64)),
    bias=st.booleans(),
    tied=st.booleans(),
    backend=st.sampled_from(["eager", "sdpa", "flash_attention_2"]),
    dtype=st.sampled_from([None, "float32", "bfloat16"]),
)
def test_saved_is_read_back_the_same(
    family: Family,
    tmp_path_factory: Any,
    theta: int,
    scaling: tuple[str, float] | None,
    bias: bool,
    tied: bool,
    backend: str,
    dtype: str | None,
) -> None:
    folder = tmp_path_factory.mktemp("config")
    overrides: dict[str, Any] = {"rotary": None} if family is INTERNLM else {}
    kind, factor = scaling or ("default", None)
    overrides["rope_scaling"] = {"type": kind} | ({"factor": factor} if scaling else {})
    config = family.config(
        **overrides, rope_theta=theta, bias=bias, tie_word_embeddings=tied, attn_implementation=backend, dtype=dtype
    )
    raw = saved(config, folder)
    again = family.cls("Config").from_pretrained(folder)
    assert again.rope() == config.rope()
    assert again.attn_implementation == backend
    assert again.dtype == config.dtype
    assert saved(again, folder) == raw


@over_families
def test_arguments_of_from_pretrained_override_the_file(family: Family, tmp_path: Path) -> None:
    family.config("origin").save_pretrained(tmp_path)
    config = family.cls("Config").from_pretrained(tmp_path, rope_scaling=DYNAMIC, rope_theta=500000)
    assert config.rope() == (500000, "dynamic", 2.0)


@over_families
def test_auto_config_reads_the_folder_alone(family: Family, tmp_path: Path) -> None:
    family.config("dynamic").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(config).__name__ == f"{family.prefix}Config"
    assert type(config) is not family.cls("Config")
    assert config.rope() == (10000, "dynamic", 2.0)
