"""From tokenizer.model to the tokenizer files of a Hugging Face folder."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.support.model_families import FAMILIES, Family
from tests.support.real_tokenizers import golden_cases, real_model
from tests.support.tokenizer_fixture import NORMAL, USER_DEFINED, append_pieces, train_tokenizer, varint
from weight_conversion.errors import ConversionError
from weight_conversion.tokenizer import sentencepiece_model, tokenizer_files, tokenizer_json
from weight_conversion.tokenizer.sentencepiece_model import Kind, Piece, SentencePieceModel
from weight_conversion.tokenizer.specs import INTERNLM2_TOKENIZER, INTERNLM_TOKENIZER, TokenizerSpec
from weight_conversion.tokenizer.tokenizer_files import Tokenizer
from weight_conversion.tokenizer.tokenizer_json import (
    COMPARED,
    SpecialTokens,
    corpus,
    difference,
    fingerprint,
    first_difference,
)

SPECS = {"internlm": INTERNLM_TOKENIZER, "internlm2": INTERNLM2_TOKENIZER}
BASE_TOKENS = SpecialTokens(names={0: "<unk>", 1: "<s>", 2: "</s>"}, bos="<s>")


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def spec(family: Family) -> TokenizerSpec:
    return SPECS[str(family)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(
        tmp_path_factory.mktemp("model"), 500, user_defined_symbols=["[UNUSED_TOKEN_1]", "\t\t", "Ａ"]
    )


@pytest.fixture(scope="module")
def full_size(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the family's size, with the family's unused pieces at their ids and filling elsewhere."""
    path = train_tokenizer(tmp_path_factory.mktemp("full"), 500)
    start, pieces = {
        "internlm": (103027, ["<eoh>", "<eoa>", *(f"<TOKENS_UNUSED_{number}>" for number in range(2, 141))]),
        "internlm2": (92397, [f"[UNUSED_TOKEN_{number}]" for number in range(147)]),
    }[str(family)]
    append_pieces(path, (f"filling {number}" for number in range(500, start)), NORMAL)
    append_pieces(path, pieces, USER_DEFINED)
    return path


@pytest.fixture(scope="module")
def chat_folder(family: Family, full_size: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the full-size model with chat."""
    return written(full_size, tmp_path_factory.mktemp("chat"), SPECS[str(family)], chat=True)


def written(model: Path, folder: Path, spec: TokenizerSpec = INTERNLM2_TOKENIZER, chat: bool = False) -> Path:
    """Write the files and return the folder; a warning fails the test."""
    folder.mkdir(exist_ok=True)
    assert Tokenizer.read(model).files(spec, chat).write(folder) == ()
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Reading


def test_a_folder_stands_for_its_tokenizer_model(model: Path) -> None:
    assert Tokenizer.read(model.parent).vocab_size == Tokenizer.read(model).vocab_size == 500


def test_added_tokens_of_a_folder_are_told(family: Family, spec: TokenizerSpec, model: Path, tmp_path: Path) -> None:
    """Only the SentencePiece model is carried over; adding the tokens again gives the ids that they had."""
    tokenizer = family.cls("Tokenizer").from_pretrained(written(model, tmp_path / "base", spec))
    tokenizer.add_tokens(["<b>", "<a>"])
    tokenizer.save_pretrained(tmp_path / "added")
    (tmp_path / "new").mkdir()
    (warning,) = Tokenizer.read(tmp_path / "added").files(spec, chat=False).write(tmp_path / "new")
    assert f"that {tmp_path / 'added'} adds" in warning
    assert "'<b>', '<a>'." in warning
    again = family.cls("Tokenizer").from_pretrained(tmp_path / "new")
    again.add_tokens(["<b>", "<a>"])
    assert again.get_vocab() == tokenizer.get_vocab()


LAYOUTS: dict[str, Callable[[bytes, bytes, bytes], bytes]] = {
    "as the trainer writes": lambda text, score, kind: text + score + kind,
    "kind first": lambda text, score, kind: kind + text + score,
    "score first": lambda text, score, kind: score + text + kind,
    "with a field that nobody knows": lambda text, score, kind: text + score + kind + b"\x7a\x03abc",
}
PIECES = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
        st.floats(width=32, allow_nan=False),
        st.sampled_from(Kind),
        st.sampled_from(sorted(LAYOUTS)),
    ),
    max_size=20,
)


@given(PIECES)
def test_pieces_are_read_in_whatever_way_they_are_written(pieces: list[tuple[str, float, Kind, str]]) -> None:
    data = bytearray()
    for text, score, kind, layout in pieces:
        said = b"" if kind is Kind.NORMAL else b"\x18" + bytes([kind])
        body = LAYOUTS[layout](
            b"\x0a" + varint(len(text.encode())) + text.encode(), b"\x15" + struct.pack("<f", score), said
        )
        data += b"\x0a" + varint(len(body)) + body
    found, trainer, normalizer = sentencepiece_model._contents(bytes(data) + b"\x12\x02\x18\x02" + b"\x1a\x02\x18\x00")
    assert found.texts == [text for text, *_ in pieces]
    assert list(struct.unpack(f"<{len(pieces)}f", found.scores)) == [score for _, score, *_ in pieces]
    assert found.kinds == [kind for *_, kind, _ in pieces]
    assert (trainer, normalizer) == ({3 << 3: 2}, {3 << 3: 0})


ODD_FIELDS = {
    "a score of eight bytes": b"\x11abcdefgh",
    "a score of text": b"\x12\x04abcd",
    "a text of four bytes": b"\x0dWXYZ",
    "a kind of text": b"\x1a\x01\x04",
    "a text under a tag of more than 32 bits": b"\x8a\x80\x80\x80\x10\x01q",
}


@pytest.mark.parametrize("field", ODD_FIELDS.values(), ids=list(ODD_FIELDS))
def test_fields_of_another_type_are_read_as_the_library_reads_them(model: Path, tmp_path: Path, field: bytes) -> None:
    body = b"\x0a\x03zzq\x15" + struct.pack("<f", -5.5) + field
    path = tmp_path / "odd.model"
    path.write_bytes(model.read_bytes() + b"\x0a" + varint(len(body)) + body)
    read, library = SentencePieceModel.read(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = list(range(library.get_piece_size()))
    assert list(read.texts) == library.id_to_piece(ids)
    assert list(read.scores) == library.get_score(ids)


def test_a_large_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "zeros.model").open("wb") as file:
        file.truncate(1 << 20)
    with pytest.raises(ConversionError, match="is not a SentencePiece model"):
        SentencePieceModel.read(tmp_path / "zeros.model")


def test_pieces_of_an_odd_order_are_merged_by_their_score(model: Path) -> None:
    """Scores that do not descend with the ids, as of a model whose pieces somebody has put in another order."""
    read = SentencePieceModel.read(model)
    ordinary = read.ids_of(Kind.NORMAL)
    other = list(read.scores)
    for index, score in zip(ordinary, [read.scores[index] for index in reversed(ordinary)], strict=True):
        other[index] = score
    merges = json.loads(tokenizer_json.tokenizer_json(replace(read, scores=other), BASE_TOKENS))["model"]["merges"]
    before = json.loads(tokenizer_json.tokenizer_json(read, BASE_TOKENS))["model"]["merges"]
    assert sorted(merges) == sorted(before)
    made = [merge.replace(" ", "") for merge in merges]
    ranks = [other[read.texts.index(piece)] for piece in made]
    assert ranks == sorted(ranks, reverse=True)
    assert merges != before


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"added_tokens_decoder": {"x": {}}}', b"\xff"])
def test_an_unreadable_tokenizer_config_is_named(model: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ConversionError, match="is not the JSON of a tokenizer"):
        Tokenizer.read(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.model", tmp_path):
        with pytest.raises(ConversionError, match=r"does not exist; pass the SentencePiece model"):
            Tokenizer.read(path)


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b'{"a": 1}', None], ids=["empty", "zeros", "json", "cut short"])
def test_what_is_no_model_is_refused(model: Path, tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.read_bytes()[:2000] if damage is None else damage)
    with pytest.raises(ConversionError, match=r"is not a SentencePiece model"):
        Tokenizer.read(path)


def test_other_special_pieces_are_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"]),
        model_prefix=str(tmp_path / "other"),
        model_type="bpe",
        vocab_size=265,
        byte_fallback=True,
        bos_piece="[CLS]",
        minloglevel=2,
    )
    with pytest.raises(ConversionError, match=r"has '<unk>', '\[CLS\]', '</s>' at ids 0, 1, 2"):
        Tokenizer.read(tmp_path / "other.model")


def test_pieces_are_read_as_sentencepiece_reads_them(model: Path) -> None:
    read = SentencePieceModel.read(model)
    processor = read.processor()
    ids = list(range(processor.vocab_size()))
    assert list(read.texts) == processor.id_to_piece(ids)
    assert list(read.scores) == processor.get_score(ids)
    assert [kind is Kind.BYTE for kind in read.kinds] == processor.is_byte(ids)
    assert [kind is Kind.CONTROL for kind in read.kinds] == processor.is_control(ids)
    assert [read.texts[index] for index in read.ids_of(Kind.USER_DEFINED)] == ["[UNUSED_TOKEN_1]", "\t\t", "Ａ"]


def test_long_pieces_are_read(tmp_path: Path) -> None:
    """Their sizes take two bytes."""
    path = train_tokenizer(tmp_path)
    long = ["x" * 127, "y" * 128, "天" * 150]
    append_pieces(path, long, USER_DEFINED)
    read = SentencePieceModel.read(path)
    assert read.texts[320:] == read.processor().id_to_piece([320, 321, 322]) == long


# Writing


def test_files_of_a_base_model(family: Family, spec: TokenizerSpec, model: Path, tmp_path: Path) -> None:
    folder = written(model, tmp_path, spec)
    assert {path.name for path in folder.iterdir()} == {
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert (folder / "tokenizer.model").read_bytes() == model.read_bytes()
    config = read_json(folder / "tokenizer_config.json")
    class_name = family.cls("Tokenizer").__name__
    assert config["tokenizer_class"] == class_name
    assert config["auto_map"] == {
        "AutoTokenizer": [f"tokenization_{family}.{class_name}", f"tokenization_{family}_fast.{class_name}Fast"]
    }
    assert {index: token["content"] for index, token in config["added_tokens_decoder"].items()} == {
        "0": "<unk>",
        "1": "<s>",
        "2": "</s>",
    }
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    assert config.items() >= tokens.items()
    assert read_json(folder / "special_tokens_map.json") == tokens
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    assert config["clean_up_tokenization_spaces"] is False
    assert "chat_template" not in config


def test_tokenizer_json_is_what_json_writes(tmp_path: Path) -> None:
    """Made in batches, it is as one call would have made it: names that need escapes, every cut of every piece."""
    path = train_tokenizer(tmp_path, 500, user_defined_symbols=['"', "\\", 'a"\n\x01\x7f', "😀"])
    append_pieces(path, (f"filling {number}" for number in range(2500)), NORMAL)
    read = SentencePieceModel.read(path)
    content = tokenizer_json.tokenizer_json(read, BASE_TOKENS)
    found = json.loads(content)
    assert json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() == content
    assert found["model"]["vocab"] == {text: index for index, text in enumerate(read.texts)}
    ordinary = [read.piece(index) for index in read.ids_of(Kind.NORMAL)]
    parts = {piece.text for piece in ordinary} | {'"', "\\", 'a"\n\x01\x7f', "😀"}
    cuts = [
        (left, right)
        for piece in sorted(ordinary, key=lambda piece: -piece.score)
        for cut in range(len(piece.text))[:0:-1]
        if {left := piece.text[:cut], right := piece.text[cut:]} <= parts
    ]
    assert found["model"]["merges"] == [f"{left} {right}" for left, right in cuts]
    assert len(cuts) > 200


def test_writing_twice_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    first, second = written(model, tmp_path / "a"), written(model, tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("theriv andof\n\t 天地上有😀Ａ[UNUSED_TOKEN_1]<s/>é▁0"), max_size=60))
def test_slow_and_fast_agree(pair: tuple[Any, Any], text: str) -> None:
    slow, fast = pair
    ids = slow(text)["input_ids"]
    assert fast(text)["input_ids"] == ids
    assert fast.decode(ids) == slow.decode(ids)
    assert fast.decode(ids, skip_special_tokens=True) == slow.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def pair(family: Family, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = written(model, tmp_path_factory.mktemp("pair"), SPECS[str(family)])
    return family.cls("Tokenizer").from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def test_a_pair_of_texts_is_joined_the_same_way(pair: tuple[Any, Any]) -> None:
    slow, fast = pair
    assert slow("one", "two")["input_ids"] == fast("one", "two")["input_ids"]
    assert len(slow) == len(fast) == 500
    assert set(slow("one")) == set(fast("one")) == {"input_ids", "attention_mask"}  # what the models take
    assert slow.get_vocab() == fast.get_vocab()


def test_a_pattern_that_is_replaced_means_the_same_as_text_and_as_an_expression(
    spec: TokenizerSpec, chat_folder: Path
) -> None:
    """Some readers, openvino-tokenizers among them, take a pattern of either kind for an expression."""
    content = read_json(chat_folder / "tokenizer.json")
    steps = {step["content"]: step["pattern"] for step in content["normalizer"]["normalizers"]}
    renamed = {token.content: token.piece for token in spec.chat_tokens if token.content != token.piece}
    assert steps.keys() == {*renamed, "▁"}
    for name, piece in {**renamed, "▁": " "}.items():
        (pattern,) = steps[name].values()
        assert re.fullmatch(pattern, piece), piece
        assert not re.search(pattern, piece[:-1])


def test_the_fast_form_works_without_transformers(family: Family, chat_folder: Path) -> None:
    """As servers in other languages load it."""
    fast = tokenizers.Tokenizer.from_file(str(chat_folder / "tokenizer.json"))
    token = {"internlm": "<eoa>", "internlm2": "<|im_end|>"}[str(family)]
    encoding = fast.encode(f"a  b{token}\n")
    assert encoding.tokens[0] == "<s>"
    assert token in encoding.tokens
    assert fast.decode(encoding.ids) == "a  b\n"
    assert fast.decode(encoding.ids, skip_special_tokens=False) == f"<s>a  b{token}\n"


def test_a_character_without_a_use_is_not_matched(tmp_path: Path) -> None:
    """SentencePiece sets the piece NUL of a model with bytes aside; the fast form must do the same."""
    path = train_tokenizer(tmp_path)
    append_pieces(path, ["\0"], NORMAL)
    folder = written(path, tmp_path / "hf")
    slow = sentencepiece.SentencePieceProcessor(model_file=str(path))
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert fast.encode("a\0b\0\0", add_special_tokens=False).ids == slow.encode("a\0b\0\0")
    assert fast.decode([320]) == slow.decode([320]) == "\0"


@pytest.mark.parametrize("in_front", [False, True])
def test_readers_are_told_whether_a_space_goes_in_front(tmp_path: Path, spec: TokenizerSpec, in_front: bool) -> None:
    model = train_tokenizer(tmp_path / "other.model", space_in_front=in_front)
    Tokenizer.read(model).files(spec, chat=False).write(tmp_path)
    assert read_json(tmp_path / "tokenizer_config.json")["add_prefix_space"] is in_front


# Saving what was written


def test_the_slow_class_saves_the_fast_form(family: Family, spec: TokenizerSpec, model: Path, tmp_path: Path) -> None:
    folder = written(model, tmp_path / "a", spec)
    slow = family.cls("Tokenizer").from_pretrained(folder)
    files = slow.save_pretrained(tmp_path / "b")
    assert str(tmp_path / "b" / "tokenizer.json") in map(str, files)
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    slow.save_pretrained(folder)
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("change", ["new token", "no start token"])
def test_the_fast_form_is_saved_as_the_slow_class_is_now(
    family: Family, model: Path, tmp_path: Path, change: str
) -> None:
    folder = written(model, tmp_path / "a", SPECS[str(family)])
    slow = family.cls("Tokenizer").from_pretrained(folder)
    if change == "new token":
        slow.add_tokens(["<new>"])
    else:
        slow.add_bos_token = False
    for target in (tmp_path / "b", folder):
        slow.save_pretrained(target)
        for cls in (PreTrainedTokenizerFast, family.cls("Tokenizer")):
            assert cls.from_pretrained(target)("one<new>")["input_ids"] == slow("one<new>")["input_ids"]


# The comparison


def test_the_corpus_uses_every_piece_and_byte(model: Path) -> None:
    read = SentencePieceModel.read(model)
    seen: set[int] = set()
    processor, texts = read.processor(), set(read.texts)
    for text in corpus(read, BASE_TOKENS):
        seen.update(processor.encode(text))

    def is_needed(index: int, piece: Piece) -> bool:
        if piece.kind is Kind.BYTE:
            byte = int(piece.text[3:5], 16)
            in_utf8 = byte not in (0xC0, 0xC1) and byte < 0xF5
            return in_utf8 and byte != ord(" ") and chr(byte) not in texts
        if piece.kind is Kind.NORMAL:  # some are out of reach: better merges come first
            return processor.encode(piece.text.replace("▁", " ")) == [index]
        return piece.kind is Kind.USER_DEFINED

    assert {index for index in range(len(read)) if is_needed(index, read.piece(index))} <= seen
    assert len(seen) > 450


def good_json(model: Path) -> tuple[SentencePieceModel, dict[str, Any]]:
    read = SentencePieceModel.read(model)
    return read, json.loads(tokenizer_json.tokenizer_json(read, BASE_TOKENS))


def spoil_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"].sort()


def forget_bytes(content: dict[str, Any]) -> None:
    content["model"]["byte_fallback"] = False


def forget_added_token(content: dict[str, Any]) -> None:
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[UNUSED_TOKEN_1]"]


def swap_pieces(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["n"] = vocabulary["n"], vocabulary["a"]


def decode_without_spaces(content: dict[str, Any]) -> None:
    content["decoder"]["decoders"].pop(0)


def strip_spaces(content: dict[str, Any]) -> None:
    content["normalizer"]["normalizers"].insert(0, {"type": "Strip", "strip_left": True, "strip_right": True})


@pytest.mark.parametrize(
    "spoil", [spoil_merges, forget_bytes, forget_added_token, swap_pieces, decode_without_spaces, strip_spaces]
)
def test_a_wrong_tokenizer_json_is_found(model: Path, spoil: Any) -> None:
    read, content = good_json(model)
    assert first_difference(json.dumps(content).encode(), read, BASE_TOKENS) is None
    spoil(content)
    assert first_difference(json.dumps(content).encode(), read, BASE_TOKENS) is not None


def test_a_wrong_tokenizer_json_is_left_out(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(read: SentencePieceModel, special: SpecialTokens) -> bytes:
        content = json.loads(tokenizer_json.tokenizer_json(read, special))
        spoil_merges(content)
        return json.dumps(content).encode()

    monkeypatch.setattr(tokenizer_files, "tokenizer_json", wrong)
    (warning,) = Tokenizer.read(model).files(INTERNLM2_TOKENIZER, chat=False).write(tmp_path)
    assert "tokenizer.json was left out, because the text" in warning
    assert not (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "tokenizer.model").is_file()


def test_only_what_was_compared_before_is_not_compared(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tokenizer.json on record: neither another one of the same model, nor the same one of another model."""
    monkeypatch.setattr(tokenizer_json, "first_difference", lambda *_: "compared")
    read, content = SentencePieceModel.read(model), b"content"
    assert difference(content, read, BASE_TOKENS) == "compared"
    monkeypatch.setattr(tokenizer_json, "COMPARED", {fingerprint(content, read)})
    assert difference(content, read, BASE_TOKENS) is None
    assert difference(content + b" ", read, BASE_TOKENS) == "compared"
    assert difference(content, replace(read, data=read.data + b" "), BASE_TOKENS) == "compared"


def test_a_model_with_an_odd_piece_has_no_fast_form(tmp_path: Path) -> None:
    """SentencePiece never matches a user-defined piece with a space, an added token would be matched."""
    path = train_tokenizer(tmp_path / "odd.model", user_defined_symbols=["a  z"])
    (warning,) = Tokenizer.read(path).files(INTERNLM2_TOKENIZER, chat=False).write(tmp_path)
    assert "'a  z' becomes other ids" in warning


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"model_type": "unigram"}, "is not a BPE model"),
        ({"add_dummy_prefix": True}, "rewrites text"),
        ({"remove_extra_whitespaces": True}, "rewrites text"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites text"),
    ],
)
def test_models_without_a_fast_form_work_slowly(
    family: Family, spec: TokenizerSpec, tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    defaults = {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one and two and three and four make ten"] * 4),
        model_prefix=str(tmp_path / "other"),
        vocab_size=280,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        **(defaults | arguments),
    )
    (warning,) = Tokenizer.read(tmp_path / "other.model").files(spec, chat=False).write(tmp_path)
    assert reason in warning
    assert not (tmp_path / "tokenizer.json").exists()
    assert read_json(tmp_path / "tokenizer_config.json")["auto_map"]["AutoTokenizer"][1] is None
    tokenizer = family.cls("Tokenizer").from_pretrained(tmp_path)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "other.model")).encode("one and two")
    assert tokenizer("one and two")["input_ids"] == [1, *expected]


# Chat


def test_chat_tokens_lie_on_their_ids(family: Family, spec: TokenizerSpec, full_size: Path, chat_folder: Path) -> None:
    Tokenizer.read(full_size).check_chat(spec)
    slow = family.cls("Tokenizer").from_pretrained(chat_folder)
    fast = PreTrainedTokenizerFast.from_pretrained(chat_folder)
    expected = {
        "internlm": {"<eoh>": 103027, "<eoa>": 103028},
        "internlm2": {
            "<|plugin|>": 92538,
            "<|interpreter|>": 92539,
            "<|action_end|>": 92540,
            "<|action_start|>": 92541,
            "<|im_end|>": 92542,
            "<|im_start|>": 92543,
        },
    }[str(family)]
    for tokenizer in (slow, fast):
        assert len(tokenizer) == Tokenizer.read(full_size).vocab_size
        for token, index in expected.items():
            for text in (f"one{token} two", f"{token}{token}\n", f" {token} "):
                ids = tokenizer(text)["input_ids"]
                assert ids.count(index) == text.count(token)
                assert tokenizer.decode(ids) == "<s>" + text
                assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace(token, "")
        for token in spec.chat_tokens:  # the piece's own name
            assert tokenizer(f"a{token.piece}b")["input_ids"].count(token.id) == 1
    assert slow.get_vocab() == fast.get_vocab()


def test_the_chat_template_is_written_for_every_version(spec: TokenizerSpec, chat_folder: Path) -> None:
    template = (chat_folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = read_json(chat_folder / "tokenizer_config.json")
    assert config["chat_template"] == template
    names = [token.content for token in spec.chat_tokens]
    assert config["additional_special_tokens"] == names
    assert read_json(chat_folder / "special_tokens_map.json")["additional_special_tokens"] == names


def test_the_rendered_template(family: Family, chat_folder: Path) -> None:
    tokenizer = family.cls("Tokenizer").from_pretrained(chat_folder)
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]
    expected = {
        "internlm": "<s><|System|>:S\n<|User|>:Q<eoh>\n<|Bot|>:A<eoa>\n<|User|>:R<eoh>\n",
        "internlm2": (
            "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
        ),
    }[str(family)]
    answer = {"internlm": "<|Bot|>:", "internlm2": "<|im_start|>assistant\n"}[str(family)]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected + answer


def test_ends_of_generation() -> None:
    assert INTERNLM_TOKENIZER.eos_token_ids(chat=False) == INTERNLM2_TOKENIZER.eos_token_ids(chat=False) == 2
    assert INTERNLM_TOKENIZER.eos_token_ids(chat=True) == [2, 103028]
    assert INTERNLM2_TOKENIZER.eos_token_ids(chat=True) == [2, 92542]


def test_chat_without_room_is_refused(spec: TokenizerSpec, model: Path) -> None:
    with pytest.raises(
        ConversionError, match=r"belongs on id \d+, on the user-defined piece .+, but .+ has 500 pieces"
    ):
        Tokenizer.read(model).check_chat(spec)


def test_chat_on_other_pieces_is_refused(spec: TokenizerSpec, model: Path) -> None:
    for wrong in (300, 50):  # an ordinary piece, a byte
        taken = replace(spec, chat_tokens=tuple(replace(token, id=wrong) for token in spec.chat_tokens))
        with pytest.raises(ConversionError, match=r"has '.+' \((normal|byte)\) there; convert without --chat"):
            Tokenizer.read(model).check_chat(taken)


def test_chat_on_pieces_that_text_may_contain_is_refused(spec: TokenizerSpec, tmp_path: Path) -> None:
    """Right in name, but an ordinary piece: its id may have a meaning already."""
    path = train_tokenizer(tmp_path)
    append_pieces(path, (token.piece for token in spec.chat_tokens), NORMAL)
    tokens = tuple(replace(token, id=320 + offset) for offset, token in enumerate(spec.chat_tokens))
    with pytest.raises(ConversionError, match=r"convert without --chat"):
        Tokenizer.read(path).check_chat(replace(spec, chat_tokens=tokens))


# The real models


def test_the_published_tokenizers_are_on_record_and_right(family: Family, spec: TokenizerSpec) -> None:
    """Every tokenizer.json on record is that of a published model, to the byte, and gives the ids of SentencePiece."""
    read, recorded = SentencePieceModel.read(real_model(str(family))), set()
    tokenizer = Tokenizer(read)
    for chat in (False, True):
        special = tokenizer.special_tokens(spec, chat)
        content = tokenizer_json.tokenizer_json(read, special)
        assert first_difference(content, read, special) is None
        recorded.add(fingerprint(content, read))
    assert recorded <= COMPARED
    assert len(recorded) * 2 == len(COMPARED)


@pytest.fixture(scope="module")
def real_folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(real_model(str(family)), tmp_path_factory.mktemp("real"), SPECS[str(family)])


def test_the_fast_form_of_the_real_model_gives_the_recorded_ids(family: Family, real_folder: Path) -> None:
    fast = PreTrainedTokenizerFast.from_pretrained(real_folder)
    for case in golden_cases(str(family)):
        text = case["text"]
        assert fast(text)["input_ids"] == case["ids"], text
        assert fast.convert_ids_to_tokens(case["ids"]) == case["tokens"], text
        assert fast.decode(case["ids"]) == "<s>" + text.replace("▁", " "), text


def test_the_real_chat_tokenizer_gives_the_recorded_ids(family: Family, spec: TokenizerSpec, tmp_path: Path) -> None:
    model = real_model(str(family))
    Tokenizer.read(model).check_chat(spec)
    folder = written(model, tmp_path, spec, chat=True)
    slow, fast = family.cls("Tokenizer").from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    cases = golden_cases("internlm2_chat") if str(family) == "internlm2" else golden_cases("internlm")
    for case in cases:
        for tokenizer in (slow, fast):
            assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]
            assert tokenizer.convert_ids_to_tokens(case["ids"]) == case["tokens"], case["text"]


def test_other_families_have_no_room_for_the_chat_tokens(family: Family) -> None:
    other = {"internlm": INTERNLM2_TOKENIZER, "internlm2": INTERNLM_TOKENIZER}[str(family)]
    with pytest.raises(ConversionError, match=r"convert without --chat, or pass the tokenizer of the family"):
        Tokenizer.read(real_model(str(family))).check_chat(other)


# Start-up


def test_neither_torch_nor_transformers_is_loaded() -> None:
    program = (
        "import sys, weight_conversion.tokenizer.tokenizer_files\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "set()"
