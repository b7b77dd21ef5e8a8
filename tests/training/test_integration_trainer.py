"""transformers' Trainer on both families: learning, resuming, accumulating, padding-free batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from tests.support.model_families import FAMILIES, Family, tokens
from tests.support.rounding import assert_near

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)

LENGTHS = [5, 16, 9, 3, 12, 7, 20, 11]


class Padding:
    """Pads ids and masks on the right, and labels with -100."""

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(example["input_ids"]) for example in examples)
        fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {
            key: torch.tensor([example[key] + [fill] * (width - len(example[key])) for example in examples])
            for key, fill in fills.items()
        }


def examples(repeat: int = 1) -> list[dict[str, list[int]]]:
    """Rows that predict nothing in their first place: transformers 4 counts its label all the same, if there is one."""
    rows = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": [-100, *row[1:]], "attention_mask": [1] * len(row)} for row in rows] * repeat


def trainer(model: Any, folder: Path, collator: Any = None, **settings: Any) -> Trainer:
    """A Trainer on the CPU that logs the loss of every step."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "seed": 1,
    }
    arguments = TrainingArguments(**(defaults | settings))
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=examples(),
        eval_dataset=examples(),
        data_collator=collator or Padding(),
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@over_families
def test_twenty_steps_lower_the_loss(family: Family, tmp_path: Path) -> None:
    run = trainer(family.model("dynamic"), tmp_path, max_steps=20, learning_rate=2e-3)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert len(losses(run)) == 20
    assert run.evaluate()["eval_loss"] < before / 2


# Trainer reads config.json, which says rope_scaling to readers of transformers 4, with the base class of configs.
@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")
@over_families
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(family: Family, tmp_path: Path) -> None:
    whole = trainer(family.model(), tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(family.model(), tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


@over_families
def test_accumulated_gradients_are_those_of_the_large_batch(family: Family, tmp_path: Path) -> None:
    """Every token counts the same, however the batch is cut: the loss is told how many tokens there are in all."""
    whole = trainer(family.model(), tmp_path, max_steps=3, per_device_train_batch_size=8)
    parts = trainer(family.model(), tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for run in (whole, parts):
        run.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


PROBLEMS: dict[str, tuple[str, int, Callable[[int], Any]]] = {
    "classes": ("ForSequenceClassification", 3, lambda row: row % 3),
    "a value": ("ForSequenceClassification", 1, float),
    "several classes": ("ForSequenceClassification", 3, lambda row: [float(row % 2), float(row % 3 == 0), 1.0]),
    "classes of tokens": ("ForTokenClassification", 3, lambda row: [row % 3] * (9 - row) + [-100] * (row + 1)),
}


@over_families
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_heads_accumulate_the_gradients_of_the_large_batch(
    family: Family, problem: tuple[str, int, Callable[[int], Any]], tmp_path: Path
) -> None:
    """Trainer divides by the number of parts unless the model says that its own loss counts the whole batch."""
    head, labels, label = problem
    dataset = [{"input_ids": row, "labels": label(number)} for number, row in enumerate(tokens(8, 10))]
    found = []
    for size in (8, 2):
        torch.manual_seed(0)
        model = family.cls(head)(family.config(num_labels=labels))
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        run = Trainer(model=model, args=trainer(model, tmp_path, max_steps=2, **settings).args, train_dataset=dataset)
        run.train()
        found.append([(log["loss"], log["grad_norm"]) for log in run.state.log_history if "loss" in log])
    whole, parts = (torch.tensor(logs) for logs in found)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@over_families
def test_smoothed_labels_are_those_of_the_next_tokens(family: Family, tmp_path: Path) -> None:
    run = trainer(family.model(), tmp_path, label_smoothing_factor=0.1)
    batch = Padding()(examples())
    logits = run.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
    assert run.compute_loss(run.model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


@over_families
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padding_free_batches_train_as_padded_ones(family: Family, backend: str, tmp_path: Path) -> None:
    padded = trainer(family.model("dynamic", attn_implementation=backend), tmp_path, max_steps=4)
    flat = trainer(
        family.model("dynamic", attn_implementation=backend), tmp_path, DataCollatorWithFlattening(), max_steps=4
    )
    for run in (padded, flat):
        run.train()
    assert losses(flat) == pytest.approx(losses(padded), rel=1e-4)


@over_families
def test_gradient_checkpointing_changes_no_loss(family: Family, tmp_path: Path) -> None:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    setting = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    runs = [trainer(family.model(), tmp_path, max_steps=3, **{setting: on}) for on in (False, True)]
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)


@over_families
def test_bfloat16_autocast_learns(family: Family, tmp_path: Path) -> None:
    run = trainer(family.model(), tmp_path, max_steps=12, bf16=True)
    run.train()
    assert run.model.dtype == torch.float32
    assert losses(run)[-1] < losses(run)[0] * 0.7


@over_families
def test_predictions_are_logits_alone(family: Family, tmp_path: Path) -> None:
    """The cache that a pass returns is no part of what evaluation gathers."""
    rows = tokens(4, 12)
    dataset = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    model = family.model()
    run = Trainer(model=model, args=trainer(model, tmp_path).args)
    predicted = run.predict(dataset).predictions
    assert_near(torch.tensor(predicted), model(rows).logits)


@over_families
def test_classification_learns(family: Family, tmp_path: Path) -> None:
    model = family.cls("ForSequenceClassification")(family.config(num_labels=2))
    rows = tokens(8, 10)
    dataset = [{"input_ids": row, "labels": index % 2} for index, row in enumerate(rows)]
    run = Trainer(model=model, args=trainer(model, tmp_path, max_steps=20).args, train_dataset=dataset)
    run.train()
    assert model.eval()(rows).logits.argmax(-1).tolist() == [0, 1] * 4
