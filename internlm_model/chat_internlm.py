"""Chat for InternLM: the prompt of a conversation, a whole answer, and an answer while it is written.

A conversation is, after `<s>`, a sequence of turns

    <|System|>:{instruction}\\n
    <|User|>:{query}<eoh>\\n
    <|Bot|>:{response}<eoa>\\n

and the prompt ends with `<|Bot|>:`. `<eoh>` and `<eoa>` are pieces of the tokenizer, the other markers plain text. With
a tokenizer that has no such pieces, the answer ends at the text of the end-of-turn marker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, cast

import torch
from transformers import (
    BatchEncoding,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

Turn = tuple[str, str]  # a query and its response

END_OF_TURN = "<eoa>"


def prompt_text(query: str, history: Sequence[Turn], meta_instruction: str) -> str:
    """Return the text of a conversation up to where the answer begins, without `<s>`."""
    system = f"<|System|>:{meta_instruction}\n" if meta_instruction else ""
    earlier = "".join(f"<|User|>:{asked}<eoh>\n<|Bot|>:{answered}{END_OF_TURN}\n" for asked, answered in history)
    return f"{system}{earlier}<|User|>:{query}<eoh>\n<|Bot|>:"


class ChatMixin:
    """Gives a causal language model `build_inputs`, `chat` and `stream_chat`, for one conversation at a time.

    A history is a sequence of (query, response) pairs; the caller's own is never changed.
    """

    def build_inputs(
        self: Any,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[Turn] | None = None,
        meta_instruction: str = "",
    ) -> BatchEncoding:
        """Return input_ids and attention_mask [1, T] of a conversation, on the model's device.

        The ids are those of `tokenizer.apply_chat_template` with the template that the converter writes.
        `meta_instruction` is the system turn; empty means none.
        """
        text = str(tokenizer.bos_token) + prompt_text(query, history or (), meta_instruction)
        inputs = tokenizer(text, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
        return inputs.to(self.device)

    def chat(
        self: Any,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[Turn] | None = None,
        streamer: BaseStreamer | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str = "",
        **kwargs: Any,
    ) -> tuple[str, list[Turn]]:
        """Answer a query and return (response, history with this turn at its end).

        `temperature` and `top_p` count only with `do_sample`. Further arguments go to `generate`.

        Raises:
            ValueError: more than one query, or more than one answer to it.
        """
        settings = _settings(max_new_tokens, do_sample, temperature, top_p) | kwargs
        return _Question(self, tokenizer, query, list(history or ()), meta_instruction, settings).answer(streamer)

    def stream_chat(
        self: Any,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[Turn] | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str = "",
        **kwargs: Any,
    ) -> Iterator[tuple[str, list[Turn]]]:
        """Answer a query while the answer is written: an iterator of (response so far, history with this turn).

        No response ends in half a character, and the last is what `chat` returns. An error in generation is raised by
        the iterator; closing the iterator stops the generation. Arguments and errors are those of `chat`.
        """
        settings = _settings(max_new_tokens, do_sample, temperature, top_p) | kwargs
        return _Question(self, tokenizer, query, list(history or ()), meta_instruction, settings).stream()


def _settings(max_new_tokens: int, do_sample: bool, temperature: float, top_p: float) -> dict[str, Any]:
    sampling = {"temperature": temperature, "top_p": top_p} if do_sample else {}
    return {"max_new_tokens": max_new_tokens, "do_sample": do_sample, **sampling}


@dataclass(frozen=True)
class _Question:
    """One query to a model, with what came before it and how to answer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    query: str
    history: list[Turn]
    meta_instruction: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.query, str):
            raise ValueError(
                f"chat answers one query at a time; found a {type(self.query).__name__}, expected a str. "
                "Use generate for a batch."
            )
        if self.settings.get("num_return_sequences", 1) != 1:
            raise ValueError(
                f"chat gives one answer; found num_return_sequences={self.settings['num_return_sequences']}. "
                "Use generate for several."
            )

    def answer(self, streamer: BaseStreamer | None, *criteria: StoppingCriteria) -> tuple[str, list[Turn]]:
        """Generate to the end and return (response, new history)."""
        inputs = self.model.build_inputs(self.tokenizer, self.query, self.history, self.meta_instruction)
        start = inputs["input_ids"].shape[1]
        end_of_turn = self._end_of_turn_ids()
        spelled = [] if end_of_turn else [_EndOfTurn(self.tokenizer, start)]
        settings = {
            "eos_token_id": [self.tokenizer.eos_token_id, *end_of_turn],
            "pad_token_id": self.tokenizer.pad_token_id,
            **self.settings,
            "stopping_criteria": StoppingCriteriaList(
                [*self.settings.get("stopping_criteria", ()), *spelled, *criteria]
            ),
        }
        output = self.model.generate(**inputs, **settings, tokenizer=self.tokenizer, streamer=streamer)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences  # [1, start + new]
        ids = sequences[0, start:].tolist()
        text = self.tokenizer.decode(ids[: _whole_characters(self.tokenizer, ids)], skip_special_tokens=True)
        return self._turn(str(text).partition(END_OF_TURN)[0])

    def stream(self) -> Iterator[tuple[str, list[Turn]]]:
        """Generate in a thread and yield (response so far, new history)."""
        streamer = _WholeCharacterStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        cancelled = Event()
        result: Future[tuple[str, list[Turn]]] = Future()

        def work() -> None:
            try:
                result.set_result(self.answer(streamer, _Cancelled(cancelled)))
            except BaseException as error:  # the caller's to handle; it waits for the streamer's end
                result.set_exception(error)
            finally:
                streamer.end()

        # A daemon, so that a program that ends amid an answer does end.
        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            written, shown = "", ""
            for piece in streamer:  # whole words, hence never a part of the end-of-turn marker
                written += piece
                response = written.partition(END_OF_TURN)[0]
                if response != shown:
                    shown = response
                    yield self._turn(response)
            response, history = result.result()
            if response != shown or not shown:
                yield response, history
        finally:
            cancelled.set()
            thread.join()

    def _turn(self, response: str) -> tuple[str, list[Turn]]:
        return response, [*self.history, (self.query, response)]

    def _end_of_turn_ids(self) -> list[int]:
        """Return the id of the end-of-turn marker in a list, or an empty one if the tokenizer spells it out."""
        index = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        return [index] if isinstance(index, int) and index != self.tokenizer.unk_token_id else []


def _whole_characters(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Return how many of `ids` end on a whole character: byte tokens of an unfinished one (UTF-8) do not count."""
    for size, token in enumerate(reversed(tokenizer.convert_ids_to_tokens(ids[-3:])), start=1):
        match = re.fullmatch("<0x([0-9A-F]{2})>", token or "")  # None: an id the tokenizer lacks
        byte = int(match[1], 16) if match else 0
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
            return len(ids) - size if size < 2 + (byte >= 0xE0) + (byte >= 0xF0) else len(ids)
        if byte < 0x80:
            break
    return len(ids)


class _WholeCharacterStreamer(TextIteratorStreamer):
    """Holds byte tokens back until they make a character."""

    _held: tuple[int, ...] = ()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt [1, T] first, then the new ids [1] of every step."""
        if self.next_tokens_are_prompt:
            super().put(value)
            return
        ids = [*self._held, *value.tolist()]
        whole = _whole_characters(self.tokenizer, ids)
        self._held = tuple(ids[whole:])
        super().put(torch.tensor(ids[:whole], dtype=torch.long))

    def end(self) -> None:
        """Leave an unfinished character out and close the stream."""
        self._held = ()
        super().end()


class _Cancelled(StoppingCriteria):
    """Stops when nobody listens any more."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return _each([self._event.is_set()] * len(input_ids), input_ids.device)


class _EndOfTurn(StoppingCriteria):
    """Stops when the answer, which starts at position `start`, spells the end-of-turn marker out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self._tokenizer = tokenizer
        self._start = start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        # Each token of the marker's text has at least one of its characters, so the last tokens are enough.
        tails = input_ids[:, self._start :][:, -len(END_OF_TURN) :].tolist()
        return _each([END_OF_TURN in self._tokenizer.decode(tail) for tail in tails], input_ids.device)


def _each(done: list[bool], device: torch.device) -> torch.BoolTensor:
    return cast(torch.BoolTensor, torch.tensor(done, device=device, dtype=torch.bool))
