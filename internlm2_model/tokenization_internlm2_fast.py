"""InternLM2's fast tokenizer: tokenizer.json, run by `tokenizers`, with the ids and the text of the slow one.

It has what only such a tokenizer has: `return_offsets_mapping`, `char_to_token`, `return_assistant_tokens_mask`,
batches in threads. It converts nothing: a folder without a tokenizer.json that is true of its tokens, as published
ones are, gets the slow one, whose ids are right by construction.
"""

from __future__ import annotations

import json
import logging
import re
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from .tokenization_internlm2 import (
    InternLM2Tokenizer,
    SequenceMixin,
    around_sequence,
    complete_settings,
    copy_vocabulary,
)

_logger = logging.getLogger(__name__)


class _TokenizerFile(SequenceMixin, PreTrainedTokenizerFast):
    """Holds `__init__`: transformers 5 takes a class that has its own apart and builds it from the vocabulary."""

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    slow_tokenizer_class: Any = InternLM2Tokenizer
    _tokenizer: Any
    _auto_class = "AutoTokenizer"  # save_pretrained copies this file and the slow one's beside the vocabulary

    def __init__(
        self,
        *args: Any,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if sp_model_kwargs:
            raise ValueError(f"{type(self).__name__} has no SentencePiece model for sp_model_kwargs; use the slow one.")
        if not kwargs.get("tokenizer_file") and kwargs.get("tokenizer_object") is None:
            raise ValueError(
                f"{type(self).__name__} is made from tokenizer.json; load a folder with one by from_pretrained or pass "
                f"tokenizer_file. {self.slow_tokenizer_class.__name__} is made from tokenizer.model."
            )
        super().__init__(*args, **kwargs)
        self.vocab_file = kwargs.get("vocab_file")
        self._set_around(add_bos_token, add_eos_token)

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files: dict[str, str | None], *args: Any, **kwargs: Any) -> Any:
        def slow() -> Any:
            return cls.slow_tokenizer_class._from_pretrained(slow_files, *args, **kwargs)

        slow_files = {name: path for name, path in resolved_vocab_files.items() if name != "tokenizer_file"}
        file, config = (resolved_vocab_files.get(name) for name in ("tokenizer_file", "tokenizer_config_file"))
        if file is None or kwargs.get("sp_model_kwargs"):
            return slow()
        settings = json.loads(Path(config).read_text(encoding="utf-8")) if config else {}
        tokenizer = super()._from_pretrained(resolved_vocab_files, *args, **kwargs)
        for index, token in settings.get("added_tokens_decoder", {}).items():
            if tokenizer.convert_tokens_to_ids(token["content"]) != int(index):
                _logger.warning("%s has no %s with the id %s; the slow one is loaded.", file, token["content"], index)
                return slow()
        # transformers 5 drops both settings where there is a tokenizer.json.
        tokenizer._set_around(*(kwargs.get(name, settings.get(name)) for name in ("add_bos_token", "add_eos_token")))
        return tokenizer

    # What stands around a sequence: known from tokenizer.json alone, which is what encodes.

    @property
    def add_bos_token(self) -> bool:
        """Whether `bos_token` is put before every sequence."""
        return self.bos_token in self._around()

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._set_around(value, None)

    @property
    def add_eos_token(self) -> bool:
        """Whether `eos_token` is put after every sequence."""
        return self.eos_token in self._around()

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._set_around(None, value)

    def update_post_processor(self) -> None:
        """Keep what stands around a sequence; transformers 5 calls this, and would set a second `<s>` in a pair."""
        self._set_around(self.add_bos_token, self.add_eos_token)

    def _around(self) -> list[str]:
        processor = self._tokenizer.post_processor
        template = json.loads(processor.__getstate__())["single"] if processor is not None else []
        return [part["SpecialToken"]["id"] for part in template if "SpecialToken" in part]

    def _set_around(self, bos: bool | None, eos: bool | None) -> None:
        self._tokenizer.post_processor = around_sequence(self, bos, eos)

    # Offsets.

    def _convert_encoding(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], list[Any]]:
        columns, encodings = super()._convert_encoding(*args, **kwargs)
        if not self._renamed:
            return columns, encodings
        mended = [_WholeSpans(encoding, self._renamed) for encoding in encodings]
        if "offset_mapping" in columns:
            columns["offset_mapping"] = [encoding.offsets for encoding in mended]
        return columns, mended

    @cached_property
    def _renamed(self) -> dict[int, int]:
        """Length of the piece's own name for each special token that has another; tokenizer.json replaces the one."""
        normalizer = self._tokenizer.normalizer
        steps = json.loads(normalizer.__getstate__()).get("normalizers", []) if normalizer is not None else []
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        names = {step["content"]: _literal(step["pattern"]) for step in steps if step["type"] == "Replace"}
        return {ids[token]: len(piece) for token, piece in names.items() if piece != " " and token in ids}

    # Saving.

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> Any:
        """Copy `tokenizer.model` into a folder, if there is one, and return the paths written."""
        if self.vocab_file is None or not Path(self.vocab_file).is_file():
            return ()
        return (copy_vocabulary(Path(self.vocab_file), save_directory, filename_prefix),)

    def _save_pretrained(
        self,
        save_directory: str | PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        added = {
            str(index): token.__getstate__()
            for index, token in sorted(self.added_tokens_decoder.items())
            if token.special or index >= self.vocab_size  # the others are pieces of tokenizer.model
        }
        complete_settings(
            Path(file_names[0]),
            self,
            added_tokens_decoder=added,
            tokenizer_class=self.slow_tokenizer_class.__name__,
        )
        written = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return tuple(dict.fromkeys((*written, *self.save_vocabulary(str(save_directory), filename_prefix))))


class InternLM2TokenizerFast(_TokenizerFile):
    """Fast tokenizer of the InternLM2 models; a folder without tokenizer.json gives an `InternLM2Tokenizer` instead.

    Args:
        tokenizer_file: path of `tokenizer.json`.
        vocab_file: path of `tokenizer.model`, to save it again; may be missing.
        add_bos_token: put `bos_token` before every sequence; None: as saved.
        add_eos_token: put `eos_token` after every sequence; None: as saved.
        sp_model_kwargs: only the slow tokenizer takes them; `from_pretrained` then gives that one.

    Raises:
        ValueError: there is no tokenizer.json to make it from, or `sp_model_kwargs`.
    """


def _literal(pattern: dict[str, str]) -> str:
    """Return the only text that a Replace step is for; " " where its expression fits others."""
    if "String" in pattern:
        return pattern["String"]
    text = re.sub(r"\\(.)", r"\1", pattern["Regex"])
    return text if re.escape(text) == pattern["Regex"] else " "


class _WholeSpans:
    """An encoding in which a renamed special token spans its piece's whole name, as `[UNUSED_TOKEN_146]` in the text.

    `tokenizers` keeps only the last character of what it replaced.
    """

    def __init__(self, encoding: Encoding, lengths: dict[int, int]) -> None:
        self._encoding, self._lengths = encoding, lengths

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for while it is unpickled
            raise AttributeError(name)
        return getattr(self._encoding, name)

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """(start, end) of every token in its text, in characters."""
        spans = zip(self._encoding.ids, self._encoding.offsets, strict=True)
        return [
            (end - self._lengths[index], end) if end - start == 1 and index in self._lengths else (start, end)
            for index, (start, end) in spans
        ]

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        """Return (start, end) of a token, None for one that stands for no text."""
        return None if self._encoding.token_to_chars(token_index) is None else self.offsets[token_index]

    def char_to_token(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """Return the first token that spans a character of a sequence."""
        found = self._encoding.char_to_token(char_pos, sequence_index)
        if found is not None:
            return found
        spans = zip(self._encoding.sequence_ids, self.offsets, strict=True)
        inside = (
            i for i, (text, (start, end)) in enumerate(spans) if text == sequence_index and start <= char_pos < end
        )
        return next(inside, None)
