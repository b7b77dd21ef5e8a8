"""What the tests of conversions share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tokenizer_fixture import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
