"""The config.json files of published models, read with the code beside them, give models of the published size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.model_families import INTERNLM, INTERNLM2, Family
from weight_conversion.folders.hf_folder import code_files, copy_code


def published(family: Family, **settings: Any) -> dict[str, Any]:
    """A config.json as published: remote code named, rotary settings and dtype in the spelling of transformers 4."""
    modeling = f"modeling_{family.name}.{family.prefix}ForCausalLM"
    return {
        "architectures": [f"{family.prefix}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{family.name}.{family.prefix}Config",
            "AutoModel": modeling,
            "AutoModelForCausalLM": modeling,
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": family.name,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
        **settings,
    }


INTERNLM_7B = published(
    INTERNLM,
    bias=True,
    hidden_size=4096,
    intermediate_size=11008,
    max_position_embeddings=2048,
    num_attention_heads=32,
    num_hidden_layers=32,
    rms_norm_eps=1e-06,
    rotary={"base": 10000, "type": "dynamic"},
    torch_dtype="float16",
    vocab_size=103168,
)
INTERNLM_20B = INTERNLM_7B | {
    "bias": False,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "num_attention_heads": 40,
    "num_hidden_layers": 60,
    "torch_dtype": "bfloat16",
}
INTERNLM2_7B = published(
    INTERNLM2,
    attn_implementation="eager",
    bias=False,
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=32768,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=1000000,
    torch_dtype="bfloat16",
    vocab_size=92544,
)
INTERNLM2_5_7B_CHAT = INTERNLM2_7B | {"pretraining_tp": 1, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
INTERNLM2_1_8B = INTERNLM2_5_7B_CHAT | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}

MODELS = [
    pytest.param(INTERNLM, INTERNLM_7B, (10000, "dynamic", 1.0), 7.32, id="internlm-7b"),
    pytest.param(INTERNLM, INTERNLM_20B, (10000, "dynamic", 1.0), 20.09, id="internlm-20b"),
    pytest.param(INTERNLM2, INTERNLM2_1_8B, (1000000, "dynamic", 2.0), 1.89, id="internlm2-1_8b"),
    pytest.param(INTERNLM2, INTERNLM2_7B, (1000000, "origin", 1.0), 7.74, id="internlm2-7b"),
    pytest.param(INTERNLM2, INTERNLM2_5_7B_CHAT, (1000000, "dynamic", 2.0), 7.74, id="internlm2_5-7b-chat"),
]


def parameter_count(raw: dict[str, Any]) -> int:
    """Embedding and head, and per layer q, k, v, o with their biases, gate, up, down and two norms; the last norm."""
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    kv_rows = hidden // heads * raw.get("num_key_value_heads", heads)
    attention = 2 * hidden * (hidden + kv_rows) + raw["bias"] * 2 * (hidden + kv_rows)
    layer = attention + 3 * hidden * raw["intermediate_size"] + 2 * hidden
    return 2 * raw["vocab_size"] * hidden + raw["num_hidden_layers"] * layer + hidden


@pytest.mark.parametrize(("family", "raw", "rope", "billions"), MODELS)
def test_a_published_config_builds_its_model(
    family: Family, raw: dict[str, Any], rope: tuple[int, str, float], billions: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    copy_code(code_files(Path(str(family.package.__file__)).parent, raw["model_type"]), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert config.rope() == rope
    assert config.dtype == getattr(torch, raw["torch_dtype"])

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert model.dtype == config.dtype
    assert model.num_parameters() == parameter_count(raw)
    assert round(model.num_parameters() / 1e9, 2) == billions
    assert model(torch.zeros(2, 5, dtype=torch.long, device="meta")).logits.shape == (2, 5, raw["vocab_size"])

    config.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved/config.json").read_text(encoding="utf-8"))
    assert {key: written.get(key) for key in raw if key != "auto_map"} == {
        key: value for key, value in raw.items() if key != "auto_map"
    }
