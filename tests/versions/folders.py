"""Makes the folders that every transformers version is tried on.

`write_golden` makes folders as published ones are: a config.json in the spelling of transformers 4, weights, the
package's code and a tokenizer. `write_converted` makes them with the conversion scripts, and adds the logits that
they must give.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from layout import EXPECTED, HEADS, ROPE_BASE, SCALING_FACTOR, TOKENIZER, golden_folder
from safetensors.torch import save_file

from tests.support.checkpoints import build
from tests.support.golden import Golden
from tests.support.tokenizer_fixture import train_tokenizer
from weight_conversion.folders.hf_folder import code_files, copy_code
from weight_conversion.mapping.families import FAMILIES
from weight_conversion.mapping.family import Family
from weight_conversion.tokenizer.tokenizer_files import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]

ROPES = {
    "origin": ["--rotary_type", "origin"],
    "dynamic": ["--rotary_type", "dynamic", "--scaling_factor", str(SCALING_FACTOR)],
}


def write_golden(root: Path) -> None:
    """One folder per model that the golden cases of both families need."""
    tokenizer = Tokenizer.read(train_tokenizer(root / TOKENIZER))
    for family in FAMILIES.values():
        golden = Golden(family.model_type)
        for name in golden.cases:
            folder = golden_folder(root, family.model_type, name)
            if not folder.exists():
                folder.mkdir()
                _write_golden_model(folder, family, golden, name)
                copy_code(code_files(family.code, family.model_type), folder)
                tokenizer.files(family.tokenizer, chat=False).write(folder)


def _write_golden_model(folder: Path, family: Family, golden: Golden, name: str) -> None:
    config, kind = golden.config(name), golden.cases[name]["cls"]
    weights = golden.state_dict("causal_lm" if kind == "base_model" else kind, bias=config["bias"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    published = json.dumps(_published(family, config, HEADS[kind]), indent=2)
    (folder / "config.json").write_text(published, encoding="utf-8")


def _published(family: Family, config: dict[str, Any], head: str) -> dict[str, Any]:
    """`config` with the keys that published config.json files have beside the model's settings."""
    modeling = f"modeling_{family.model_type}.{family.name}"
    return config | {
        "architectures": [f"{family.name}{head}"],
        "auto_map": {
            "AutoConfig": f"configuration_{family.model_type}.{family.name}Config",
            "AutoModel": f"{modeling}ForCausalLM",
            "AutoModelForCausalLM": f"{modeling}ForCausalLM",
            "AutoModelForSequenceClassification": f"{modeling}ForSequenceClassification",
        },
        "model_type": family.model_type,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def write_converted(root: Path) -> None:
    """Models without and with dynamic NTK scaling of both families, converted from training shards."""
    train_tokenizer(root / TOKENIZER)
    for family in FAMILIES.values():
        checkpoint = root / f"{family.model_type}_training"
        has_bias = family.model_type == "internlm"
        build(checkpoint, family.model_type, tp=2, bias=has_bias, config={"rope_base": ROPE_BASE})
        for rope, options in ROPES.items():
            folder = root / f"{family.model_type}_{rope}_by_converter"
            _convert(family, checkpoint, folder, [*options, "--tokenizer", str(root / TOKENIZER)])
            _write_expected(family, folder)


def _convert(family: Family, source: Path, target: Path, options: list[str]) -> None:
    script = REPOSITORY / f"convert2hf_{family.model_type}.py"
    arguments = ["--src", str(source), "--tgt", str(target), "--dtype", "float32", "--max_pos", "32", *options]
    subprocess.run([sys.executable, str(script), *arguments], check=True)


@torch.no_grad()
def _write_expected(family: Family, folder: Path) -> None:
    """The logits of 48 tokens, more than the 32 beyond which dynamic scaling counts."""
    package = __import__(family.package)
    model = getattr(package, f"{family.name}ForCausalLM").from_pretrained(folder).eval()
    ids = torch.randint(3, 320, (1, 48), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids, "logits": model(ids).logits}, folder / EXPECTED)
