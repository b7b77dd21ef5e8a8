"""Read a SentencePiece model file: its pieces with their kinds and scores, and how it treats text.

The file is one protobuf message. The few fields that matter here are read directly, since the `sentencepiece` package
does not tell which pieces are user-defined, and its own message classes need the protobuf package.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from ..errors import ConversionError
from ..files.kinds import check_regular

# Fields of sentencepiece_model.proto by their tags, number << 3 | wire type: a field of a known number and another type
# is an unknown one, which protobuf passes over.
_VARINT, _BYTES, _FOUR_BYTES = 0, 2, 5
_PIECES, _TRAINER, _NORMALIZER = (number << 3 | _BYTES for number in (1, 2, 3))
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1 << 3 | _BYTES, 2 << 3 | _FOUR_BYTES, 3 << 3 | _VARINT
_MODEL_TYPE, _BPE = 3 << 3 | _VARINT, 2
_CHARSMAP = 2 << 3 | _BYTES
_DUMMY_PREFIX, _EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = (number << 3 | _VARINT for number in (3, 4, 5))


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
        path = _model_file(path)
        data = path.read_bytes()
        try:
            _field(data, 0)  # most files of another kind end here, before the library makes copies
            unused = _unused(data)  # first: the library gives back the memory that the pieces then take
            pieces, trainer, normalizer = _contents(data)
            scores = _little_endian(pieces.scores)
            if not len(unused) == len(pieces.texts) == len(scores):
                raise ValueError(f"{len(unused)} pieces, {len(pieces.texts)} texts and {len(scores)} scores.")
        except MemoryError:
            raise
        except Exception as error:  # a damaged model raises many kinds of errors
            raise ConversionError(
                f"{path} is not a SentencePiece model ({len(data)} bytes); "
                "pass the tokenizer.model that the training data was tokenized with."
            ) from error
        return cls(
            path=path,
            data=data,
            texts=pieces.texts,
            scores=scores,
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


def _model_file(path: Path) -> Path:
    """Return the model file that `path` is, or holds; ConversionError if there is none, or no regular one."""
    path = path / "tokenizer.model" if path.is_dir() else path
    if path.exists() and not path.is_dir():
        check_regular(path)
    if not path.is_file():
        raise ConversionError(
            f"The tokenizer {path} does not exist; pass the SentencePiece model (tokenizer.model) "
            "that the training data was tokenized with, or the folder that holds it."
        )
    return path


def _processor(data: bytes) -> sentencepiece.SentencePieceProcessor:
    sentencepiece.SetMinLogLevel(2)  # errors only: it warns of the NUL piece that both families have
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    return processor


def _unused(data: bytes) -> bytearray:
    """Return for every id, whether its piece is set aside: in the file, or by the library itself.

    It sets aside the NUL character of a model that also has bytes.
    """
    processor = _processor(data)
    unused, count = bytearray(), processor.get_piece_size()
    for start in range(0, count, _BATCH):  # lists of all ids, and of as many answers, take 4 MB
        unused += bytearray(processor.is_unused(list(range(start, min(start + _BATCH, count)))))
    del processor
    _give_back_memory()
    return unused


_BATCH = 1000


def _give_back_memory() -> None:
    """Return freed memory to the system where the C library is glibc, which keeps it otherwise: 8 MB of a processor."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _little_endian(data: bytearray) -> array[float]:
    """Return the floats that lie in `data` as in a file."""
    floats = array("f")
    floats.frombytes(data)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats


@dataclass
class _Pieces:
    texts: list[str] = field(default_factory=list)
    scores: bytearray = field(default_factory=bytearray)  # as they lie in the file: little-endian floats
    kinds: list[Kind] = field(default_factory=list)

    def add(self, message: bytes) -> None:
        text, score, kind = b"", bytes(4), Kind.NORMAL
        for tag, value in _fields(message):
            if tag == _PIECE_TEXT:
                text = value
            elif tag == _PIECE_SCORE:
                score = value
            elif tag == _PIECE_KIND:
                kind = _KINDS[value]
        self.texts.append(text.decode())
        self.scores += score
        self.kinds.append(kind)

    def add_usual(self, data: bytes, at: int) -> int:
        """Add the pieces that follow each other from byte `at` as the trainer writes them; return the byte after them.

        0A size, 0A length text, 15 score, and 18 kind unless it is NORMAL, with sizes of one byte. Field by field, a
        vocabulary takes three times as long.
        """
        end = len(data)
        while at + 8 < end and data[at] == 0x0A and data[at + 2] == 0x0A:
            size, length = data[at + 1], data[at + 3]
            score, following = at + 5 + length, at + 2 + size
            if size > 0x7F or following > end or following < score + 4 or data[score - 1] != 0x15:
                break
            kind = Kind.NORMAL
            if following == score + 6 and data[score + 4] == 0x18:
                kind = _KINDS[data[score + 5]]
            elif following != score + 4:
                break
            self.texts.append(data[at + 4 : score - 1].decode())
            self.scores += data[score : score + 4]
            self.kinds.append(kind)
            at = following
        return at


_KINDS = {int(kind): kind for kind in Kind}


def _contents(data: bytes) -> tuple[_Pieces, dict[int, Any], dict[int, Any]]:
    """Return the pieces, and the fields of the trainer and of the normalizer by their tags."""
    pieces = _Pieces()
    groups: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}}
    at = 0
    while (at := pieces.add_usual(data, at)) < len(data):
        tag, value, at = _field(data, at)
        if tag == _PIECES:
            pieces.add(value)
        elif tag in groups:
            groups[tag].update(_fields(value))
    return pieces, groups[_TRAINER], groups[_NORMALIZER]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (tag, value) of each field of a protobuf message: an int for a varint, else the bytes of the value."""
    at = 0
    while at < len(message):
        tag, value, at = _field(message, at)
        yield tag, value


def _field(message: bytes, at: int) -> tuple[int, Any, int]:
    """Return tag and value of the field that starts at byte `at`, and the byte after it."""
    tag, at = _varint(message, at)
    tag &= 0xFFFFFFFF  # as protobuf cuts them
    wire_type = tag & 7
    if not tag >> 3:
        raise ValueError(f"Field number 0 at byte {at} is not one of protobuf's.")
    if wire_type == _VARINT:
        value, at = _varint(message, at)
        return tag, value, at
    if wire_type == _BYTES:
        size, at = _varint(message, at)
    elif wire_type in (1, _FOUR_BYTES):
        size = 8 if wire_type == 1 else 4
    else:
        raise ValueError(f"Wire type {wire_type} at byte {at} is not one of protobuf's.")
    if at + size > len(message):
        raise ValueError(f"A field of {size} bytes at byte {at} runs past the end, {len(message)}.")
    return tag, message[at : at + size], at + size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number that starts at byte `at`, and the byte after it."""
    number = message[at] & 0x7F
    shift = 7
    while message[at] & 0x80:
        at += 1
        number |= (message[at] & 0x7F) << shift
        shift += 7
    return number, at + 1
