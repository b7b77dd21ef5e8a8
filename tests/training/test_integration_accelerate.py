"""accelerate's own ways to load, place and train both families; `device_map` is tested in test_model_loading.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.utils import infer_auto_device_map
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.model_families import FAMILIES, Family, tokens
from tests.support.rounding import assert_near, decided

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)


def folder(family: Family, path: Path) -> Path:
    family.model("dynamic").save_pretrained(path)
    return path


def same_answers(model: Any, expected: Any) -> None:
    """Not the same bits: kernels start elsewhere where weights are aligned otherwise in memory."""
    ids, settings = tokens(2, 40), {"max_new_tokens": 5, "min_new_tokens": 5}
    with torch.no_grad():
        assert_near(model(ids).logits, expected(ids).logits)
    assert torch.equal(model.generate(ids, do_sample=False, **settings), decided(expected, ids, **settings))


@over_families
def test_an_empty_model_filled_from_the_folder_onto_cpu_and_disk(family: Family, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder(family, tmp_path / "saved"), trust_remote_code=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    places = infer_auto_device_map(
        model, max_memory={"cpu": int(size * 0.6)}, no_split_module_classes=model._no_split_modules
    )
    assert set(places.values()) == {"cpu", "disk"}
    filled = load_checkpoint_and_dispatch(model, tmp_path / "saved", places, offload_folder=tmp_path / "offload")
    assert "meta" in {parameter.device.type for parameter in filled.parameters()}
    same_answers(filled.eval(), family.model("dynamic"))


@over_families
def test_offloaded_to_cpu_or_disk(family: Family, tmp_path: Path) -> None:
    same_answers(cpu_offload(family.model("dynamic"), torch.device("cpu")), family.model("dynamic"))
    same_answers(disk_offload(family.model("dynamic"), tmp_path, torch.device("cpu")), family.model("dynamic"))


@over_families
def test_a_training_loop_is_that_of_plain_torch(family: Family, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    ids = tokens(2, 16)
    plain, prepared = family.model(), family.model()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, prepared)]
    prepared, optimizers[1] = accelerator.prepare(prepared, optimizers[1])
    for _ in range(3):
        plain(ids, labels=ids).loss.backward()
        accelerator.backward(prepared(ids, labels=ids).loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_model(prepared, tmp_path)
    plain.config.save_pretrained(tmp_path)
    saved = family.cls("ForCausalLM").from_pretrained(tmp_path)
    for name, weight in plain.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight), name
