"""What may lie in a folder of model files, of either kind: what --force may replace, and nothing else.

Names alone decide. What the converters, save_pretrained or the training framework make of a model is here; what a
person writes or cannot make again (notes, README.md, optimizer states, folders) is not.
"""

from __future__ import annotations

import re
from pathlib import Path

SHARD = r"model_(tp\d+|wp\d+|tp\d+_wp\d+)_pp\d+"
WEIGHTS = re.compile(rf"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin|{SHARD}\.pt", re.ASCII)
BESIDE_WEIGHTS = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|tokenizer\.model|chat_template\.(jinja|json)"
    r"|(configuration|modeling|tokenization|chat|compat)_\w+\.py"
    rf"|model_config\.pt|({SHARD}|model_config)(\.pt)?\.md5",
    re.ASCII,
)


def other_files(folder: Path) -> list[str]:
    """The names in `folder` of what is no file of a model, sorted."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if (path.is_dir() and not path.is_symlink())
        or not (WEIGHTS.fullmatch(path.name) or BESIDE_WEIGHTS.fullmatch(path.name))
    )


def has_weight_files(folder: Path) -> bool:
    """Whether `folder` holds a weight file or shard of either kind."""
    return any(WEIGHTS.fullmatch(path.name) for path in folder.iterdir())
