"""Read a SentencePiece model file: its pieces with their kinds and scores, and how it treats text.

The file is one protobuf message. The few fields that matter here are read directly, since the `sentencepiece` package
does not tell which pieces are user-defined, and its own message classes need the protobuf package.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from ..errors import ConversionError
from ..files.kinds import check_regular

# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_MODEL_TYPE, _BPE = 3, 2
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5


class Kind(IntEnum):
    """What a piece is for (`ModelProto.SentencePiece.Type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """A model file in memory: `data` is the file, byte for byte.

    `texts`, `scores` and `kinds` have one element for each id: 100,000 objects of a class would take longer to make
    than to use.
    """

    path: Path
    data: bytes
    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[Kind]
    is_bpe: bool
    adds_prefix_space: bool  # a space is put in front of every text
    keeps_text: bool  # no normalisation, no added or removed spaces

    @classmethod
    def read(cls, path: Path) -> SentencePieceModel:
        """Read a model file, or the `tokenizer.model` of a folder; ConversionError if that is not what lies there."""
        path = path / "tokenizer.model" if path.is_dir() else path
        if path.exists() and not path.is_dir():
            check_regular(path)
        if not path.is_file():
            raise ConversionError(
                f"The tokenizer {path} does not exist; pass the SentencePiece model (tokenizer.model) "
                "that the training data was tokenized with, or the folder that holds it."
            )
        data = path.read_bytes()
        try:
            processor = _processor(data)
            pieces, trainer, normalizer = _contents(data)
            # The library itself sets pieces aside, such as the NUL character of a model that also has bytes.
            unused = processor.is_unused(list(range(len(pieces.texts))))
        except Exception as error:  # a damaged model raises many kinds of errors
            raise ConversionError(
                f"{path} is not a SentencePiece model ({len(data)} bytes); "
                "pass the tokenizer.model that the training data was tokenized with."
            ) from error
        return cls(
            path=path,
            data=data,
            texts=pieces.texts,
            scores=array("f", struct.unpack(f"<{len(unused)}f", pieces.scores)),
            kinds=[Kind.UNUSED if is_unused else kind for kind, is_unused in zip(pieces.kinds, unused, strict=True)],
            is_bpe=trainer.get(_MODEL_TYPE) == _BPE,
            adds_prefix_space=bool(normalizer.get(_DUMMY_PREFIX, 1)),
            keeps_text=(
                not normalizer.get(_CHARSMAP)
                and not normalizer.get(_DUMMY_PREFIX, 1)
                and not normalizer.get(_EXTRA_WHITESPACES, 1)
                and bool(normalizer.get(_ESCAPE_WHITESPACES, 1))
            ),
        )

    def __len__(self) -> int:
        return len(self.texts)

    def piece(self, index: int) -> Piece:
        """Return the piece of an id."""
        return Piece(self.texts[index], self.scores[index], self.kinds[index])

    def ids_of(self, kind: Kind) -> list[int]:
        """Return the ids of all pieces of a kind, ascending."""
        return [index for index, found in enumerate(self.kinds) if found is kind]

    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """Load the model with the library, which encodes and decodes with it."""
        return _processor(self.data)


def _processor(data: bytes) -> sentencepiece.SentencePieceProcessor:
    sentencepiece.SetMinLogLevel(2)  # errors only: it warns of the NUL piece that both families have
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    return processor


@dataclass
class _Pieces:
    texts: list[str] = field(default_factory=list)
    scores: bytearray = field(default_factory=bytearray)  # as they lie in the file: little-endian floats
    kinds: list[Kind] = field(default_factory=list)

    def add(self, message: bytes) -> None:
        text, score, kind = b"", bytes(4), Kind.NORMAL
        for number, value in _fields(message):
            if number == _PIECE_TEXT:
                text = value
            elif number == _PIECE_SCORE:
                score = value
            elif number == _PIECE_KIND:
                kind = _KINDS[value]
        self.texts.append(text.decode())
        self.scores += score
        self.kinds.append(kind)


_KINDS = {int(kind): kind for kind in Kind}


def _contents(data: bytes) -> tuple[_Pieces, dict[int, Any], dict[int, Any]]:
    """Return the pieces, and the fields of the trainer and of the normalizer."""
    pieces = _Pieces()
    groups: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}}
    for number, value in _fields(data):
        if number == _PIECES:
            pieces.add(value)
        elif number in groups:
            groups[number].update(_fields(value))
    return pieces, groups[_TRAINER], groups[_NORMALIZER]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message: an int for a varint, else the bytes of the value."""
    at, end = 0, len(message)
    while at < end:
        tag, at = message[at], at + 1
        if tag & 0x80:
            tag, at = _varint(message, at - 1)
        wire_type = tag & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire_type == 2:
            size, at = message[at], at + 1
            if size & 0x80:  # most are of one byte, and a call takes longer than all the rest
                size, at = _varint(message, at - 1)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"Wire type {wire_type} at byte {at} is not one of protobuf's.")
        if at + size > end:
            raise ValueError(f"A field of {size} bytes at byte {at} runs past the end, {end}.")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number that starts at byte `at`, and the byte after it."""
    number = message[at] & 0x7F
    shift = 7
    while message[at] & 0x80:
        at += 1
        number |= (message[at] & 0x7F) << shift
        shift += 7
    return number, at + 1
