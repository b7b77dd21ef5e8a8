"""Small SentencePiece models with the properties of the InternLM ones, for tests and the demo.

BPE with byte fallback, identity normalisation, no dummy prefix, spaces kept; ids 0, 1, 2 are <unk>, <s>, </s>
and 3 to 258 the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

NORMAL, USER_DEFINED = 1, 4  # piece types in a SentencePiece model file

_SENTENCES = (
    "the river runs under the old stone bridge and on to the sea",
    "a reader turns the pages of a thin book near the window",
    "ten trains leave the northern station before the sun rises",
    "their garden has red roses, green herbs, and one tall tree",
    "she said: there is no better rest than an honest hour of sleep",
    "for item in items:\n    total += item\n    print(total)\n",
    "def area(side):\n    return side * side\n",
    "天上有云，地上有水。",
    "水上有人，人在天地之上。",
    "one and one is two; two and two is four; four and four is eight",
    "lines of code are read more than they are written",
    "winter lends the lake a lid of ice; summer lends it a thousand birds",
)


def train_tokenizer(
    path: Path, vocab_size: int = 320, user_defined_symbols: Iterable[str] = (), space_in_front: bool = False
) -> Path:
    """Train a model of exactly `vocab_size` pieces and return the file written.

    `path` is the file to write, or a folder that gets `tokenizer.model`.
    The text is enough for 300 to 600 pieces.
    """
    path = path / "tokenizer.model" if path.is_dir() else path
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=space_in_front,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        user_defined_symbols=list(user_defined_symbols),
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    path.with_suffix(".model").replace(path)
    return path


def append_pieces(model: Path, pieces: Iterable[str], piece_type: int) -> None:
    """Append pieces to a model file; their ids follow the last one.

    A message's repeated field may be continued at the end of a protobuf file, so nothing is parsed.
    """
    with model.open("ab") as file:
        for piece in pieces:
            text = piece.encode()
            body = (
                b"\x0a" + varint(len(text)) + text + b"\x15" + struct.pack("<f", -1e6) + b"\x18" + bytes([piece_type])
            )
            file.write(b"\x0a" + varint(len(body)) + body)


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])
