"""transformers without a name that the packages take from it: the right tokens, or a sentence at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRILL = Path(__file__).with_name("drill.py")
VERSIONS = "This model code was tried on transformers 4.57.6 to"

# What has no substitute; everything else gives the right tokens.
REFUSED = {"modeling_utils.ALL_ATTENTION_FUNCTIONS is gone", "the outputs hold no cache"}


def drilled(what: str) -> dict[str, str]:
    path = os.pathsep.join((str(DRILL.parents[2]), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(DRILL), what], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="every case runs in a fork")
def test_no_internal_name_is_missed_without_a_sentence() -> None:
    found = drilled("hidden")
    assert {title for title, result in found.items() if result != "right"} == REFUSED, found
    for title in REFUSED:
        assert found[title].startswith("ImportError: transformers "), found[title]
        assert VERSIONS in found[title]


def test_the_cache_may_have_any_name() -> None:
    assert drilled("renamed") == {"the cache is called memory": "right"}
