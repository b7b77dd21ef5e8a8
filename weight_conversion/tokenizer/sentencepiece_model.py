"""Read a SentencePiece model file: its pieces with their kinds and scores, and how it treats text.

The file is one protobuf message. The few fields that matter here are read directly, since the `sentencepiece` package
does not tell which pieces are user-defined, and its own message classes need the protobuf package.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """A model file in memory: `data` is the file, byte for byte."""

    path: Path
    data: bytes
    pieces: list[Piece]
    processor: sentencepiece.SentencePieceProcessor
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
        sentencepiece.SetMinLogLevel(2)  # errors only: it warns of the NUL piece that both families have
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
            message = list(_fields(data))
            pieces = _pieces(message, processor)
            trainer, normalizer = _group(message, _TRAINER), _group(message, _NORMALIZER)
        except Exception as error:  # a damaged model raises many kinds of errors
            raise ConversionError(
                f"{path} is not a SentencePiece model ({len(data)} bytes); "
                "pass the tokenizer.model that the training data was tokenized with."
            ) from error
        return cls(
            path=path,
            data=data,
            pieces=pieces,
            processor=processor,
            is_bpe=trainer.get(_MODEL_TYPE) == _BPE,
            adds_prefix_space=bool(normalizer.get(_DUMMY_PREFIX, 1)),
            keeps_text=(
                not normalizer.get(_CHARSMAP)
                and not normalizer.get(_DUMMY_PREFIX, 1)
                and not normalizer.get(_EXTRA_WHITESPACES, 1)
                and bool(normalizer.get(_ESCAPE_WHITESPACES, 1))
            ),
        )


def _pieces(message: list[tuple[int, Any]], processor: sentencepiece.SentencePieceProcessor) -> list[Piece]:
    pieces = []
    for number, value in message:
        if number == _PIECES:
            fields = dict(_fields(value))
            (score,) = struct.unpack("<f", fields.get(_PIECE_SCORE, bytes(4)))
            pieces.append(Piece(fields[_PIECE_TEXT].decode(), score, Kind(fields.get(_PIECE_KIND, Kind.NORMAL))))
    # The library itself sets pieces aside, such as the NUL character of a model that also has bytes.
    unused = processor.is_unused(list(range(len(pieces))))
    return [
        Piece(piece.text, piece.score, Kind.UNUSED) if is_unused else piece
        for piece, is_unused in zip(pieces, unused, strict=True)
    ]


def _group(message: list[tuple[int, Any]], wanted: int) -> dict[int, Any]:
    return {number: value for field, group in message if field == wanted for number, value in _fields(group)}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message: an int for a varint, else the bytes of the value."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire_type = tag & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire_type == 2:
            size, at = _varint(message, at)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"Wire type {wire_type} at byte {at} is not one of protobuf's.")
        if at + size > len(message):
            raise ValueError(f"A field of {size} bytes at byte {at} runs past the end, {len(message)}.")
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
