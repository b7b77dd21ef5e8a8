"""PEFT on both families: adapters train, save, load and merge; soft prompts go through the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from tests.support.model_families import FAMILIES, Family, checkpoint_activations, tokens
from tests.support.rounding import assert_near, decided

TARGETS = {
    "internlm": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "internlm2": ["wqkv", "wo", "w1", "w2", "w3"],
}

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)


@pytest.fixture
def base(family: Family, tmp_path: Path) -> Any:
    """The golden model loaded from a folder, with the code beside the weights."""
    family.model("dynamic").save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)


def lora(family: Family, **kwargs: Any) -> LoraConfig:
    return LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, target_modules=TARGETS[family.name], **kwargs)


def train(model: Any, steps: int = 15) -> list[float]:
    """The losses of a few steps on one batch."""
    ids = tokens(2, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@over_families
def test_lora_reaches_every_projection_of_every_layer(family: Family, base: Any) -> None:
    model = get_peft_model(base, lora(family))
    adapted = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert len(adapted) == len(TARGETS[family.name]) * base.config.num_hidden_layers
    assert {name.rpartition(".")[2] for name in adapted} == set(TARGETS[family.name])


@over_families
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(family: Family, base: Any) -> None:
    ids = tokens(1, 40)
    expected = base(ids).logits
    assert_near(get_peft_model(base, lora(family)).eval()(input_ids=ids).logits, expected)


@over_families
def test_lora_trains_saves_loads_and_merges(family: Family, base: Any, tmp_path: Path) -> None:
    ids = tokens(1, 40)
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = get_peft_model(base, lora(family))
    losses = train(model)
    assert losses[-1] < losses[0] / 2
    for name, weight in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, weights[name.replace(".base_layer", "")]), name
    tuned = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    assert_near(PeftModel.from_pretrained(fresh, tmp_path / "adapter")(input_ids=ids).logits, tuned)
    named = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert_near(named(input_ids=ids).logits, tuned)

    named.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert merged.state_dict().keys() == weights.keys()
    assert_near(merged(ids).logits, tuned)


@over_families
def test_generation_with_an_adapter_is_that_of_the_merged_model(family: Family, base: Any) -> None:
    model = get_peft_model(base, lora(family))
    train(model)
    settings = {"input_ids": tokens(2, 8), "max_new_tokens": 10}
    adapted = model.generate(do_sample=False, **settings)
    assert torch.equal(decided(model.merge_and_unload(), **settings), adapted)


@over_families
def test_gradient_checkpointing_with_a_frozen_base(family: Family, base: Any) -> None:
    checkpointed = AutoModelForCausalLM.from_pretrained(base.config.name_or_path, trust_remote_code=True)
    checkpoint_activations(checkpointed)
    checkpointed.enable_input_require_grads()
    assert all(layer.gradient_checkpointing for layer in checkpointed.model.layers)
    losses = []
    for model in (base, checkpointed):
        torch.manual_seed(0)
        losses.append(train(get_peft_model(model, lora(family)), 3))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@over_families
@pytest.mark.parametrize("soft", [PrefixTuningConfig, PromptTuningConfig])
def test_soft_prompts_train(family: Family, base: Any, soft: Any) -> None:
    """Prefixes arrive as a cache that a training pass is given, prompts as embeddings."""
    model = get_peft_model(base, soft(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    losses = train(model, 30)
    assert losses[-1] < losses[0] - 0.1
    assert model.generate(input_ids=tokens(1, 8), max_new_tokens=4, min_new_tokens=4).shape == (1, 12)


@over_families
def test_a_classification_head_is_saved_with_its_adapter(family: Family, tmp_path: Path) -> None:
    model = family.cls("ForSequenceClassification")(family.config(num_labels=2)).eval()
    model.save_pretrained(tmp_path / "base")
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=TARGETS[family.name])
    tuned = get_peft_model(model, settings)
    tuned.train()
    ids = tokens(4, 12)
    tuned(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert {name.rpartition(".")[0] for name, p in tuned.named_parameters() if p.grad is not None and "score" in name}
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    tuned.eval().save_pretrained(tmp_path / "adapter")
    fresh = family.cls("ForSequenceClassification").from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert_near(loaded(input_ids=ids).logits, tuned(input_ids=ids).logits)
