"""A folder that was converted or published earlier gets the code of today: its modules are copied over the old ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.support.model_families import FAMILIES, Family, tokens

OLD = "raise ImportError('code of another time')\n"


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_copying_the_modules_renews_a_folder(family: Family, tmp_path: Path) -> None:
    folder, model = tmp_path / f"published_{family}", family.model()
    folder.mkdir()
    save_file(dict(family.golden.state_dict(bias=model.config.bias)), folder / "model.safetensors", {"format": "pt"})
    # As published: no module for differences between versions and none for chat.
    for module in ("configuration", "modeling", "tokenization"):
        (folder / f"{module}_{family}.py").write_text(OLD)
    auto_map = {
        "AutoConfig": f"configuration_{family}.{family.prefix}Config",
        "AutoModelForCausalLM": f"modeling_{family}.{family.prefix}ForCausalLM",
    }
    config = {**family.golden.config(rope="origin"), "model_type": str(family), "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match="another time"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    for module in Path(family.package.__file__).parent.glob("*_*.py"):
        shutil.copy(module, folder)

    renewed = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(renewed(ids).logits, model(ids).logits)
