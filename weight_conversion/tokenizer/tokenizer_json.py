"""tokenizer.json, the fast (Rust) form of a SentencePiece BPE model, and the proof that both agree.

SentencePiece merges the neighbouring symbols whose union is the best-scored piece, the leftmost first; the `tokenizers`
BPE model merges the neighbouring pair that stands first in a list. Listing every way to cut every piece in two, by
descending score of the piece, makes both the same, except where two ways to reach one piece, or two pieces of one
score, overlap. Hence `difference`: nothing is written that was not compared first, or is of a published model and was
compared before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, islice, pairwise
from typing import Any

import tokenizers

from .sentencepiece_model import Kind, SentencePieceModel

SPACE = "▁"  # how a piece spells a space


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


def tokenizer_json(model: SentencePieceModel, special: SpecialTokens) -> bytes:
    """Return the content of tokenizer.json for a model without an `obstacle`."""
    names = _vocabulary_names(model, special)
    bos_id = next(index for index, name in special.names.items() if name == special.bos)
    before = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model, special),
        "normalizer": _normalizer(model, special),
        "pre_tokenizer": None,
        "post_processor": _start_with(special.bos, bos_id),
        "decoder": _decoder(model, names),
    }
    settings = {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.texts[model.ids_of(Kind.UNKNOWN)[0]],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": Kind.BYTE in model.kinds,
        "ignore_merges": False,
    }
    parts = [f'{_json(before)[:-1]},"model":{_json(settings)[:-1]},"vocab":{{'.encode()]
    parts += _joined(f"{_quoted(names.get(index, text))}:{index}" for index, text in enumerate(model.texts))
    parts.append(b'},"merges":[')
    parts += _joined(map(_quoted, _merges(model)))
    parts.append(b"]}}")
    return b"".join(parts)  # only now, when what finds merges is gone from memory


_quoted = json.encoder.encode_basestring  # a JSON string, other characters than ASCII as they are


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _joined(items: Iterator[str]) -> Iterator[bytes]:
    """Yield items with commas between them, many at a time: as one text they would take four bytes a character."""
    before = ""
    while batch := list(islice(items, _BATCH)):
        yield (before + ",".join(batch)).encode()
        before = ","


_BATCH = 1000
"""Items that are in memory at once."""


def _vocabulary_names(model: SentencePieceModel, special: SpecialTokens) -> dict[int, str]:
    """Return the names in the vocabulary that are not the text of the piece."""
    names = dict(special.names)
    unused = model.ids_of(Kind.UNUSED)
    taken = set(model.texts) if unused else set()
    for index in unused:  # must not match text, yet needs a name of its own
        name = names.get(index, model.texts[index])
        while name in taken:
            name += model.texts[index]
        names[index] = name
    return names


def _merges(model: SentencePieceModel) -> Iterator[str]:
    """Yield "left right" for every cut of every ordinary piece into two pieces, best score first."""
    kinds = (Kind.NORMAL, Kind.USER_DEFINED)
    mergeable = {text for text, kind in zip(model.texts, model.kinds, strict=True) if kind in kinds}
    for text in _best_first(model):
        for cut in range(len(text) - 1, 0, -1):
            if (left := text[:cut]) in mergeable and (right := text[cut:]) in mergeable:
                yield f"{left} {right}"


def _best_first(model: SentencePieceModel) -> Iterator[str]:
    """Yield the texts of ordinary pieces by descending score, those of one score by id.

    So they lie in a model as a rule, and then need not be sorted, which takes 6 MB for 90,000 pieces.
    """
    scores = (score for score, kind in zip(model.scores, model.kinds, strict=True) if kind is Kind.NORMAL)
    if all(first >= second for first, second in pairwise(scores)):
        yield from (text for text, kind in zip(model.texts, model.kinds, strict=True) if kind is Kind.NORMAL)
        return
    for index in sorted(model.ids_of(Kind.NORMAL), key=model.scores.__getitem__, reverse=True):
        yield model.texts[index]


def _added_tokens(model: SentencePieceModel, special: SpecialTokens) -> list[dict[str, Any]]:
    """Declare what is matched in text before any merge: special tokens, and the user-defined pieces."""
    renamed = _renamed(model, special)
    return [
        {
            "id": index,
            "content": special.names.get(index, model.texts[index]),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": index in renamed,
            "special": index in special.names,
        }
        for index in sorted({*special.names, *model.ids_of(Kind.USER_DEFINED)})
    ]


def _renamed(model: SentencePieceModel, special: SpecialTokens) -> dict[int, str]:
    """Return the special tokens whose piece has another name.

    SentencePiece matches the piece's name in text as well. So the normaliser turns that name into the token's, which
    is why such a token is matched after normalisation.
    """
    return {index: name for index, name in special.names.items() if model.texts[index] != name}


def _normalizer(model: SentencePieceModel, special: SpecialTokens) -> dict[str, Any]:
    renames = [_rename(model.texts[index], name) for index, name in _renamed(model, special).items()]
    return {"type": "Sequence", "normalizers": [*renames, _replace(" ", SPACE)]}


def _decoder(model: SentencePieceModel, names: Mapping[int, str]) -> dict[str, Any]:
    unused = [_replace(names[index], model.texts[index]) for index in model.ids_of(Kind.UNUSED)]
    steps = [*unused, _replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {"type": "Sequence", "decoders": steps}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _rename(old: str, new: str) -> dict[str, Any]:
    """Return the step that replaces a piece's text, as an expression where it has characters that one reads otherwise.

    `tokenizers` takes either; openvino-tokenizers reads every pattern as an expression, `[UNUSED_TOKEN_9]` as a class.
    """
    expression = re.escape(old)
    return _replace(old, new) | ({} if expression == old else {"pattern": {"Regex": expression}})


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
        self._processor = model.processor()
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


def difference(content: bytes, model: SentencePieceModel, special: SpecialTokens) -> str | None:
    """Say where a tokenizer.json gives other ids or text than SentencePiece, or None.

    What is COMPARED already is not compared again.
    """
    if fingerprint(content, model) in COMPARED:
        return None
    return first_difference(content, model, special)


def fingerprint(content: bytes, model: SentencePieceModel) -> str:
    """Return the SHA-256 of a tokenizer.json and the model that it stands for."""
    both = sha256(content)
    both.update(model.data)
    return both.hexdigest()


COMPARED = frozenset(
    {
        "064dd70cd0fb8c5703e2b897557a10668542cb973222fc99d029bec591fdc92e",  # InternLM
        "52279b98047697a18ce1fb0392588c21d555e00974508df625f6866f670a3886",  # with chat
        "401effc501f3b90457fa9fb617b3ce36d2454cb09405d728b8e2573c98f16b74",  # InternLM2
        "730627a1954c4b61a49073c46feba94b066c83ed865858ff125d6a29acefa23b",  # with chat
    }
)
"""Fingerprints of the published tokenizers, which `first_difference` finds right (a test does it again): comparing
them takes longer, and more memory, than all else that a conversion computes.
"""


def first_difference(content: bytes, model: SentencePieceModel, special: SpecialTokens) -> str | None:
    """Compare a tokenizer.json with SentencePiece on the built-in corpus; say where they differ, or None."""
    slow = SlowTokenizer(model, special)
    fast = tokenizers.Tokenizer.from_buffer(content)
    samples = corpus(model, special)
    while batch := list(islice(samples, _BATCH)):
        expected = [slow.encode(sample) for sample in batch]
        encodings = fast.encode_batch_fast(batch, add_special_tokens=False)
        decoded = fast.decode_batch(expected, skip_special_tokens=False)
        for sample, ids, encoding, text in zip(batch, expected, encodings, decoded, strict=True):
            if encoding.ids != ids:
                return f"the text {_short(sample)} becomes other ids"
            if text != slow.decode(ids):
                return f"the ids of the text {_short(sample)} become another text"
    every_id = [[index] for index in range(len(model))]
    decoded = fast.decode_batch(every_id, skip_special_tokens=False)
    for index, (found, text) in enumerate(zip(decoded, slow.decode_each(every_id), strict=True)):
        if found != text:
            return f"the id {index} becomes another text"
    return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def corpus(model: SentencePieceModel, special: SpecialTokens) -> Iterator[str]:
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
    renamed = [model.texts[index] for index in _renamed(model, special)]
    user_defined = [model.texts[index] for index in model.ids_of(Kind.USER_DEFINED)]
    for atom in (*special.names.values(), *user_defined, *renamed):
        yield from (atom, atom + atom, f"a{atom}b", f" {atom} {atom}\n{atom}中")
    ordinary = [model.texts[index].replace(SPACE, " ") for index in model.ids_of(Kind.NORMAL)]
    yield from ("".join(ordinary[start : start + 100]) for start in range(0, len(ordinary), 100))
    yield from ("\n".join(ordinary[start::997]) for start in range(min(997, len(ordinary))))


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
