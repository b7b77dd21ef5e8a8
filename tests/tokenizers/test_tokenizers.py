"""The SentencePiece tokenizer classes: recorded ids, exact text, saving, special tokens."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

from internlm2_model import tokenization_internlm2
from tests.support.model_families import FAMILIES, Family
from tests.support.real_tokenizers import golden_cases, real_model
from tests.support.tokenizer_fixture import train_tokenizer


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("model") / "tokenizer.model", user_defined_symbols=["<eoa>"])


@pytest.fixture
def make(family: Family, model: Path) -> Any:
    return lambda **kwargs: family.cls("Tokenizer")(str(model), **kwargs)


@pytest.fixture
def tokenizer(make: Any) -> Any:
    return make()


def chat_arguments(**tokens: int) -> dict[str, Any]:
    """Arguments that put special tokens on given ids."""
    added = {index: AddedToken(f"<|{name}|>", special=True) for name, index in tokens.items()}
    return {"added_tokens_decoder": added, "additional_special_tokens": [str(token) for token in added.values()]}


# Recorded behaviour on the real models


@pytest.fixture(scope="module")
def real(family: Family) -> Any:
    return family.cls("Tokenizer")(str(real_model(str(family))))


def test_ids_are_the_recorded_ones(family: Family, real: Any) -> None:
    for case in golden_cases(str(family)):
        text = case["text"]
        assert real(text)["input_ids"] == case["ids"], text
        assert real(text, add_special_tokens=False)["input_ids"] == case["ids_no_special"], text
        assert real.tokenize(text) == case["tokenize"], text
        assert real.convert_ids_to_tokens(case["ids"]) == case["tokens"], text
        assert real.convert_tokens_to_ids(case["tokens"]) == case["ids"], text


def test_text_comes_back_where_the_ids_allow_it(family: Family, real: Any) -> None:
    """Not where the text spells a special token, which is skipped, or the character that stands for a space."""
    for case in golden_cases(str(family)):
        text = case["text"].replace("▁", " ")
        assert real.decode(case["ids"]) == "<s>" + text
        assert real.decode(case["ids"], skip_special_tokens=True) == text.replace("</s>", "")


def test_chat_tokens_have_the_recorded_ids(family: Family) -> None:
    if str(family) != "internlm2":
        pytest.skip("only InternLM2's chat tokens were recorded")
    names = ("plugin", "interpreter", "action_end", "action_start", "im_end", "im_start")
    arguments = chat_arguments(**{name: 92538 + offset for offset, name in enumerate(names)})
    chat = family.cls("Tokenizer")(str(real_model("internlm2")), **arguments)
    assert len(chat) == 92544
    for case in golden_cases("internlm2_chat"):
        assert chat(case["text"])["input_ids"] == case["ids"], case["text"]
        assert chat.convert_ids_to_tokens(case["ids"]) == case["tokens"]
        assert chat.tokenize(case["text"]) == case["tokenize"]
        assert chat.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]


def test_sizes_of_the_real_vocabularies(family: Family, real: Any) -> None:
    size = {"internlm": 103168, "internlm2": 92544}[str(family)]
    assert real.vocab_size == len(real) == len(real.get_vocab()) == size


# Text in, text out


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == "<s>" + text
    assert tokenizer.decode(ids, skip_special_tokens=True) == re.sub("<s>|</s>|<unk>", "", text)
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids


@pytest.mark.parametrize(
    "text", ["a , b . don 't", "  a  b  ", "\n \n", "<eoa> a <eoa>", "天 地 😀", " ", "a <b> c", "do n't 's 've !"]
)
def test_no_space_is_lost_or_made(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids, 2]) == f"<s>{text}</s>"
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == text
    assert tokenizer.batch_decode([ids, ids], skip_special_tokens=True) == [text, text]


def test_special_tokens_stand_close_to_the_text(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    text = "a<new>b<|turn|> c</s>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == "<s>" + text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<new>b c"
    assert tokenizer.convert_tokens_to_ids(["<new>", "<|turn|>"]) == [320, 321]
    assert len(tokenizer) == 322


def test_spaces_are_cleaned_up_only_when_asked(tokenizer: Any) -> None:
    ids = tokenizer("a , b", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "a , b"
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "a, b"


def test_a_single_id_is_decoded(tokenizer: Any) -> None:
    (index,) = tokenizer("o", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(index) == "o"
    assert tokenizer.decode(1) == "<s>"
    assert tokenizer.decode(1, skip_special_tokens=True) == ""


def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Any) -> None:
    for index in (320, -1):
        with pytest.raises(IndexError, match=r"outside the vocabulary of 320 pieces"):
            tokenizer.decode([index])


def test_a_special_token_takes_the_place_of_its_piece(make: Any) -> None:
    """As the chat tokens do: the piece's text still gives its id, which reads back as the special token."""
    index = make().convert_tokens_to_ids("<eoa>")
    tokenizer = make(**chat_arguments(end=index))
    assert tokenizer("o<|end|>o")["input_ids"] == tokenizer("o<eoa>o")["input_ids"]
    assert tokenizer.decode(tokenizer("o<eoa>", add_special_tokens=False)["input_ids"]) == "o<|end|>"
    assert len(tokenizer) == 320
    vocabulary = tokenizer.get_vocab()
    assert vocabulary["<|end|>"] == index
    assert "<eoa>" not in vocabulary
    assert sorted(vocabulary.values()) == list(range(320))


def test_unknown_tokens_are_unk(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids("no such piece") == tokenizer.unk_token_id == 0


@given(
    tokens=st.sets(st.text("ab<c>[", min_size=1, max_size=3), max_size=5),
    text=st.text("ab<c>[ ", max_size=30),
)
def test_text_is_cut_at_the_leftmost_longest_added_token(tokens: set[str], text: str) -> None:
    expected, ordinary, position = [], "", 0
    while position < len(text):
        longest = max((token for token in tokens if text.startswith(token, position)), key=len, default="")
        if longest:
            expected += [ordinary, longest]
        ordinary = "" if longest else ordinary + text[position]
        position += len(longest) or 1
    expected = [part for part in (*expected, ordinary) if part]
    assert tokenization_internlm2._Cutter(tokens).split(text) == expected


# Start and end tokens


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_masks_fit_the_ids(make: Any, bos: bool, eos: bool) -> None:
    tokenizer = make(add_bos_token=bos, add_eos_token=eos)
    for pair in (None, "two"):
        encoding = tokenizer("one", pair, return_special_tokens_mask=True, return_token_type_ids=True)
        ids = encoding["input_ids"]
        expected = [int(index in (1, 2)) for index in ids]
        assert encoding["special_tokens_mask"] == expected
        assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == expected
        assert encoding["token_type_ids"] == [0] * len(ids)
        assert ids.count(1) == bos
        assert ids.count(2) == eos
        assert tokenizer.num_special_tokens_to_add(pair=pair is not None) == bos + eos


def test_defaults(tokenizer: Any) -> None:
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer.padding_side == "right"
    batch = tokenizer(["o", "one and two"], padding=True)
    assert batch["attention_mask"][0][:2] == [1, 1]
    assert batch["input_ids"][0][-1] == 2


# Saving


@pytest.mark.parametrize("with_fast_file", [False, True])
@pytest.mark.parametrize("how", ["class", "auto"])
def test_settings_survive_saving(make: Any, family: Family, tmp_path: Path, how: str, with_fast_file: bool) -> None:
    first = make(add_bos_token=False, add_eos_token=True, padding_side="left", **chat_arguments(end=5, start=6))
    first.add_eos_token, first.add_bos_token = True, False
    first.save_pretrained(tmp_path / "a")
    if with_fast_file:  # its presence makes transformers 5 drop the two settings
        (tmp_path / "a" / "tokenizer.json").write_text('{"added_tokens": []}')
    (tmp_path / "a").rename(tmp_path / "moved")
    if how == "class":
        again = family.cls("Tokenizer").from_pretrained(tmp_path / "moved")
    else:
        again = AutoTokenizer.from_pretrained(tmp_path / "moved", trust_remote_code=True)
    text = "one<|end|> , two"
    assert type(again).__name__ == type(first).__name__
    assert again(text)["input_ids"] == first(text)["input_ids"]
    assert again(text)["input_ids"][-1] == 2
    assert again.padding_side == "left"
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == "one , two"
    assert len(again) == len(first)


def test_arguments_win_over_saved_settings(make: Any, family: Family, tmp_path: Path) -> None:
    make(add_bos_token=False).save_pretrained(tmp_path)
    again = family.cls("Tokenizer").from_pretrained(tmp_path, add_bos_token=True)
    assert again("o")["input_ids"][0] == 1


def test_a_setting_changed_later_is_saved(tokenizer: Any, family: Family, tmp_path: Path) -> None:
    tokenizer.add_bos_token = False
    tokenizer.save_pretrained(tmp_path)
    assert family.cls("Tokenizer").from_pretrained(tmp_path)("o")["input_ids"][0] != 1


def test_the_saved_folder_stands_alone(tokenizer: Any, family: Family, model: Path, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    module = f"tokenization_{family}"
    assert (tmp_path / f"{module}.py").is_file()
    assert (tmp_path / "tokenizer.model").read_bytes() == model.read_bytes()
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["auto_map"] == {"AutoTokenizer": [f"{module}.{type(tokenizer).__name__}", None]}
    assert saved["add_bos_token"] is True


def test_the_vocabulary_is_saved_under_a_prefix(tokenizer: Any, model: Path, tmp_path: Path) -> None:
    (path,) = tokenizer.save_vocabulary(str(tmp_path), filename_prefix="mine")
    assert Path(path).name == "mine-tokenizer.model"
    assert Path(path).read_bytes() == model.read_bytes()


def test_saving_over_itself_keeps_the_model(tokenizer: Any, family: Family, model: Path, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    family.cls("Tokenizer").from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_a_copy_works_without_the_file(make: Any, family: Family, model: Path, tmp_path: Path, duplicate: Any) -> None:
    gone = tmp_path / "tokenizer.model"
    gone.write_bytes(model.read_bytes())
    tokenizer = family.cls("Tokenizer")(str(gone), **chat_arguments(end=5))
    gone.unlink()
    again = duplicate(tokenizer)
    text = "one<|end|> 天 , two"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == "<s>" + text
    (written,) = again.save_vocabulary(str(tmp_path))
    reread = sentencepiece.SentencePieceProcessor(model_file=written)
    assert reread.encode("one 天 , two") == tokenizer.sp_model.encode("one 天 , two")


def test_a_missing_model_is_named(family: Family, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.model\); put tokenizer\.model beside"):
        family.cls("Tokenizer")(str(tmp_path / "nowhere.model"))
