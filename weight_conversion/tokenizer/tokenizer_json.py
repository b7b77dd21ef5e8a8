"""tokenizer.json, the fast (Rust) form of a SentencePiece BPE model, and the proof that both agree.

SentencePiece merges the neighbouring symbols whose union is the best-scored piece, the leftmost first; the `tokenizers`
BPE model merges the neighbouring pair that stands first in a list. Listing every way to cut every piece in two, by
descending score of the piece, makes both the same, except where two ways to reach one piece, or two pieces of one
score, overlap. Hence `first_difference`: nothing is written that was not compared first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import tokenizers

from .sentencepiece_model import Kind, Piece, SentencePieceModel

SPACE = "▁"  # how a piece spells a space
SPECIAL_KINDS = (Kind.UNKNOWN, Kind.CONTROL)


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer: `names[id]` is what text and templates call the token."""

    names: Mapping[int, str]
    bos: str


def obstacle(model: SentencePieceModel) -> str | None:
    """Say why a model has no tokenizer.json of the kind made here; None if it has."""
    if not model.is_bpe:
        return "the SentencePiece model is not a BPE model"
    if not model.keeps_text:
        return "the SentencePiece model rewrites text (normalisation, added or removed spaces)"
    return None


def tokenizer_json(model: SentencePieceModel, special: SpecialTokens) -> str:
    """Return the text of tokenizer.json for a model without an `obstacle`."""
    names = _vocabulary_names(model.pieces, special)
    bos_id = next(index for index, name in special.names.items() if name == special.bos)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(model.pieces, special),
            "normalizer": _normalizer(model.pieces, special),
            "pre_tokenizer": None,
            "post_processor": _start_with(special.bos, bos_id),
            "decoder": _decoder(model.pieces, names),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": next(piece.text for piece in model.pieces if piece.kind is Kind.UNKNOWN),
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": any(piece.kind is Kind.BYTE for piece in model.pieces),
                "ignore_merges": False,
                "vocab": {name: index for index, name in enumerate(names)},
                "merges": _merges(model.pieces),
            },
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def _vocabulary_names(pieces: list[Piece], special: SpecialTokens) -> list[str]:
    taken = {piece.text for piece in pieces}
    names = []
    for index, piece in enumerate(pieces):
        name = special.names.get(index, piece.text)
        if piece.kind is Kind.UNUSED:  # must not match text, yet needs a name of its own
            while name in taken:
                name += piece.text
        names.append(name)
    return names


def _merges(pieces: list[Piece]) -> list[str]:
    """Return "left right" for every cut of every ordinary piece into two pieces, best score first."""
    mergeable = {piece.text for piece in pieces if piece.kind in (Kind.NORMAL, Kind.USER_DEFINED)}
    by_score = sorted((piece for piece in pieces if piece.kind is Kind.NORMAL), key=lambda piece: -piece.score)
    return [
        f"{text[:cut]} {text[cut:]}"
        for text in (piece.text for piece in by_score)
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in mergeable and text[cut:] in mergeable
    ]


def _added_tokens(pieces: list[Piece], special: SpecialTokens) -> list[dict[str, Any]]:
    """Declare what is matched in text before any merge: special tokens, and the user-defined pieces."""
    return [
        {
            "id": index,
            "content": special.names.get(index, piece.text),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": index in _renamed(pieces, special),
            "special": index in special.names,
        }
        for index, piece in enumerate(pieces)
        if index in special.names or piece.kind is Kind.USER_DEFINED
    ]


def _renamed(pieces: list[Piece], special: SpecialTokens) -> dict[int, str]:
    """Return the special tokens whose piece has another name.

    SentencePiece matches the piece's name in text as well. So the normaliser turns that name into the token's, which
    is why such a token is matched after normalisation.
    """
    return {index: name for index, name in special.names.items() if pieces[index].text != name}


def _normalizer(pieces: list[Piece], special: SpecialTokens) -> dict[str, Any]:
    renames = [_replace(pieces[index].text, name) for index, name in _renamed(pieces, special).items()]
    return {"type": "Sequence", "normalizers": [*renames, _replace(" ", SPACE)]}


def _decoder(pieces: list[Piece], names: list[str]) -> dict[str, Any]:
    unused = [
        _replace(name, piece.text) for piece, name in zip(pieces, names, strict=True) if piece.kind is Kind.UNUSED
    ]
    steps = [*unused, _replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {"type": "Sequence", "decoders": steps}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _start_with(bos: str, bos_id: int) -> dict[str, Any]:
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


class SlowTokenizer:
    """What the SentencePiece tokenizer class does with text and ids: added tokens first, SentencePiece for the rest."""

    def __init__(self, model: SentencePieceModel, special: SpecialTokens) -> None:
        self._processor = model.processor
        self._names = special.names
        self._ids = {name: index for index, name in special.names.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._cuts = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without `<s>` before it."""
        parts = self._cuts.split(text)  # text, name, text, name, ..., text
        ids: list[int] = self._processor.encode(parts[0])
        for name, following in zip(parts[1::2], parts[2::2], strict=True):
            ids += [self._ids[name], *self._processor.encode(following)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens by name."""
        return "".join(
            "".join(self._names[index] for index in run) if is_special else self._processor.decode(list(run))
            for is_special, run in groupby(ids, key=self._names.__contains__)
        )

    def decode_each(self, batch: list[list[int]]) -> list[str]:
        """Return the text of each list of one id."""
        texts = self._processor.decode(batch)
        return [self._names.get(index, text) for (index,), text in zip(batch, texts, strict=True)]


def first_difference(text: str, model: SentencePieceModel, special: SpecialTokens) -> str | None:
    """Compare tokenizer.json's `text` with SentencePiece on the built-in corpus; say where they differ, or None."""
    slow = SlowTokenizer(model, special)
    fast = tokenizers.Tokenizer.from_str(text)
    samples = list(corpus(model.pieces, special))
    encodings = fast.encode_batch(samples, add_special_tokens=False)
    for sample, encoding in zip(samples, encodings, strict=True):
        ids = slow.encode(sample)
        if encoding.ids != ids:
            return f"the text {_short(sample)} becomes other ids"
        if fast.decode(ids, skip_special_tokens=False) != slow.decode(ids):
            return f"the ids of the text {_short(sample)} become another text"
    every_id = [[index] for index in range(len(model.pieces))]
    decoded = fast.decode_batch(every_id, skip_special_tokens=False)
    for index, (found, expected) in enumerate(zip(decoded, slow.decode_each(every_id), strict=True)):
        if found != expected:
            return f"the id {index} becomes another text"
    return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def corpus(pieces: list[Piece], special: SpecialTokens) -> Iterator[str]:
    """Yield texts that together use every piece, every byte, every special token and long runs of characters."""
    yield from _TEXTS
    yield "\n".join(_TEXTS)
    yield from (chr(code) for code in range(256))
    yield "".join(map(chr, range(256)))
    yield "".join(chr(code) for code in range(0x100, 0x11000, 7) if not 0xD800 <= code < 0xE000)
    yield from (chr(lead << 18 | 0x2F000 >> 6) for lead in range(1, 5))
    for character in " \t\n=-*#/_.0aA啊😀":
        yield from (character * length for length in (*range(2, 70), 127, 128, 129, 500, 1000))
        yield from (f"x{character * length}y" for length in range(1, 34))
    atoms = [*special.names.values(), *(piece.text for piece in pieces if piece.kind is Kind.USER_DEFINED)]
    for atom in (*atoms, *_renamed_pieces(pieces, special)):
        yield from (atom, atom + atom, f"a{atom}b", f" {atom} {atom}\n{atom}中")
    ordinary = [piece.text.replace(SPACE, " ") for piece in pieces if piece.kind is Kind.NORMAL]
    yield from ("".join(ordinary[start : start + 100]) for start in range(0, len(ordinary), 100))
    yield from ("\n".join(ordinary[start::997]) for start in range(min(997, len(ordinary))))


def _renamed_pieces(pieces: list[Piece], special: SpecialTokens) -> list[str]:
    return [pieces[index].text for index in _renamed(pieces, special)]


_TEXTS = (
    "",
    " ",
    "a",
    "The keeper counted 3,141 birds on the 27th of May; 2.718 of them, on average, were asleep.",
    "It's what they'd said: don't, can't, won't, shouldn't've... \"Really?\" she asked. 'Yes!' he wrote (twice).",
    "Spaces  before ,  and after . punctuation ! Are they kept ?  do n't 's 're",
    "  leading spaces, trailing spaces   ",
    "tabs\tand\ttabs\t\tand\r\nwindows line ends\r\n\r\nand\rold ones\n\n\n",
    "naïve café, Straße, año, Ærøskøbing, Łódź, İstanbul, Ångström, e\u0301 versus é",
    "今天的雨下了一整天，河水涨到了桥边。老人说：“明天会晴的！”孩子问：真的吗？",
    "繁體中文也要一樣：臺灣、香港、澳門的讀者都在看。",
    "中文English混排3.5倍速度，ＡＢＣ１２３全角，半角ｶﾞ；《书名》【注】……——",
    "ひらがなとカタカナ、한국어 문장, Русский текст, Ελληνικά, עברית, العربية, हिन्दी, ไทย, Tiếng Việt",
    "😀😃🏳️‍🌈👩‍👩‍👧‍👦🇨🇳🇫🇷 ❤️ vs ❤, 1️⃣ 🤷🏽‍♀️",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β, ½ + ⅓, x² − y³, ∑ᵢ aᵢ, 10⁻³ µm, 25 °C, 5′ 7″, €100, £5, ¥9",
    "def fib(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "#include <vector>\nint main(int argc, char **argv) {\n\tstd::vector<int> v{1, 2};\n\treturn v[0] != 1;\n}\n",
    '{"name": "a\\n\\u4f60", "items": [1, -2.5e-3, null, true], "nested": {"k": []}}',
    "SELECT id, COUNT(*) FROM t WHERE a <> 'b' AND c >= 1 GROUP BY id HAVING COUNT(*) > 2;",
    "<html><body class='x'>&nbsp;&lt;p&gt;</body></html> <!-- note --> https://example.org/a?b=c&d=%20#e",
    "\\begin{align}\n  \\frac{\\partial L}{\\partial w_{ij}} &= \\sum_k x_k^2 \\\\\n\\end{align}",
    "diff --git a/x b/x\n@@ -1,3 +1,4 @@\n-old\n+new\n \n",
    "| a | b |\n|---|---|\n| 1 | **2** |\n\n- [x] done\n- [ ] open\n\n```sh\n$ ls -la | grep '^d'\n```\n",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x7f\x80\x9f\xa0\xad a\x00b",
    "\ufeffmark \u200b\u200d\u2028\u2029\u3000\u00a0\ufffd\U000f0000\U0010ffff",
    "▁ a▁b ▁▁ <0x0A><0xE4> <s> </s> <unk> <pad> <|im_end|> <eoa> [UNUSED_TOKEN_9] <TOKENS_UNUSED_3>",
    "supercalifragilisticexpialidocious_antidisestablishmentarianism-pneumonoultramicroscopic",
    "0000000 1234567890 0x1F 1e10 3.14159265358979 192.168.0.1 2024-03-28T12:34:56Z +86-10-1234",
)
