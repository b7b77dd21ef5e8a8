"""config.json: what is read, what is refused, and what every reader finds in what is written."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from tests.support.model_families import FAMILIES, INTERNLM, INTERNLM2, Family, tokens
from tests.support.rounding import assert_near

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
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            r"rope_scaling\['factor'\] is 0.5; .* needs a factor of at least 1",
        ),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'; .* knows default, origin"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3'; .* knows default, origin"),
        (
            {"rope_scaling": DYNAMIC | {"alpha": 8.0}},
            r"rope_scaling\['alpha'\] is 8.0, but .* would compute something else",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
            "factor is 2.0, but type 'origin' does no scaling",
        ),
        ({"rope_scaling": "dynamic"}, "rope_scaling must be a dict or None"),
        ({"hidden_size": 100, "num_attention_heads": 3}, r"hidden_size \(100\) must be a multiple"),
    ],
)
def test_unfit_settings_are_refused(family: Family, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family.cls("Config")(**settings)


NAN, INFINITY = float("nan"), float("inf")
BAD_NUMBERS = ["10000", "", True, 0, -1, 0.0, NAN, INFINITY, -INFINITY, [2.0], {}]


@over_families
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_a_rotary_number_that_is_none_is_refused_by_name(family: Family, value: Any, tmp_path: Path) -> None:
    spellings: dict[str, dict[str, Any]] = {
        r"config\['rope_theta'\]": {"rope_theta": value},
        r"rope_parameters\['rope_theta'\]": {"rope_parameters": {"rope_type": "default", "rope_theta": value}},
        r"rope_scaling\['factor'\]": {"rope_scaling": {"type": "dynamic", "factor": value}},
        "max_position_embeddings": {"max_position_embeddings": value},
    }
    if family is INTERNLM:
        spellings[r"rotary\['base'\]"] = {"rotary": {"base": value, "type": "dynamic"}}
        spellings[r"rotary\['scaling_factor'\]"] = {"rotary": {"type": "dynamic", "scaling_factor": value}}
    config = family.config("origin")
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for name, spelling in spellings.items():
        message = rf"{name} is .*; expected a (finite positive|positive whole) number"
        with pytest.raises(ValueError, match=message):
            family.cls("Config")(**spelling)
        (tmp_path / "config.json").write_text(json.dumps({**raw, **spelling}))  # as json writes them: NaN, Infinity
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
        for key, setting in spelling.items():
            with pytest.raises(ValueError, match=message):
                setattr(config, key, setting)
    assert config.rope() == (10000, "origin", 1.0)


NARROW = {"sliding_window": 4, "attention_chunk_size": 4, "layer_types": ["full_attention", "sliding_attention"]}


@over_families
@pytest.mark.parametrize("name", NARROW)
def test_a_window_that_only_a_cache_would_have_is_refused_by_name(family: Family, name: str, tmp_path: Path) -> None:
    """transformers' caches read these settings, and forget what the models see in one pass without a cache."""
    message = f"{name} is .*attends to every earlier token"
    with pytest.raises(ValueError, match=message):
        family.config(**{name: NARROW[name]})
    config = family.config("origin", layer_types=["full_attention"] * 3, sliding_window=None)
    with pytest.raises(ValueError, match=message):
        setattr(config, name, NARROW[name])
    file = tmp_path / "config.json"
    config.save_pretrained(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: NARROW[name]}))
    with pytest.raises(ValueError, match=message):
        family.cls("Config").from_pretrained(tmp_path)


@over_families
def test_edits_in_place_count(family: Family) -> None:
    config = family.config("dynamic")
    config.rope_scaling["factor"] = 4.0
    assert config.rope() == (10000, "dynamic", 4.0)
    config.rope_parameters["rope_theta"] = 500000
    config.rope_parameters.update(rope_type="linear", factor=3)
    assert config.rope() == (500000, "linear", 3.0)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 500000, "factor": 3.0}
    config.rope_scaling |= {"type": "dynamic"}
    assert config.rope_scaling.setdefault("factor", 8.0) == 3.0
    assert config.to_dict()["rope_parameters"] == {"rope_type": "dynamic", "rope_theta": 500000, "factor": 3.0}

    kept = copy.deepcopy(config.rope_scaling)
    for spelling in (kept, config.rope_scaling.copy(), pickle.loads(pickle.dumps(config.rope_scaling))):
        spelling["factor"] = 9.0
    assert config.rope() == (500000, "dynamic", 3.0)  # copies are copies
    other = copy.deepcopy(config)
    other.rope_scaling["factor"] = 5.0
    assert (config.rope().factor, other.rope().factor) == (3.0, 5.0)


@over_families
def test_edits_in_place_that_cannot_count_are_refused(family: Family) -> None:
    config = family.config("dynamic")
    for edit in (
        lambda d: d.pop("factor"),
        lambda d: d.clear(),
        lambda d: d.popitem(),
        lambda d: d.__delitem__("type"),
    ):
        with pytest.raises(TypeError, match=r"rope_scaling cannot be removed\. Assign all of it"):
            edit(config.rope_scaling)
    with pytest.raises(TypeError, match="cannot be removed"):
        config.rope_scaling["factor"] = None
    with pytest.raises(ValueError, match=r"rope_scaling\['factor'\] is 'x'"):
        config.rope_scaling["factor"] = "x"
    with pytest.raises(ValueError, match="'yarn'"):
        config.rope_parameters["rope_type"] = "yarn"
    assert config.rope() == (10000, "dynamic", 2.0)


@over_families
def test_an_unfinished_edit_is_refused_where_it_would_be_used(family: Family, tmp_path: Path) -> None:
    config = family.config("origin")
    config.rope_parameters["factor"] = 4.0
    for use in (config.rope, lambda: config.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"factor is 4\.0, but type 'origin' does no scaling"):
            use()
    config.rope_parameters["rope_type"] = "linear"
    assert config.rope() == (10000, "linear", 4.0)


@over_families
@torch.no_grad()
def test_a_model_follows_edits_of_its_config(family: Family) -> None:
    ids = tokens(1, 48)
    model, expected = family.model("dynamic"), family.model("dynamic", **of_factor(family, 4.0))
    assert not torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-3)
    model.config.rope_scaling["factor"] = 4.0
    assert_near(model(ids).logits, expected(ids).logits)


def of_factor(family: Family, factor: float) -> dict[str, Any]:
    if family is INTERNLM:
        return {"rotary": {"base": 10000, "type": "dynamic", "scaling_factor": factor}}
    return {"rope_scaling": {"type": "dynamic", "factor": factor}}


@pytest.mark.parametrize(
    "rotary",
    [
        {"base": 10000, "type": "dynamic"},
        {"base": 10000, "type": "dynamic", "scaling_factor": 1.0},
        {"base": 10000, "type": "origin"},
        {"base": 20000, "type": "linear", "scaling_factor": 2.0},
    ],
    ids=str,
)
def test_rotary_comes_back_as_it_came(rotary: dict[str, Any], tmp_path: Path) -> None:
    config = INTERNLM.cls("Config")(rotary=rotary)
    raw = saved(config, tmp_path)
    assert raw["rotary"] == rotary
    assert saved(INTERNLM.cls("Config").from_pretrained(tmp_path), tmp_path) == raw


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
        **{
            f"AutoModelFor{head}": f"modeling_{family.name}.{family.prefix}For{head}"
            for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
        },
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
