"""Reader of tests/support/data/golden: what the published model code computes on tiny random models (float32)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "data" / "golden"


class Golden:
    """The recorded cases of one family, "internlm" or "internlm2"."""

    def __init__(self, family: str) -> None:
        self.folder = FOLDER / family
        self.cases: dict[str, dict[str, Any]] = self._json("index")["cases"]
        self._tensors = load_file(self.folder / "cases.safetensors")
        self._base_config = self._json("base_config")
        self._ropes = self._json("rope_variants")

    def _json(self, stem: str) -> Any:
        return json.loads((self.folder / f"{stem}.json").read_text(encoding="utf-8"))

    def names(self, kind: str) -> list[str]:
        return [name for name, case in self.cases.items() if case["kind"] == kind]

    def config(self, name: str = "", rope: str = "origin", **overrides: Any) -> dict[str, Any]:
        """Config arguments of a case, or of the tiny model with a rope variant by name."""
        case = self.cases[name] if name else {"rope": rope, "config_overrides": {}}
        return {
            **self._base_config,
            **copy.deepcopy(self._ropes[case["rope"]]),
            **case["config_overrides"],
            **overrides,
        }

    def state_dict(self, cls: str = "causal_lm", bias: bool = True, num_labels: int = 3) -> dict[str, torch.Tensor]:
        """Weights for a class: "causal_lm", "base_model" or "sequence_classification"."""
        state = load_file(self.folder / "model.safetensors")
        if not bias:
            state = {key: value for key, value in state.items() if not key.endswith("bias")}
        if cls == "causal_lm":
            return state
        body = {key: value for key, value in state.items() if key.startswith("model.")}
        if cls == "base_model":
            return {key.removeprefix("model."): value for key, value in body.items()}
        head = load_file(self.folder / "score_head.safetensors")["score.weight"]
        return {**body, "score.weight": head[:num_labels]}

    def inputs(self, name: str) -> dict[str, Any]:
        return self._resolved(self.cases[name]["inputs"])

    def outputs(self, name: str) -> dict[str, Any]:
        return self._resolved(self.cases[name]["outputs"])

    def _resolved(self, values: dict[str, Any]) -> dict[str, Any]:
        return {key: self._tensors[v] if isinstance(v, str) and v in self._tensors else v for key, v in values.items()}
