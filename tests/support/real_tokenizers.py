"""The real tokenizer models and what the reference tokenizers make of them, where they lie beside the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"
FAMILIES = ("internlm", "internlm2")


def real_model(family: str) -> Path:
    """The tokenizer.model of a family; skips the test where it is absent."""
    path = SHARED / "tokenizers" / f"tokenizer_{family}.model"
    if not path.is_file():
        pytest.skip("needs the real tokenizer models beside the repository (../shared/tokenizers)")
    return path


def golden_cases(name: str) -> list[dict[str, Any]]:
    """Recorded (text, ids, tokens, decoded) cases: internlm, internlm2 or internlm2_chat."""
    path = SHARED / "golden" / f"tokenizer_{name}.json"
    if not path.is_file():
        pytest.skip("needs the recorded tokenizer cases beside the repository (../shared/golden)")
    return json.loads(path.read_text(encoding="utf-8"))
