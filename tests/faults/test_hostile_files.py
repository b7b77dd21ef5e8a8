"""No code in a source is run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.changes import B, D, refused
from tests.faults.fault_harness import run_script
from tests.faults.fault_moments import Place
from tests.faults.hostile_pickles import HOSTILE, hostile_surroundings, in_dict, write_archive
from tests.support.conversions import save_as_bin


def hostile_shard(place: Place, pickled: bytes) -> tuple[str, list[str]]:
    write_archive(place.source / D, pickled)
    return place.convert_command()


def hostile_config(place: Place, pickled: bytes) -> tuple[str, list[str]]:
    write_archive(place.source / "model_config.pt", pickled)
    return place.convert_command()


def hostile_bin(place: Place, pickled: bytes) -> tuple[str, list[str]]:
    save_as_bin(place.hf)
    write_archive(place.hf / "pytorch_model-00001-of-00002.bin", pickled)
    return place.revert_command()


@pytest.mark.parametrize("payload", HOSTILE)
@pytest.mark.parametrize("plant", [hostile_shard, hostile_config, hostile_bin])
def test_no_pickle_of_a_source_runs_anything(
    plant: Callable[[Place, bytes], tuple[str, list[str]]], payload: str, place: Place, tmp_path: Path
) -> None:
    with hostile_surroundings(tmp_path, on_import=payload.startswith("import")) as marker:
        for pickled in (HOSTILE[payload](marker), in_dict(HOSTILE[payload](marker))):
            refused(place, plant(place, pickled), "Nothing in it was run")
    assert not marker.exists()


def test_a_bare_pickle_for_a_shard_runs_nothing(place: Place, tmp_path: Path) -> None:
    """torch before 1.6 wrote bare pickles; they are not read."""
    with hostile_surroundings(tmp_path, on_import=False) as marker:
        (place.source / B).write_bytes(HOSTILE["os.system"](marker))
        refused(place, place.convert_command(), B)
    assert not marker.exists()


def test_code_in_a_folder_is_not_run(place: Place, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for path in [*place.hf.glob("*.py"), place.hf / "sitecustomize.py", place.source / "model_config.py"]:
        path.write_text(f"open({str(marker)!r}, 'w')")
    assert run_script(*place.revert_command()).status == 0
    shutil.rmtree(place.target)
    assert run_script(*place.convert_command()).status == 0
    assert not marker.exists()
