"""`make demo`, the first thing that somebody runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.pages.pages import REPOSITORY


def test_the_demo_takes_both_families_there_and_back() -> None:
    done = subprocess.run(
        [sys.executable, "tests/pages/demo.py"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "RANDOM embedding" not in done.stdout + done.stderr
    compared = re.findall(r"there and back: (\d+) tensors equal bit for bit, (\d+) different", done.stdout)
    assert len(compared) == 2
    assert all(int(same) > 20 and different == "0" for same, different in compared)
    assert float(re.findall(r"logits: largest difference .* (\S+e-\d+)", done.stdout)[0]) < 1e-4


def test_an_older_python_is_named_before_anything_is_installed(tmp_path: Path) -> None:
    old = tmp_path / "old_python"
    pretend = "import sys; sys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'; exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n', encoding="utf-8")
    old.chmod(0o755)
    command = ["make", "demo", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode
    assert f"Python 3.11 or newer is needed, but {old} is 3.10.4: name another" in done.stderr
    assert not (tmp_path / "venv").exists()
