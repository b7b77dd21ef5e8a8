"""The two model families as the tests of both see them: classes, golden numbers, tiny models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import internlm2_model
import internlm_model
from tests.support.golden import Golden


@dataclass(frozen=True)
class Family:
    """One model package and its golden numbers."""

    name: str
    package: Any
    prefix: str

    def __str__(self) -> str:
        return self.name

    @property
    def golden(self) -> Golden:
        return Golden(self.name)

    def cls(self, suffix: str) -> Any:
        """A class of the package by what follows the family's name, such as "ForCausalLM"."""
        return getattr(self.package, self.prefix + suffix)

    def config(self, rope: str = "origin", **overrides: Any) -> Any:
        """The tiny golden model's config."""
        return self.cls("Config")(**self.golden.config(rope=rope, **overrides))

    def model(self, rope: str = "origin", **overrides: Any) -> Any:
        """The tiny golden causal model, in evaluation mode."""
        config = self.config(rope, **overrides)
        model = self.cls("ForCausalLM")(config)
        model.load_state_dict(self.golden.state_dict(bias=config.bias))
        return model.eval()


INTERNLM2 = Family("internlm2", internlm2_model, "InternLM2")
INTERNLM = Family("internlm", internlm_model, "InternLM")
FAMILIES = [INTERNLM, INTERNLM2]


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [batch, length] without special tokens."""
    return torch.randint(3, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [1, n] of several lengths as one batch of ids and its mask, each [B, longest]."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(width - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[index, columns], mask[index, columns] = row[0], 1
    return ids, mask


def checkpoint_activations(model: Any, *settings: Any) -> None:
    """Turn activation checkpointing on: gradient_checkpointing_enable until transformers 5.23."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*settings)
