"""Chat: the prompt, the answer, the stream; with scripted answers, so that what is said is known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteria

from tests.support.model_families import FAMILIES, Family
from tests.support.tokenizer_fixture import train_tokenizer
from weight_conversion.tokenizer.specs import INTERNLM2_TOKENIZER, INTERNLM_TOKENIZER, TokenizerSpec
from weight_conversion.tokenizer.tokenizer_files import Tokenizer

SPECS = {"internlm": INTERNLM_TOKENIZER, "internlm2": INTERNLM2_TOKENIZER}
END_OF_TURN = {"internlm": "<eoa>", "internlm2": "<|im_end|>"}


class Script(LogitsProcessor):
    """Makes generation say the given ids, and then the last of them for ever."""

    def __init__(self, ids: list[int], at_step: Callable[[int], None] = lambda step: None) -> None:
        self.ids = ids
        self.at_step = at_step
        self.steps = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.at_step(self.steps)
        wanted = self.ids[min(self.steps, len(self.ids) - 1)]
        self.steps += 1
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([wanted]), 0.0)


@dataclass(frozen=True)
class Speaker:
    """A tiny model and a tokenizer of one family."""

    family: Family
    model: Any
    tokenizer: Any

    def says(self, *ids: int, at_step: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
        return {"do_sample": False, "logits_processor": LogitsProcessorList([Script(list(ids), at_step)])}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def end_of_turn(self) -> str:
        return END_OF_TURN[str(self.family)]

    def answer(self, text: str) -> list[int]:
        """The ids of a text and of the end of the turn after it."""
        return [*self.ids(text), *self.ids(self.end_of_turn)]


def small_spec(family: Family, model: Path) -> tuple[TokenizerSpec, Path]:
    """Train a tokenizer whose chat tokens lie on its own unused pieces."""
    spec = SPECS[str(family)]
    train_tokenizer(model, 400, user_defined_symbols=[token.piece for token in spec.chat_tokens])
    tokens = tuple(replace(token, id=3 + offset) for offset, token in enumerate(spec.chat_tokens))
    return replace(spec, chat_tokens=tokens), model


def speaker(family: Family, folder: Path, chat: bool, fast: bool) -> Speaker:
    spec, model_file = small_spec(family, folder / "trained.model") if chat else (SPECS[str(family)], folder / "m")
    if not chat:
        train_tokenizer(model_file, 400)
    assert Tokenizer.read(model_file).files(spec, chat).write(folder) == ()
    cls = PreTrainedTokenizerFast if fast else family.cls("Tokenizer")
    tokenizer = cls.from_pretrained(folder)
    torch.manual_seed(0)
    config = family.config(vocab_size=400, num_hidden_layers=1)
    return Speaker(family, family.cls("ForCausalLM")(config).eval(), tokenizer)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module", params=["slow", "fast"])
def chatting(request: pytest.FixtureRequest, family: Family, tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    """With chat tokens."""
    return speaker(family, tmp_path_factory.mktemp("chat"), chat=True, fast=request.param == "fast")


@pytest.fixture(scope="module", params=["chat-slow", "chat-fast", "base-slow", "base-fast"])
def either(request: pytest.FixtureRequest, family: Family, tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    """With chat tokens, or with a base tokenizer, to which the markers are plain text."""
    kind, speed = request.param.split("-")
    return speaker(family, tmp_path_factory.mktemp(kind), chat=kind == "chat", fast=speed == "fast")


HISTORY = [("one and one?", "two 天"), ("why", "  because\n")]
PROMPTS = {
    "internlm": (
        "<s><|System|>:be brief\n<|User|>:one and one?<eoh>\n<|Bot|>:two 天<eoa>\n"
        "<|User|>:why<eoh>\n<|Bot|>:  because\n<eoa>\n<|User|>:go on<eoh>\n<|Bot|>:"
    ),
    "internlm2": (
        "<s><|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none and one?<|im_end|>\n"
        "<|im_start|>assistant\ntwo 天<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n"
        "<|im_start|>assistant\n  because\n<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    ),
}


def messages(meta_instruction: str = "") -> list[dict[str, str]]:
    turns = [{"role": "system", "content": meta_instruction}] if meta_instruction else []
    for query, response in HISTORY:
        turns += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return [*turns, {"role": "user", "content": "go on"}]


@pytest.mark.parametrize("meta_instruction", ["", "be brief"])
def test_the_prompt_is_the_chat_template(chatting: Speaker, meta_instruction: str) -> None:
    inputs = chatting.model.build_inputs(chatting.tokenizer, "go on", HISTORY, meta_instruction)
    template = chatting.tokenizer.apply_chat_template(
        messages(meta_instruction), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert torch.equal(inputs["input_ids"], template["input_ids"])
    assert inputs["attention_mask"].all()


def test_the_prompt_is_this_text(either: Speaker) -> None:
    ids = either.model.build_inputs(either.tokenizer, "go on", HISTORY, "be brief")["input_ids"][0]
    assert either.tokenizer.decode(ids) == PROMPTS[str(either.family)]
    assert ids.tolist().count(either.tokenizer.bos_token_id) == 1


def test_the_end_of_a_turn_is_one_token_with_chat(chatting: Speaker) -> None:
    assert len(chatting.ids(chatting.end_of_turn)) == 1


@pytest.mark.parametrize("text", ["two and two", "天上有云", "a 😀 b", "", "  spaced \n\n", "<|im", "a <"])
def test_an_answer_ends_before_the_end_of_turn(either: Speaker, text: str) -> None:
    history = [("q", "r")]
    script = either.answer(text)
    response, after = either.model.chat(either.tokenizer, "q2", history, max_new_tokens=60, **either.says(*script, 5))
    assert response == text
    assert after == [("q", "r"), ("q2", text)]
    assert history == [("q", "r")]

    streamed = list(
        either.model.stream_chat(either.tokenizer, "q2", history, max_new_tokens=60, **either.says(*script, 5))
    )
    assert streamed[-1] == (response, after)
    assert all(text.startswith(part) and turns == [("q", "r"), ("q2", part)] for part, turns in streamed)
    assert [part for part, _ in streamed] == sorted({part for part, _ in streamed}, key=len)
    assert history == [("q", "r")]


def test_generation_stops_with_the_turn(either: Speaker) -> None:
    steps: list[int] = []
    script = either.answer("two and two")
    either.model.chat(either.tokenizer, "q", max_new_tokens=60, **either.says(*script, 5, at_step=steps.append))
    assert len(steps) == len(script)
    del steps[:]
    says = either.says(*script, 5, at_step=steps.append)
    assert list(either.model.stream_chat(either.tokenizer, "q", max_new_tokens=60, **says))[-1][0] == "two and two"
    assert len(steps) == len(script)


def test_an_answer_ends_at_end_of_text_too(chatting: Speaker) -> None:
    script = [*chatting.ids("done"), chatting.tokenizer.eos_token_id, *chatting.ids("more")]
    assert chatting.model.chat(chatting.tokenizer, "q", max_new_tokens=20, **chatting.says(*script))[0] == "done"


def test_no_prefix_ends_in_half_a_character(either: Speaker) -> None:
    """However short the answer is cut, it holds whole characters, in the stream and at its end."""
    text = "é 天😀ก"
    script = either.ids(text)
    for length in range(1, len(script) + 1):
        arguments = {"max_new_tokens": length, **either.says(*script)}
        responses = [part for part, _ in either.model.stream_chat(either.tokenizer, "q", **arguments)]
        assert all(text.startswith(part) for part in responses)
        arguments = {"max_new_tokens": length, **either.says(*script)}
        assert either.model.chat(either.tokenizer, "q", **arguments)[0] == responses[-1]
    assert responses[-1] == text


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0<"), max_size=12))
def test_any_text_is_streamed_as_it_is(chatting: Speaker, text: str) -> None:
    script = chatting.answer(text)
    stream = chatting.model.stream_chat(chatting.tokenizer, "q", max_new_tokens=100, **chatting.says(*script))
    responses = [part for part, _ in stream]
    assert responses[-1] == text
    assert all(text.startswith(part) for part in responses)


def test_chinese_is_shown_character_by_character(chatting: Speaker) -> None:
    stream = chatting.model.stream_chat(
        chatting.tokenizer, "q", max_new_tokens=60, **chatting.says(*chatting.answer("天上有云地上有水"))
    )
    assert len(list(stream)) > 3


class SomeError(RuntimeError):
    pass


def fail_at(wanted: int) -> Callable[[int], None]:
    def at_step(step: int) -> None:
        if step == wanted:
            raise SomeError("out of memory, say")

    return at_step


def test_an_error_in_generation_reaches_the_caller(chatting: Speaker) -> None:
    script = chatting.ids("天上有云地上有水")
    with pytest.raises(SomeError):
        chatting.model.chat(chatting.tokenizer, "q", **chatting.says(*script, at_step=fail_at(2)))
    stream = chatting.model.stream_chat(chatting.tokenizer, "q", **chatting.says(*script, at_step=fail_at(2)))
    shown = []
    with pytest.raises(SomeError):
        shown += stream
    assert generating_threads() == []
    with pytest.raises(SomeError):
        next(chatting.model.stream_chat(chatting.tokenizer, "q", **chatting.says(*script, at_step=fail_at(0))))


def generating_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "(work)" in thread.name]


def test_closing_the_stream_stops_the_generation(chatting: Speaker) -> None:
    steps: list[int] = []
    endless = chatting.says(*chatting.ids("the river o"), at_step=steps.append)
    stream = chatting.model.stream_chat(chatting.tokenizer, "q", max_new_tokens=100_000, **endless)
    assert generating_threads() == []  # nothing runs before the first response is asked for
    next(stream)
    assert len(generating_threads()) == 1
    stream.close()
    assert generating_threads() == []
    stopped_at = len(steps)
    assert stopped_at < 100_000
    threading.Event().wait(0.05)
    assert len(steps) == stopped_at


def test_a_loop_that_is_left_stops_the_generation(chatting: Speaker) -> None:
    endless = chatting.says(*chatting.ids("on and "))
    for _response, _history in chatting.model.stream_chat(chatting.tokenizer, "q", max_new_tokens=100_000, **endless):
        break
    assert generating_threads() == []


@pytest.mark.parametrize("ask", ["chat", "stream_chat"])
def test_more_than_one_conversation_is_refused(chatting: Speaker, ask: str) -> None:
    with pytest.raises(ValueError, match=r"one query at a time; found a list"):
        getattr(chatting.model, ask)(chatting.tokenizer, ["q1", "q2"])
    with pytest.raises(ValueError, match=r"num_return_sequences=2"):
        getattr(chatting.model, ask)(chatting.tokenizer, "q", num_return_sequences=2)


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return torch.tensor([self.calls >= 3])


def test_arguments_of_generate_are_passed_on(either: Speaker) -> None:
    script = either.says(*either.ids("o"))
    response, _ = either.model.chat(either.tokenizer, "q", stopping_criteria=[AfterThree()], **script)
    assert response == "ooo"
    (ordinary,) = either.ids("o")
    response, _ = either.model.chat(either.tokenizer, "q", eos_token_id=ordinary, **either.says(ordinary))
    assert response == "o"
    output = either.model.chat(
        either.tokenizer, "q", max_new_tokens=2, return_dict_in_generate=True, **either.says(ordinary)
    )
    assert output[0] == "oo"


def test_an_answer_stops_after_a_text_of_the_caller(chatting: Speaker) -> None:
    said = chatting.says(*chatting.answer("one and two and three"))
    response, _ = chatting.model.chat(chatting.tokenizer, "count", stop_strings=["two"], **said)
    assert response == "one and two"


def test_a_streamer_of_the_caller_gets_the_answer(chatting: Speaker, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextStreamer

    streamer = TextStreamer(chatting.tokenizer, skip_prompt=True, skip_special_tokens=True)
    chatting.model.chat(chatting.tokenizer, "q", streamer=streamer, **chatting.says(*chatting.answer("the river")))
    assert capsys.readouterr().out == "the river\n"


def test_sampling_is_the_default_and_repeats_with_a_seed(chatting: Speaker) -> None:
    def ask() -> Iterator[str]:
        torch.manual_seed(3)
        yield chatting.model.chat(chatting.tokenizer, "q", max_new_tokens=12)[0]
        torch.manual_seed(3)
        yield list(chatting.model.stream_chat(chatting.tokenizer, "q", max_new_tokens=12))[-1][0]
        torch.manual_seed(4)
        yield chatting.model.chat(chatting.tokenizer, "q", max_new_tokens=12)[0]

    first, streamed, other = ask()
    assert first == streamed != other
