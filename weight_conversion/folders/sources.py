"""What --src is: a Hugging Face folder, a training checkpoint, or neither, and then what to give instead."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConversionError
from .grid import STEP, holds_shards, where_shards_are
from .hf_folder import CONFIG, FORMATS, has_weights

EITHER = f"a Hugging Face folder, or {STEP}"


def is_checkpoint(folder: Path) -> bool:
    """Whether revert takes `folder` for a training checkpoint; ConversionError where it is no source of either kind.

    With config.json and weights beside the shards it is a Hugging Face folder; a config.json alone does not make one.
    """
    _check_folder(folder, EITHER)
    has_config, weights = os.path.lexists(folder / CONFIG), _holds_hf_weights(folder)
    if holds_shards(folder):
        return not (has_config and weights)
    if not has_config and not weights:
        raise ConversionError(
            f"{folder} holds neither {CONFIG} nor shards of training. --src takes {EITHER}.{where_shards_are(folder)}"
        )
    return False


def check_checkpoint(folder: Path) -> None:
    """ConversionError where `folder` is none, or is a Hugging Face folder, which needs no converting."""
    _check_folder(folder, STEP)
    if _holds_hf_weights(folder) and not holds_shards(folder):
        raise ConversionError(
            f"{folder} holds no shards of training: it is a Hugging Face folder already (revert_*.py takes it). --src "
            f"takes {STEP}.{where_shards_are(folder)}"
        )


def _check_folder(folder: Path, taken: str) -> None:
    if folder.is_dir():
        return
    if folder.is_file():
        raise ConversionError(f"{folder} is not a folder. --src takes {taken}: give {folder.parent}.")
    raise ConversionError(f"{folder} is not a folder, or is missing. --src takes {taken}.")


def _holds_hf_weights(folder: Path) -> bool:
    return any(has_weights(folder, weights) for weights in FORMATS)
