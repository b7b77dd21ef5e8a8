"""How a tokenizer.model becomes the tokenizer files of a Hugging Face folder.

    tokenizer.model           the SentencePiece model, copied byte for byte
    tokenizer_config.json     the class, its special tokens and settings
    special_tokens_map.json   the special tokens again, for transformers 4
    tokenizer.json            the fast form, written only after it gave the same ids and text as the model
    chat_template.jinja       with chat only; transformers 5 reads this one, older tools the copy in the config

`auto_map` names the slow class and, where there is a tokenizer.json, the fast one that reads it, which is what every
version then takes. Transformers 5.3 to 5.11 read tokenizer.json with their own class in the place of InternLM2's.

A folder without code has no slow class: its class is transformers' own PreTrainedTokenizerFast, which takes
tokenizer.json as it is (LlamaTokenizer would make the tokenizer anew, by the rules of another model). So tokenizer.json
must be there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConversionError, shown
from .prepared import TokenizerFiles
from .sentencepiece_model import Kind, Piece, SentencePieceModel
from .specs import TokenizerSpec
from .tokenizer_json import SpecialTokens, difference, obstacle, tokenizer_json

TOKENIZER_CONFIG = "tokenizer_config.json"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
_NO_LIMIT = int(1e30)  # transformers' way to say that the tokenizer sets no length


MOST_NAMED = 50
"""Tokens that a warning lists."""


class Tokenizer:
    """A SentencePiece model whose files can be written into a Hugging Face folder."""

    def __init__(self, model: SentencePieceModel, left_out: Sequence[str] = ()) -> None:
        self._model = model
        self._left_out = left_out
        self._fast_forms: dict[tuple[TokenizerSpec, bool], tuple[bytes, str | None]] = {}

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """Read a SentencePiece model, or the `tokenizer.model` in a folder.

        Raises:
            ConversionError: there is no such file, it is no SentencePiece model, ids 0, 1, 2 are not the
                `<unk>`, `<s>`, `</s>` that the model configurations of both families count on, or a
                tokenizer_config.json in the folder cannot be read.
        """
        model = SentencePieceModel.read(path)
        found = tuple(model.texts[:3])
        if found != (UNK, BOS, EOS):
            raise ConversionError(
                f"{model.path} has {', '.join(map(shown, found))} at ids 0, 1, 2; "
                f"InternLM and InternLM2 tokenizers have {UNK}, {BOS}, {EOS} there."
            )
        return cls(model, _tokens_beyond(path / TOKENIZER_CONFIG, len(model)) if path.is_dir() else ())

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return len(self._model)

    def check_chat(self, spec: TokenizerSpec) -> None:
        """Raise ConversionError unless every chat token lies on the piece kept for it."""
        for token in spec.chat_tokens:
            piece = self._model.piece(token.id) if token.id < self.vocab_size else None
            free = piece is not None and piece.kind is Kind.USER_DEFINED and piece.text in (token.piece, token.content)
            if not free:
                raise ConversionError(
                    f"The chat token {token.content} belongs on id {token.id}, on the user-defined piece "
                    f"{token.piece}, but {self._model.path} {self._has(piece)}; convert without --chat, or pass the "
                    "tokenizer of the family."
                )

    def _has(self, piece: Piece | None) -> str:
        if piece is None:
            return f"has {self.vocab_size} pieces"
        return f"has {shown(piece.text)} ({piece.kind.name.lower().replace('_', '-')}) there"

    def check_without_code(self, spec: TokenizerSpec, chat: bool) -> None:
        """Raise ConversionError unless there can be a tokenizer.json, which is all that a folder without code has."""
        _, reason = self._fast(spec, chat)
        if reason is not None:
            raise ConversionError(
                f"{self._model.path} has no tokenizer that loads without remote code, because {reason}; "
                "convert without --format llama."
            )

    def files(self, spec: TokenizerSpec, chat: bool) -> TokenizerFiles:
        """Return the tokenizer files, and a warning of everything that had to be left out.

        `check_chat` must have passed if `chat`.
        """
        content, reason = self._fast(spec, chat)
        contents = {"tokenizer.json": content} if reason is None else {}
        contents["tokenizer.model"] = self._model.data
        contents["special_tokens_map.json"] = _json(_special_tokens_map(spec, chat))
        contents[TOKENIZER_CONFIG] = _json(self._config(spec, chat, fast=reason is None))
        if chat:
            contents["chat_template.jinja"] = spec.chat_template.encode()
        return TokenizerFiles(contents, tuple(self._warnings(reason)))

    def _warnings(self, reason: str | None) -> Iterator[str]:
        if self._left_out:
            more = f" and {len(self._left_out) - MOST_NAMED} more" if len(self._left_out) > MOST_NAMED else ""
            yield (
                f"the tokens that {self._model.path.parent} adds to its tokenizer.model were left out: "
                f"{', '.join(map(shown, self._left_out[:MOST_NAMED]))}{more}. "
                "Add them to the new tokenizer with add_tokens, in this order."
            )
        if reason is not None:
            yield (
                f"tokenizer.json was left out, because {reason}; "
                "the tokenizer then needs trust_remote_code=True and is the slow one."
            )

    def _fast(self, spec: TokenizerSpec, chat: bool) -> tuple[bytes, str | None]:
        """Return the content of tokenizer.json and None, or nothing and why there is none; made once."""
        if (spec, chat) not in self._fast_forms:
            self._fast_forms[spec, chat] = self._make_fast(spec, chat)
        return self._fast_forms[spec, chat]

    def _make_fast(self, spec: TokenizerSpec, chat: bool) -> tuple[bytes, str | None]:
        special = self.special_tokens(spec, chat)
        reason = obstacle(self._model)
        if reason is not None:
            return b"", reason
        content = tokenizer_json(self._model, special)
        return content, difference(content, self._model, special)

    def special_tokens(self, spec: TokenizerSpec, chat: bool) -> SpecialTokens:
        """Return the special tokens that the files declare."""
        chat_names = {token.id: token.content for token in spec.chat_tokens} if chat else {}
        return SpecialTokens(names={0: UNK, 1: BOS, 2: EOS} | chat_names, bos=BOS)

    def _config(self, spec: TokenizerSpec, chat: bool, fast: bool) -> dict[str, Any]:
        special = self.special_tokens(spec, chat)
        config: dict[str, Any] = {
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": self._model.adds_prefix_space,  # readers without the model put a space in front else
            "added_tokens_decoder": {
                str(index): {
                    "content": name,
                    "lstrip": False,
                    "normalized": name != self._model.texts[index],  # as in tokenizer.json
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for index, name in special.names.items()
            },
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],  # else the fast class adds token_type_ids
            "model_max_length": _NO_LIMIT,
            "tokenizer_class": spec.class_name,
        } | _special_tokens_map(spec, chat)
        if spec.module is not None:
            config["sp_model_kwargs"] = None
            fast_class = f"{spec.module}_fast.{spec.class_name}Fast" if fast else None
            config["auto_map"] = {"AutoTokenizer": [f"{spec.module}.{spec.class_name}", fast_class]}
        if chat:
            config["chat_template"] = spec.chat_template
        return dict(sorted(config.items()))


def _tokens_beyond(config: Path, size: int) -> list[str]:
    """Return, in the order of their ids, the tokens that a tokenizer_config.json adds after `size` pieces."""
    if not config.is_file():
        return []
    try:
        added = json.loads(config.read_bytes()).get("added_tokens_decoder", {})
        beyond = {int(index): str(token["content"]) for index, token in added.items() if int(index) >= size}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise ConversionError(
            f"{config} is not the JSON of a tokenizer ({type(error).__name__}: {error!s:.200}); "
            "pass the tokenizer.model beside it instead of the folder."
        ) from error
    return [beyond[index] for index in sorted(beyond)]


def _special_tokens_map(spec: TokenizerSpec, chat: bool) -> dict[str, Any]:
    chat_names = {"additional_special_tokens": [token.content for token in spec.chat_tokens]} if chat else {}
    return {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": UNK} | chat_names


def _json(content: dict[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode()
