"""`make demo`, the first thing that somebody runs."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.pages.pages import REPOSITORY


def test_the_demo_takes_both_families_there_and_back() -> None:
    done = subprocess.run(
        [sys.executable, "tests/pages/demo.py"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    compared = re.findall(r"there and back: (\d+) tensors equal bit for bit, (\d+) different", done.stdout)
    assert len(compared) == 2
    assert all(int(same) > 20 and different == "0" for same, different in compared)
    assert float(re.findall(r"logits: largest difference .* (\S+e-\d+)", done.stdout)[0]) < 1e-4
