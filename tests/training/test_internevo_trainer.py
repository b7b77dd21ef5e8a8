"""InternEvo's trainer on these models: the repository under the package name `huggingface_model`.

The training framework finds a model by its module path and class name, and calls it with the keyword arguments of
its packed batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.model_families import FAMILIES, Family, tokens
from tests.support.rounding import assert_near

REPOSITORY = Path(__file__).resolve().parents[2]
LENGTHS = [9, 40, 1, 14]  # one beyond the tiny models' trained length of 32
OFFSETS = [0, 9, 49, 50, 64]

# model type -> (module path, class name) of model and configuration, as the framework's builder maps them
MODULES = {
    "INTERNLM_FROM_HF": (
        ("huggingface_model.internlm_model.modeling_internlm", "InternLMForCausalLM"),
        ("huggingface_model.internlm_model.configuration_internlm", "InternLMConfig"),
    ),
    "INTERNLM2_FROM_HF": (
        ("huggingface_model.internlm2_model.modeling_internlm2", "InternLM2ForCausalLM"),
        ("huggingface_model.internlm2_model.configuration_internlm2", "InternLM2Config"),
    ),
}


class Trained(NamedTuple):
    """A family, and the classes that the training framework finds for it."""

    family: Family
    model_class: Any
    config_class: Any


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The repository importable as `huggingface_model`, for this module's tests only."""
    folder = tmp_path_factory.mktemp("internevo")
    (folder / "huggingface_model").symlink_to(REPOSITORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_model"]:
        del sys.modules[name]


@pytest.fixture(params=zip(FAMILIES, MODULES, strict=True), ids=MODULES)
def trained(request: pytest.FixtureRequest, package: None) -> Trained:
    family, model_type = request.param
    return Trained(family, *(getattr(import_module(module), name) for module, name in MODULES[model_type]))


@pytest.fixture
def model(trained: Trained, tmp_path: Path) -> Any:
    """The tiny golden model with dynamic NTK scaling, built and loaded as the framework does."""
    trained.family.model("dynamic").save_pretrained(tmp_path / "hub")
    config = trained.config_class.from_pretrained(tmp_path / "hub")
    return trained.model_class.from_pretrained(tmp_path / "hub", config=config).eval()


def packed() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A packed row of ids [1, 64] and its sequences [1, n]."""
    rows = [tokens(1, length, seed=length) for length in LENGTHS]
    return torch.cat(rows, 1), rows


def positions() -> torch.Tensor:
    """Positions [64] that restart with every sequence."""
    return torch.cat([torch.arange(length) for length in LENGTHS])


def test_the_package_exports_what_the_modules_define(trained: Trained) -> None:
    package = import_module(trained.model_class.__module__.rpartition(".")[0])
    assert getattr(package, trained.model_class.__name__) is trained.model_class
    assert getattr(package, trained.config_class.__name__) is trained.config_class


def test_a_fresh_model_is_built_from_a_configuration(trained: Trained) -> None:
    model = trained.model_class(trained.config_class(**trained.family.golden.config(rope="dynamic")))
    state = trained.family.golden.state_dict()
    assert {name: weight.shape for name, weight in model.state_dict().items()} == {
        name: weight.shape for name, weight in state.items()
    }


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param({"position_ids": positions()[None]}, id="position_ids"),
        pytest.param({"indexes": positions()}, id="indexes"),
        pytest.param(
            {"indexes": positions()[None], "cu_seqlens": torch.tensor([OFFSETS]), "max_seqlen": 40}, id="packed batch"
        ),
        pytest.param({"cu_seqlens": torch.tensor(OFFSETS, dtype=torch.int32), "max_seqlen": 40}, id="offsets"),
        pytest.param(
            {"attention_mask": torch.ones(1, 64, dtype=torch.bool), "cu_seqlens": torch.tensor(OFFSETS)}, id="mask"
        ),
    ],
)
@torch.no_grad()
def test_packed_batches(model: Any, batch: dict[str, Any]) -> None:
    ids, rows = packed()
    logits = model(input_ids=ids, labels=None, **batch).logits
    expected = torch.cat([model(row).logits for row in rows], 1)
    assert_near(logits, expected)


def test_no_gradient_flows_between_packed_sequences(model: Any) -> None:
    ids, _ = packed()
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, cu_seqlens=torch.tensor(OFFSETS), indexes=positions()).logits
    logits[:, OFFSETS[1] : OFFSETS[2]].square().sum().backward()
    reached = embeddings.grad[0].abs().sum(-1) > 0  # [64]
    assert reached.tolist() == [OFFSETS[1] <= token < OFFSETS[2] for token in range(64)]


def test_loss_of_a_packed_batch_trains(model: Any) -> None:
    ids, _ = packed()
    labels = ids.clone()
    labels[:, OFFSETS[:-1]] = -100  # no sequence predicts the next one's first token
    batch = {"input_ids": ids, "labels": labels, "cu_seqlens": torch.tensor([OFFSETS]), "indexes": positions()}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


@torch.no_grad()
def test_what_training_saves_loads_with_the_auto_classes(trained: Trained, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(loaded) is not trained.model_class  # the code that lies beside the weights
    ids = tokens(1, 40)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert_near(loaded(ids).logits, model(ids).logits)
