"""What may lie in a folder of model files, of each kind: what --force may replace, and nothing else.

Names alone decide. What the converters, save_pretrained or the training framework make of a model is here; what a
person writes or cannot make again (notes, README.md, optimizer states, folders) is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SHARD = r"model_(tp\d+|wp\d+|tp\d+_wp\d+)_pp\d+"
MODULE = re.compile(r"(configuration|modeling|tokenization|chat|compat)_\w+\.py", re.ASCII)
PACKAGE = "__init__.py"
"""Makes a package of a model's own modules; elsewhere it is a program of somebody."""


@dataclass(frozen=True)
class Kind:
    """A kind of folder, by the names of its weights and of what lies beside them."""

    name: str
    weights: re.Pattern[str]
    beside: re.Pattern[str]

    def weight_files(self, folder: Path) -> list[str]:
        """The names of the weights of this kind in `folder`, sorted."""
        return sorted(path.name for path in folder.iterdir() if self.weights.fullmatch(path.name))

    def other_files(self, folder: Path) -> list[str]:
        """The names in `folder` of what is no file of a model of this kind, sorted."""
        paths = list(folder.iterdir())
        known = {path.name for path in paths if self.weights.fullmatch(path.name) or self.beside.fullmatch(path.name)}
        if any(MODULE.fullmatch(name) for name in known):
            known.add(PACKAGE)
        return sorted(path.name for path in paths if path.name not in known or _is_real_folder(path))


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


HUGGING_FACE = Kind(
    "Hugging Face folder",
    re.compile(r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin", re.ASCII),
    re.compile(
        r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
        r"|(model\.safetensors|pytorch_model\.bin)\.index\.json"
        rf"|tokenizer\.model|chat_template\.(jinja|json)|{MODULE.pattern}",
        re.ASCII,
    ),
)
CHECKPOINT = Kind(
    "training checkpoint",
    re.compile(rf"{SHARD}\.pt", re.ASCII),
    re.compile(rf"model_config\.pt|({SHARD}|model_config)(\.pt)?\.md5", re.ASCII),
)
KINDS = (HUGGING_FACE, CHECKPOINT)
