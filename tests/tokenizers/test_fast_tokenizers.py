"""The fast tokenizer classes: what AutoTokenizer gives, offsets, masks, settings, added tokens, saving."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.model_families import FAMILIES, Family
from tests.support.real_tokenizers import golden_cases, real_model
from tests.tokenizers.test_chat_templates import SPECS, small_spec
from weight_conversion.tokenizer.tokenizer_files import Tokenizer

RENAMED = "[UNUSED_TOKEN_145]"  # InternLM2's piece under <|im_end|>


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def with_code(family: Family, folder: Path) -> Path:
    """Put the family's modules into a folder, as the converters do."""
    for module in Path(str(family.package.__file__)).parent.glob("token*.py"):
        shutil.copyfile(module, folder / module.name)
    return folder


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small chat tokenizer as converted."""
    folder = tmp_path_factory.mktemp("chat")
    spec, model = small_spec(str(family), folder / "trained.model")
    assert Tokenizer.read(model).files(spec, chat=True).write(folder) == ()
    return with_code(family, folder)


@pytest.fixture
def fast(folder: Path) -> Any:
    return load(folder)


@pytest.fixture
def slow(family: Family, folder: Path) -> Any:
    return family.cls("Tokenizer").from_pretrained(folder)


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **kwargs)


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def uncovered(tokenizer: Any, text: str) -> set[int]:
    """The characters of a text that no token spans, or whose token is not found from them."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    spans = encoding["offset_mapping"]
    assert len(spans) == len(encoding["input_ids"])
    left = set(range(len(text))) - {at for start, end in spans for at in range(start, end)}
    for at in range(len(text)):
        token = encoding.char_to_token(at)
        if token is None or not spans[token][0] <= at < spans[token][1]:
            left.add(at)
    return left


# Which class is loaded


def test_the_fast_class_is_what_is_loaded(family: Family, fast: Any) -> None:
    assert type(fast).__name__ == f"{family.cls('Tokenizer').__name__}Fast"
    assert isinstance(fast, PreTrainedTokenizerFast)
    assert fast.is_fast


def test_a_folder_without_tokenizer_json_gives_the_slow_one(family: Family, folder: Path, tmp_path: Path) -> None:
    """As published folders, which name both classes."""
    published = Path(shutil.copytree(folder, tmp_path / "published"))
    (published / "tokenizer.json").unlink()
    tokenizer = load(published)
    assert type(tokenizer).__name__ == family.cls("Tokenizer").__name__
    assert tokenizer("one  two 天")["input_ids"] == load(folder)("one  two 天")["input_ids"]
    again = load(saved(tokenizer, tmp_path / "saved"))
    assert type(again).__name__ == type(tokenizer).__name__


def test_arguments_of_sentencepiece_give_the_slow_one(family: Family, folder: Path) -> None:
    tokenizer = load(folder, sp_model_kwargs={"add_bos": False})
    assert type(tokenizer).__name__ == family.cls("Tokenizer").__name__
    assert tokenizer.sp_model_kwargs == {"add_bos": False}


def test_what_it_cannot_be_made_from_is_refused(family: Family, folder: Path) -> None:
    cls = family.cls("TokenizerFast")
    with pytest.raises(ValueError, match=r"is made from tokenizer\.json; load a folder"):
        cls(vocab_file=str(folder / "tokenizer.model"))
    with pytest.raises(ValueError, match="use the slow one"):
        cls(tokenizer_file=str(folder / "tokenizer.json"), sp_model_kwargs={"add_bos": True})
    assert cls(tokenizer_file=str(folder / "tokenizer.json"), unk_token="<unk>", bos_token="<s>")("o")["input_ids"]


def test_the_slow_one_refuses_offsets(slow: Any) -> None:
    for texts in ("one", ["one", "two"]):
        with pytest.raises(NotImplementedError, match="return_offset"):
            slow(texts, return_offsets_mapping=True)


def test_the_slow_one_refuses_the_mask_of_answers(slow: Any) -> None:
    """transformers 5.24 would end in a TypeError about the offsets that are not there."""
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    with pytest.raises(NotImplementedError, match="return_assistant_tokens_mask"):
        slow.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert slow.apply_chat_template(messages, tokenize=False)


# Offsets


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("theriv andof\n\t 天地上有😀Ａé▁0\0"), max_size=40))
def test_offsets_cover_every_character(fast: Any, text: str) -> None:
    assert uncovered(fast, text) == set()


def test_offsets_of_a_renamed_piece_span_its_name(family: Family, fast: Any) -> None:
    if str(family) != "internlm2":
        pytest.skip("InternLM's chat tokens have the names of their pieces")
    text = f"a {RENAMED}b<|im_end|>{RENAMED}"
    assert uncovered(fast, text) == set()
    encoding = fast([text, "one"], text_pair=[RENAMED, "two"], padding=True, return_offsets_mapping=True)
    index = fast.convert_tokens_to_ids("<|im_end|>")
    spans = [
        span for i, span in zip(encoding["input_ids"][0], encoding["offset_mapping"][0], strict=True) if i == index
    ]
    assert spans == [(2, 20), (21, 31), (31, 49), (0, 18)]
    last = encoding.char_to_token(0, 3, 1)
    assert encoding.token_to_chars(0, last) == (0, 18)
    assert encoding.sequence_ids(0)[last] == 1
    again = pickle.loads(pickle.dumps(encoding))
    assert again.char_to_token(0, 3) == encoding.char_to_token(0, 3)


def test_offsets_where_the_name_is_replaced_as_text(family: Family, folder: Path, tmp_path: Path) -> None:
    """Folders of version 1.1 hold that; other expressions than a name are no name."""
    if str(family) != "internlm2":
        pytest.skip("InternLM's chat tokens have the names of their pieces")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    steps = content["normalizer"]["normalizers"]
    for step in steps[:-1]:
        step["pattern"] = {"String": re.sub(r"\\(.)", r"\1", step["pattern"]["Regex"])}
    assert RENAMED in [step["pattern"]["String"] for step in steps]
    steps[-1]["pattern"] = {"Regex": "[ ]"}
    older = shutil.copytree(folder, tmp_path / "older")
    (older / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    text = f"a {RENAMED}b<|im_end|>{RENAMED}"
    assert load(older)(text, return_offsets_mapping=True) == load(folder)(text, return_offsets_mapping=True)
    assert uncovered(load(older), text) == set()


@pytest.mark.parametrize("chat", [False, True])
def test_offsets_cover_every_character_of_the_recorded_texts(family: Family, tmp_path: Path, chat: bool) -> None:
    Tokenizer.read(real_model(str(family))).files(SPECS[str(family)], chat).write(tmp_path)
    tokenizer = family.cls("TokenizerFast").from_pretrained(tmp_path)
    cases = golden_cases(str(family))
    if chat and str(family) == "internlm2":  # the chat tokens change the ids of these texts
        cases = [case for case in cases if "<|" not in case["text"] and "UNUSED" not in case["text"]]
        cases += golden_cases("internlm2_chat")
    for case in cases:
        assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]
        assert uncovered(tokenizer, case["text"]) == set(), case["text"]


# Start and end tokens


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_start_and_end_tokens_are_those_of_the_slow_one(
    family: Family, folder: Path, tmp_path: Path, bos: bool, eos: bool
) -> None:
    slow = family.cls("Tokenizer").from_pretrained(folder, add_bos_token=bos, add_eos_token=eos)
    fast = load(folder, add_bos_token=bos, add_eos_token=eos)
    changed = load(folder)
    changed.add_bos_token, changed.add_eos_token = bos, eos
    for tokenizer in (fast, changed, load(saved(fast, tmp_path / "a")), load(saved(slow, tmp_path / "b"))):
        assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (bos, eos)
        for pair in (None, "two"):
            expected = slow("one", pair, return_special_tokens_mask=True)
            found = tokenizer("one", pair, return_special_tokens_mask=True)
            assert dict(found) == dict(expected)
            assert tokenizer.num_special_tokens_to_add(pair=pair is not None) == bos + eos
        assert tokenizer.build_inputs_with_special_tokens([5], [6]) == slow.build_inputs_with_special_tokens([5], [6])
        assert tokenizer.get_special_tokens_mask([5]) == slow.get_special_tokens_mask([5])


def test_a_setting_of_the_folder_counts(folder: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    config = json.loads((changed / "tokenizer_config.json").read_text())
    (changed / "tokenizer_config.json").write_text(json.dumps(config | {"add_eos_token": True}))
    assert load(changed)("o")["input_ids"][-1] == 2
    assert load(changed, add_eos_token=False)("o")["input_ids"][-1] != 2


# Saving


def test_what_the_fast_one_saves_stands_alone(family: Family, fast: Any, folder: Path, tmp_path: Path) -> None:
    target = saved(fast, tmp_path / "saved")
    module, name = f"tokenization_{family}", family.cls("Tokenizer").__name__
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["auto_map"] == {"AutoTokenizer": [f"{module}.{name}", f"{module}_fast.{name}Fast"]}
    assert config["tokenizer_class"] == name
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    before = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert config["added_tokens_decoder"] == before
    assert (target / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert {f"{module}.py", f"{module}_fast.py"} <= {path.name for path in target.iterdir()}
    text = "one <eoa> <|im_end|>\n  two 天"
    for again in (
        load(target),
        family.cls("Tokenizer").from_pretrained(target),
        PreTrainedTokenizerFast.from_pretrained(target),
    ):
        assert again(text)["input_ids"] == fast(text)["input_ids"]
        assert again.get_vocab() == fast.get_vocab()
        assert again.chat_template == fast.chat_template


def test_saving_over_itself_keeps_everything(fast: Any, folder: Path, tmp_path: Path) -> None:
    target = saved(fast, tmp_path / "saved")
    again = load(target)
    saved(again, target)
    assert load(target)("one 天")["input_ids"] == fast("one 天")["input_ids"]
    assert (target / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_without_tokenizer_model_the_rest_is_saved(folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "tokenizer.model").unlink()
    target = saved(load(bare), tmp_path / "saved")
    assert not (target / "tokenizer.model").exists()
    assert load(target)("one 天")["input_ids"] == load(folder)("one 天")["input_ids"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_a_copy_is_the_same(fast: Any, duplicate: Any) -> None:
    fast.add_bos_token = False
    again = duplicate(fast)
    assert again("one 天", return_offsets_mapping=True) == fast("one 天", return_offsets_mapping=True)
    assert again.add_bos_token is False


def add_tokens(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<new>", "<a b>"])
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)


@pytest.mark.parametrize("which", ["slow", "fast"])
def test_added_tokens_are_in_every_saved_form(family: Family, folder: Path, tmp_path: Path, which: str) -> None:
    first = load(folder) if which == "fast" else family.cls("Tokenizer").from_pretrained(folder)
    add_tokens(first)
    first.add_eos_token = True
    for target in (saved(first, tmp_path / "a"), saved(first, tmp_path / "a")):  # over itself as well
        text = "one<new> two<|turn|><a b> 天<new>"
        ids = first(text)["input_ids"]
        assert {400, 401, 402} <= set(ids)
        for again in (
            load(target),
            family.cls("Tokenizer").from_pretrained(target),
            PreTrainedTokenizerFast.from_pretrained(target),
        ):
            assert again(text)["input_ids"] == ids
            assert again.decode(ids) == f"<s>{text}</s>"
            assert again.decode(ids, skip_special_tokens=True) == text.replace("<|turn|>", "")
            assert len(again) == 403


def test_a_tokenizer_json_that_is_not_true_of_the_tokens_is_not_used(
    family: Family, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would give a token that the folder puts on the id of a piece another id."""
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    config = json.loads((changed / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["350"] = config["added_tokens_decoder"]["1"] | {"content": "<late>"}
    (changed / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(changed)
    assert type(tokenizer).__name__ == family.cls("Tokenizer").__name__
    assert tokenizer("a<late>b")["input_ids"][2] == 350
    assert "has no <late> with the id 350; the slow one is loaded" in caplog.text
    for target in (tmp_path / "saved", changed):
        tokenizer.save_pretrained(target)
        assert not (target / "tokenizer.json").exists()
        assert "tokenizer.json was left out, because '<late>' cannot have the id 350 in it" in caplog.text
        assert load(target)("a<late>b")["input_ids"] == tokenizer("a<late>b")["input_ids"]
