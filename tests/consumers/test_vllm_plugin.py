"""The vLLM plugin, as far as it can be seen without vLLM; `make consumers TOOLS=vllm` runs it in vLLM."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import internlm_vllm
from internlm_vllm.lengths import refuse_cut_prompts, refuse_longer, request_lengths
from tests.support.model_families import FAMILIES, INTERNLM2, Family

REPOSITORY = Path(__file__).resolve().parents[2]


def vllm_settings(longest: int, in_pieces: bool = False, shared: bool = False) -> Any:
    """The part of vLLM's settings that the plugin reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=longest),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=in_pieces),
        cache_config=SimpleNamespace(enable_prefix_caching=shared),
    )


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        (vllm_settings(65, in_pieces=True), ["--no-enable-chunked-prefill"]),
        (vllm_settings(65, shared=True), ["--no-enable-prefix-caching"]),
        (vllm_settings(128, True, True), ["--no-enable-chunked-prefill", "--no-enable-prefix-caching"]),
    ],
)
def test_prompts_that_may_be_cut_are_refused_with_the_flags_to_set(settings: Any, flags: list[str]) -> None:
    with pytest.raises(ValueError, match="dynamic NTK scaling beyond 64 tokens") as caught:
        refuse_cut_prompts(64, settings)
    assert [word for word in str(caught.value).replace(",", "").split() if word.startswith("--no")] == flags
    assert "--max-model-len 64." in str(caught.value)


@pytest.mark.parametrize("settings", [vllm_settings(64, True, True), vllm_settings(1000)])
def test_whole_prompts_and_short_ones_are_served(settings: Any) -> None:
    refuse_cut_prompts(64, settings)


def test_internlm_is_served_up_to_the_trained_length() -> None:
    """It rotates cached keys anew beyond that."""
    refuse_longer(64, vllm_settings(64))
    with pytest.raises(ValueError, match=r"Beyond 64 tokens .* requests of 65 tokens\. .*--max-model-len 64\."):
        refuse_longer(64, vllm_settings(65))


@pytest.mark.parametrize("by_layer", [True, False])
def test_every_token_has_the_length_of_its_request(by_layer: bool) -> None:
    """A prompt of 3, a token at position 80, one at 81, a prompt of 2; then a token of padding."""
    metadata: Any = SimpleNamespace(
        query_start_loc=torch.tensor([0, 3, 4, 5, 7], dtype=torch.int32), seq_lens=torch.tensor([3, 81, 82, 2])
    )
    lengths = request_lengths({"model.layers.0": metadata} if by_layer else metadata, 8)
    assert lengths is not None
    assert lengths.tolist() == [[3, 3, 3, 81, 82, 2, 2, 2]]


NO_REQUESTS: Any = SimpleNamespace(
    query_start_loc=torch.zeros(1, dtype=torch.int32), seq_lens=torch.zeros(0, dtype=torch.int32)
)
without_requests = pytest.mark.parametrize(
    "metadata",
    [None, {}, NO_REQUESTS, {"model.layers.0": NO_REQUESTS}],
    ids=["none", "of no layer", "empty", "empty of a layer"],
)


@without_requests
def test_a_pass_without_requests_has_no_lengths(metadata: Any) -> None:
    assert request_lengths(metadata, 8) is None


def test_a_backend_that_is_not_told_lengths_is_named() -> None:
    class OtherMetadata:
        query_start_loc = torch.tensor([0, 3])

    with pytest.raises(ValueError, match=r"does not tell in OtherMetadata.*--attention-backend FLASH_ATTN"):
        request_lengths(OtherMetadata(), 3)


class FakeContext:
    """What vLLM knows during a forward pass."""

    attn_metadata: Any = None


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """internlm_vllm.models beside names of vLLM that do nothing, but for the forward context."""
    context = FakeContext()
    names = {
        "vllm": {},
        "vllm.forward_context": {
            "get_forward_context": lambda: context,
            "is_forward_context_available": lambda: True,
        },
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.transformers": {"TransformersForCausalLM": torch.nn.Module},
        "vllm.model_executor.models.utils": {"WeightsMapper": dict},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "internlm_vllm.models", raising=False)
    module = importlib.import_module("internlm_vllm.models")
    yield SimpleNamespace(module=module, context=context)
    sys.modules.pop("internlm_vllm.models", None)


def test_requests_in_one_row_are_rotated_by_their_own_lengths(models: Any) -> None:
    """Two requests one token apart, beyond the trained length: the row looks like one sequence, and is not."""
    config = models.module.ServedInternLM2Config(**INTERNLM2.golden.config(rope="dynamic"))
    served = models.module.ServedInternLM2Model(config).rotary_emb
    alone = INTERNLM2.model("dynamic").model.rotary_emb
    trained = config.max_position_embeddings
    positions, as_one = torch.tensor([[trained + 5, trained + 6]]), torch.tensor([[trained + 7]])
    models.context.attn_metadata = SimpleNamespace(
        query_start_loc=torch.tensor([0, 1, 2]), seq_lens=(positions + 1).flatten()
    )
    found = served(positions, as_one, torch.float32)
    expected = [alone(column, column + 1, torch.float32) for column in positions.split(1, dim=1)]
    for values, *separate in zip(found, *expected, strict=True):
        torch.testing.assert_close(values, torch.cat(separate, dim=1))
    assert not torch.allclose(found[0], alone(positions, as_one, torch.float32)[0])


@without_requests
def test_without_requests_the_row_has_the_length_that_the_model_gives(metadata: Any, models: Any) -> None:
    """vLLM measures memory and warms up so."""
    config = models.module.ServedInternLM2Config(**INTERNLM2.golden.config(rope="dynamic"))
    served = models.module.ServedInternLM2Model(config).rotary_emb
    alone = INTERNLM2.model("dynamic").model.rotary_emb
    positions = torch.arange(config.max_position_embeddings + 8)[None]
    models.context.attn_metadata = metadata
    lengths = positions[:, -1:] + 1
    torch.testing.assert_close(served(positions, lengths, torch.float32), alone(positions, lengths, torch.float32))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_automodel_gives_the_model_without_head_for_the_plugins_config_alone(family: Family, models: Any) -> None:
    from transformers import AutoModel

    config = getattr(models.module, f"Served{family.prefix}Config")(**family.golden.config())
    config.auto_map = {}
    assert type(AutoModel.from_config(config)).__name__ == f"Served{family.prefix}Model"
    assert "ForCausalLM" in family.config().auto_map["AutoModel"]


def test_the_plugin_registers_both_families(monkeypatch: pytest.MonkeyPatch, models: Any) -> None:
    registered: dict[str, str] = {}
    monkeypatch.setattr(
        sys.modules["vllm"], "ModelRegistry", SimpleNamespace(register_model=registered.__setitem__), False
    )
    internlm_vllm.register()
    assert registered == {
        "InternLMForCausalLM": "internlm_vllm.models:InternLMForVllm",
        "InternLM2ForCausalLM": "internlm_vllm.models:InternLM2ForVllm",
    }
    for target in registered.values():
        assert hasattr(models.module, target.partition(":")[2])


def test_vllm_finds_the_plugin_and_installing_brings_it() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    (target,) = project["project"]["entry-points"]["vllm.general_plugins"].values()
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    packages = project["tool"]["setuptools"]["packages"]
    on_disk = {
        str(path.parent.relative_to(REPOSITORY)).replace("/", ".") for path in REPOSITORY.glob("*/**/__init__.py")
    }
    assert {name for name in on_disk if not name.startswith((".", "build"))} == set(packages)


def test_the_plugin_imports_nothing_until_vllm_asks() -> None:
    program = (
        "import sys, internlm_vllm; print([name for name in ('torch', 'transformers', 'vllm') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
