"""InternLM2's tokenizer: a SentencePiece model with special tokens split off first.

Text is cut at the added tokens (`<s>`, `</s>`, the chat tokens), and what lies between goes through the
SentencePiece model unchanged. Decoding is the inverse: added tokens stand for themselves, and every run of other
tokens is decoded by SentencePiece, so that decode(encode(text)) is the text, spaces included.

The file stands alone: it needs nothing of this folder, and no torch.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizer

_logger = logging.getLogger(__name__)


class SequenceMixin:
    """What stands around a sequence, the same for the slow and the fast tokenizer."""

    add_bos_token: bool
    add_eos_token: bool

    def build_inputs_with_special_tokens(
        self: Any, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return `<s> first second </s>`, with each end token only where it is switched on."""
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [self.eos_token_id] if self.add_eos_token else []
        return start + token_ids_0 + (token_ids_1 or []) + end

    def get_special_tokens_mask(
        self: Any,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 for every special token and 0 for every other token, one number per token of the sequence."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)  # type: ignore[misc]
        content = [0] * (len(token_ids_0) + len(token_ids_1 or []))
        return [1] * self.add_bos_token + content + [1] * self.add_eos_token

    def create_token_type_ids_from_sequences(
        self: Any, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return zeros: InternLM2 has no segment embedding."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))


class InternLM2Tokenizer(SequenceMixin, PreTrainedTokenizer):
    """SentencePiece tokenizer of the InternLM2 models (92544 pieces; ids 0, 1, 2 are `<unk>`, `<s>`, `</s>`).

    Args:
        vocab_file: path of `tokenizer.model`.
        unk_token, bos_token, eos_token, pad_token: special tokens; padding uses `</s>` unless told otherwise.
        add_bos_token: put `bos_token` before every sequence; None: as saved beside `vocab_file`, else True.
        add_eos_token: put `eos_token` after every sequence; None: as saved beside `vocab_file`, else False.
        sp_model_kwargs: further arguments of `sentencepiece.SentencePieceProcessor`.

    Raises:
        ValueError: `vocab_file` is missing.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - a name that transformers reads
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    _auto_class = "AutoTokenizer"  # save_pretrained copies this file beside the vocabulary
    tokens_trie: Any

    def __init__(
        self,
        vocab_file: str | None = None,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        pad_token: str = "</s>",
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None or not Path(vocab_file).is_file():
            raise ValueError(
                f"The SentencePiece model of {type(self).__name__} is missing (vocab_file: {vocab_file}); "
                "put tokenizer.model beside tokenizer_config.json."
            )
        self.vocab_file = vocab_file
        self.sp_model_kwargs = sp_model_kwargs or {}
        # The base class asks for the vocabulary while it is built, so the model comes first.
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file), **self.sp_model_kwargs)
        self._pieces: list[str] = self.sp_model.id_to_piece(list(range(self.sp_model.vocab_size())))
        self._piece_ids = {piece: index for index, piece in enumerate(self._pieces)}
        self._unk_index = self.sp_model.unk_id()
        saved = _saved_settings(Path(vocab_file))
        self.add_bos_token = saved.get("add_bos_token", True) if add_bos_token is None else add_bos_token
        self.add_eos_token = saved.get("add_eos_token", False) if add_eos_token is None else add_eos_token
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            # Named here because what the base class is given is what save_pretrained writes.
            add_bos_token=self.add_bos_token,
            add_eos_token=self.add_eos_token,
            sp_model_kwargs=self.sp_model_kwargs,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Number of SentencePiece pieces; tokens added later are not counted."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token; an added token on a piece's id replaces that piece's name."""
        names = list(self._pieces)
        for index, token in self._added_tokens_decoder.items():
            if index < len(names):
                names[index] = token.content
        return {name: index for index, name in enumerate(names)} | self._added_tokens_encoder

    def _update_trie(self, unique_no_split_tokens: Iterable[str] | None = None) -> None:
        added = {token.content for token in self._added_tokens_decoder.values()}
        self.tokens_trie = _Cutter(added.union(unique_no_split_tokens or ()))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token, or the ids of several; unknown ones get the id of `unk_token`."""
        if not isinstance(tokens, (list, tuple)):
            return super().convert_tokens_to_ids(tokens)
        # The base class calls two methods per token, which takes longer than SentencePiece does.
        added, pieces, unk = self._added_tokens_encoder, self._piece_ids, self._unk_index
        return [added[token] if token in added else pieces.get(token, unk) for token in tokens]

    def _encode_plus(self, *args: Any, return_offsets_mapping: bool = False, **kwargs: Any) -> Any:
        if return_offsets_mapping:  # transformers 5 drops it
            raise self._only_fast("return_offsets_mapping")
        return super()._encode_plus(*args, **kwargs)

    def apply_chat_template(self, *args: Any, return_assistant_tokens_mask: bool = False, **kwargs: Any) -> Any:
        """See PreTrainedTokenizerBase. NotImplementedError if return_assistant_tokens_mask, which needs offsets."""
        if return_assistant_tokens_mask:  # a TypeError from within transformers 5.24
            raise self._only_fast("return_assistant_tokens_mask")
        return super().apply_chat_template(*args, **kwargs)

    def _only_fast(self, argument: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__} has no {argument}; load a folder that holds tokenizer.json with "
            "AutoTokenizer, which gives the fast tokenizer, or with PreTrainedTokenizerFast."
        )

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self._piece_ids.get(token, self._unk_index)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._pieces):
            raise IndexError(f"Token id {index} is outside the vocabulary of {len(self._pieces)} pieces.")
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Join tokens into text: added tokens as they are, runs of pieces decoded by SentencePiece."""
        return "".join(
            "".join(run) if is_added else self.sp_model.decode_pieces(list(run))
            for is_added, run in groupby(tokens, key=self._added_tokens_encoder.__contains__)
        )

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        clean_up = clean_up_tokenization_spaces
        if self.clean_up_tokenization_spaces if clean_up is None else clean_up:
            return super()._decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces=True, **kwargs)
        # The base class of transformers 4 looks the special tokens up again for every token, and sets added tokens
        # apart with spaces that the text never had.
        special = (index for index, token in self._added_tokens_decoder.items() if token.special)
        hidden = {*self.all_special_ids, *special} if skip_special_tokens else ()
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.convert_tokens_to_string(self.convert_ids_to_tokens([i for i in ids if i not in hidden]))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy `tokenizer.model` into a folder and return the path written."""
        source = Path(self.vocab_file)
        if source.is_file():
            return (copy_vocabulary(source, save_directory, filename_prefix),)
        target = _vocabulary_path(save_directory, filename_prefix)  # unpickled elsewhere: only the loaded model is left
        target.write_bytes(self.sp_model.serialized_model_proto())
        return (str(target),)

    def _save_pretrained(
        self, save_directory: str | PathLike[str], file_names: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        config = Path(file_names[0])
        complete_settings(config, self)
        written = super()._save_pretrained(save_directory, file_names, *args, **kwargs)
        source = Path(self.vocab_file).with_name("tokenizer.json")
        target = config.with_name(config.name.replace("tokenizer_config", "tokenizer"))
        return written + _save_fast_file(source, target, self)


class _Cutter:
    """Cuts text at the added tokens, the leftmost and longest first, as `tokenizers` does.

    It stands in for transformers' Trie, which goes through the text character by character in Python.
    """

    def __init__(self, tokens: set[str]) -> None:
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        starts = "".join({re.escape(token[0]) for token in longest_first})
        names = "|".join(map(re.escape, longest_first))
        self._pattern = re.compile(f"(?=[{starts}])({names})" if longest_first else "(?!)")

    def split(self, text: str) -> list[str]:
        """Return the parts of a text, none of them empty."""
        return list(filter(None, self._pattern.split(text)))


# transformers 5 leaves add_bos_token and add_eos_token out of the tokenizer_config.json it saves, and drops them from
# the one it loads if a tokenizer.json lies beside it; its list `extra_special_tokens` stops transformers 4.


def _saved_settings(vocab_file: Path) -> dict[str, Any]:
    config = vocab_file.with_name("tokenizer_config.json")
    return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}


def complete_settings(config: Path, tokenizer: SequenceMixin, **more: Any) -> dict[str, Any]:
    """Add to a saved tokenizer_config.json what is missing, and return what it says now."""
    settings = json.loads(config.read_text(encoding="utf-8")) | more
    settings["add_bos_token"] = tokenizer.add_bos_token
    settings["add_eos_token"] = tokenizer.add_eos_token
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return settings


def _vocabulary_path(folder: str, prefix: str | None) -> Path:
    return Path(folder) / (f"{prefix}-tokenizer.model" if prefix else "tokenizer.model")


def copy_vocabulary(source: Path, folder: str, prefix: str | None) -> str:
    """Copy a tokenizer.model into a folder and return its path there."""
    target = _vocabulary_path(folder, prefix)
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)
    return str(target)


# Readers without this code, transformers 5.3 to 5.11 among them, need tokenizer.json; the base class does not save it.


def _save_fast_file(source: Path, target: Path, slow: InternLM2Tokenizer) -> tuple[str, ...]:
    """Save the tokenizer.json of the folder that `slow` came from, with the tokens and settings that it has by now.

    Return the path written. One that would not be true of `slow` is left out with a warning, and removed where it lies,
    for it would be believed.
    """
    if not source.is_file():
        target.unlink(missing_ok=True)
        return ()
    fast = tokenizers.Tokenizer.from_file(str(source))
    before = fast.to_str()
    reason = _bring_up_to_date(fast, slow)
    if reason is not None:
        _logger.warning("%s was left out, because %s; the folder gives the slow tokenizer only.", target, reason)
        target.unlink(missing_ok=True)
        return ()
    if fast.to_str() != before:
        fast.save(str(target))
    elif source.resolve() != target.resolve():
        shutil.copyfile(source, target)
    return (str(target),)


def _bring_up_to_date(fast: tokenizers.Tokenizer, slow: InternLM2Tokenizer) -> str | None:
    """Give `fast` the added tokens and the start and end tokens of `slow`; say what it cannot follow, or None."""
    known = fast.get_added_tokens_decoder()
    for index, token in sorted(slow.added_tokens_decoder.items()):
        if index in known and (known[index].content, known[index].special) == (token.content, token.special):
            continue
        (fast.add_special_tokens if token.special else fast.add_tokens)([token])
        if fast.token_to_id(token.content) != index:
            return f"{token.content!r} cannot have the id {index} in it"
    fast.post_processor = around_sequence(slow)
    names = [token.content for token in slow.added_tokens_decoder.values()]
    for text in ["", *(text for name in names for text in (name, f"a{name}b", f" {name} {name}\n", name + name))]:
        expected = slow(text)["input_ids"]
        if fast.encode(text).ids != expected:
            return f"the text {text!r} becomes other ids in it"
        if fast.decode(expected, skip_special_tokens=False) != slow.decode(expected):
            return f"the ids of the text {text!r} become another text in it"
    return None


def around_sequence(tokenizer: Any, bos: bool | None = None, eos: bool | None = None) -> TemplateProcessing:
    """Put `bos_token` before and `eos_token` after every sequence; None: as `tokenizer` does."""
    start = tokenizer.bos_token if (tokenizer.add_bos_token if bos is None else bos) else None
    end = tokenizer.eos_token if (tokenizer.add_eos_token if eos is None else eos) else None
    names = dict.fromkeys(name for name in (start, end) if name is not None)
    return TemplateProcessing(
        single=[name for name in (start, "$A", end) if name is not None],
        pair=[name for name in (start, "$A", "$B", end) if name is not None],
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
