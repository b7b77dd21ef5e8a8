"""What the tests of faults share: places, to be changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.changes import copied_place
from tests.faults.fault_harness import train_quick_tokenizer
from tests.faults.fault_moments import Place, make_place
from tests.support.conversions import FAMILIES


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Place of each family, to be copied."""
    tokenizer = train_quick_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    return {family: make_place(tmp_path_factory.mktemp(family), family, tokenizer).root for family in FAMILIES}


@pytest.fixture
def place(bases: dict[str, Path]) -> Iterator[Place]:
    with copied_place(bases, "internlm2") as found:
        yield found


@pytest.fixture
def internlm(bases: dict[str, Path]) -> Iterator[Place]:
    with copied_place(bases, "internlm") as found:
        yield found
