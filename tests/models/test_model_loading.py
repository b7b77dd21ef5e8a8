"""Folders saved and loaded: through the Auto classes, in every dtype, with every backend, on several devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.utils import is_flash_attn_2_available

from tests.support.model_families import FAMILIES, Family, tokens
from tests.support.rounding import assert_near, decided

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    """Each family's golden model, saved in bfloat16 by its own class."""
    paths = {}
    for family in FAMILIES:
        paths[family.name] = tmp_path_factory.mktemp(family.name)
        family.model("dynamic").bfloat16().save_pretrained(paths[family.name])
    return paths


@pytest.fixture
def folder(family: Family, folders: dict[str, Path]) -> Path:
    return folders[family.name]


def edited(folder: Path, target: Path, **keys: Any) -> Path:
    """A copy of a folder with keys of its config.json changed; None removes one."""
    for file in folder.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    raw = json.loads((target / "config.json").read_text())
    raw |= {key: value for key, value in keys.items() if value is not None}
    kept = {key: value for key, value in raw.items() if key not in keys or keys[key] is not None}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


@over_families
def test_a_saved_folder_stands_alone(family: Family, folder: Path) -> None:
    files = {file.name for file in folder.iterdir()}
    assert {f"{part}_{family.name}.py" for part in ("configuration", "modeling", "compat", "chat")} <= files
    ids = tokens(1, 40)
    expected = family.model("dynamic").bfloat16().float()(ids).logits
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__name__ == f"{family.prefix}ForCausalLM"
        assert type(model) is not family.cls("ForCausalLM")  # the folder's own code
        assert_near(model(ids).logits, expected)
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 43)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=5)
    assert classifier(ids).logits.shape == (1, 5)
    assert torch.equal(classifier.model.norm.weight, model.model.norm.weight)


@over_families
def test_what_the_folders_code_saves_loads_again(family: Family, folder: Path, tmp_path: Path) -> None:
    first = load(folder)
    first.save_pretrained(tmp_path)
    second = load(tmp_path)
    assert second.state_dict().keys() == first.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    raw, again = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    changing = {"dtype", "torch_dtype", "architectures"}
    assert {key: again[key] for key in again.keys() - changing} == {key: raw[key] for key in raw.keys() - changing}


@over_families
@pytest.mark.parametrize("suffix", ["Model", "ForCausalLM", "ForSequenceClassification"])
def test_every_class_round_trips(family: Family, suffix: str, tmp_path: Path) -> None:
    model = family.cls(suffix)(family.config(num_labels=3))
    model.save_pretrained(tmp_path)
    again, info = family.cls(suffix).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@over_families
def test_tied_embeddings_are_stored_once(family: Family, tmp_path: Path) -> None:
    model = family.cls("ForCausalLM")(family.config(tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert [name for name in model.state_dict() if name not in stored] == [
        name for name in model.state_dict() if name in ("output.weight", "lm_head.weight")
    ]
    again = load(tmp_path)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    ids = tokens(1, 6)
    assert_near(again(ids).logits, model(ids).logits)


@over_families
def test_rotary_tables_in_old_files_are_passed_over(family: Family, tmp_path: Path) -> None:
    family.model().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    attention = "attention" if family.name == "internlm2" else "self_attn"
    state[f"model.layers.0.{attention}.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = load(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]


# -- dtype -----------------------------------------------------------------------------------------------------------


@over_families
@pytest.mark.parametrize("through_auto", [True, False], ids=["auto", "class"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, torch.float32),
        ({"dtype": None}, torch.float32),
        ({"torch_dtype": None}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": torch.float32}, torch.float32),
    ],
    ids=str,
)
def test_dtype_rule(
    family: Family, folder: Path, arguments: dict[str, Any], expected: torch.dtype, through_auto: bool
) -> None:
    model = (
        load(folder, **arguments) if through_auto else family.cls("ForCausalLM").from_pretrained(folder, **arguments)
    )
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.config.dtype == expected


@over_families
def test_a_dtype_is_for_one_load(family: Family, folder: Path) -> None:
    half = load(folder, dtype=torch.float16)
    assert load(folder, config=half.config).dtype == torch.float32


@over_families
def test_auto_dtype_is_the_configs_else_the_weights(family: Family, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "none").mkdir()
    half = edited(folder, tmp_path / "half", dtype="float16", torch_dtype="float16")
    assert load(half, dtype="auto").dtype == torch.float16
    none = edited(folder, tmp_path / "none", dtype=None, torch_dtype=None)
    assert load(none, dtype="auto").dtype == torch.bfloat16
    assert load(none).dtype == torch.float32


# -- attention backend -----------------------------------------------------------------------------------------------


@over_families
def test_the_backend_is_eager_unless_named(family: Family, folder: Path, tmp_path: Path) -> None:
    assert load(folder).config._attn_implementation == "eager"
    assert load(folder, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa")
    assert load(folder, config=config).config._attn_implementation == "sdpa"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.attn_implementation = "sdpa"
    assert load(folder, config=config).config._attn_implementation == "sdpa"
    keyed = edited(folder, tmp_path, attn_implementation="sdpa")
    assert load(keyed).config._attn_implementation == "sdpa"
    assert load(keyed, attn_implementation="eager").config._attn_implementation == "eager"
    assert load(edited(folder, tmp_path, attn_implementation=None)).config._attn_implementation == "eager"


@over_families
def test_an_argument_is_for_one_load_and_the_key_stays(family: Family, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keyed").mkdir()
    model = load(edited(folder, tmp_path / "keyed", attn_implementation="sdpa"), attn_implementation="eager")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["attn_implementation"] == "sdpa"


@over_families
def test_the_backend_can_be_changed_later(family: Family) -> None:
    model = family.model()
    ids = tokens(1, 8)
    expected = model(ids).logits
    model.set_attn_implementation("sdpa")
    assert model.model.layers[0].state_dict().keys()
    assert model.config._attn_implementation == "sdpa"
    assert_near(model(ids).logits, expected)
    with pytest.raises(ValueError, match="only attn_implementation"):
        model(ids, output_attentions=True)


@over_families
def test_unknown_backends_are_refused(family: Family, folder: Path) -> None:
    with pytest.raises(ValueError, match=r'Specified `attn_implementation="fast"` is not supported'):
        load(folder, attn_implementation="fast")


@over_families
@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.float32}, {"torch_dtype": "float32"}], ids=str)
def test_flash_attention_in_float32_is_refused(family: Family, folder: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"in float16 or bfloat16 only.*float32, the default\. Pass dtype=torch"):
        load(folder, attn_implementation="flash_attention_2", **arguments)


@over_families
@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_flash_attention_that_is_not_installed_is_named(family: Family, folder: Path) -> None:
    with pytest.raises(ImportError, match=r"FlashAttention2 has been toggled on.*package.*install"):
        load(folder, attn_implementation="flash_attention_2", dtype=torch.bfloat16)


# -- devices ---------------------------------------------------------------------------------------------------------


@over_families
def test_layers_on_cpu_and_disk(family: Family, folder: Path, tmp_path: Path) -> None:
    device_map: dict[str, Any] = {name: "cpu" for name, _ in family.model().named_children()}
    del device_map["model"]
    device_map |= {f"model.{name}": "cpu" for name, _ in family.model().model.named_children() if name != "layers"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    ids = tokens(2, 40)
    plain = load(folder)
    offloaded = load(folder, device_map=device_map, offload_folder=tmp_path)
    assert (
        offloaded.model.layers[1]
        .state_dict()["ffn_norm.weight" if family.name == "internlm2" else "input_layernorm.weight"]
        .is_meta
    )
    assert_near(offloaded(ids).logits, plain(ids).logits)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4}
    assert torch.equal(offloaded.generate(ids, do_sample=False, **settings), decided(plain, ids, **settings))


@over_families
def test_device_map_auto_keeps_layers_whole(family: Family, folder: Path, tmp_path: Path) -> None:
    size = sum(parameter.numel() * 4 for parameter in family.model().parameters())
    model = load(folder, device_map="auto", max_memory={"cpu": int(size * 0.7)}, offload_folder=tmp_path)
    placed = {name: str(device) for name, device in model.hf_device_map.items()}
    assert set(placed.values()) == {"cpu", "disk"}
    assert not [name for name in placed if name.startswith("model.layers.") and name.count(".") > 2]
    ids = tokens(1, 12)
    assert_near(model(ids).logits, load(folder)(ids).logits)


@over_families
def test_construction_without_memory(family: Family, folder: Path) -> None:
    with init_empty_weights():
        empty = family.cls("ForCausalLM")(family.config())
    assert all(parameter.is_meta for parameter in empty.parameters())
    ids = tokens(1, 6)
    lean = load(folder, low_cpu_mem_usage=True)
    assert_near(lean(ids).logits, load(folder)(ids).logits)
