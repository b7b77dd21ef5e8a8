"""What this project's models and tokenizers answer: the expectation that tools are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.consumers.protocol import EMBEDDED, NEW_TOKENS, Questions
from tests.consumers.texts import MESSAGES, TEXTS
from tests.support.model_families import tokens

LENGTH = 100
"""Tokens asked about: beyond what the dynamic folders were trained on."""


def questions(folder: Path, way: str) -> Questions:
    """Prompts of 100, 80, 81 and 37 tokens; the second and third follow one another, decoded at once."""
    ids = tokens(1, LENGTH)[0].tolist()
    with_template = (folder / "chat_template.jinja").is_file()
    return Questions(
        folder=str(folder),
        way=way,
        ids=ids,
        prompts=[ids[:80], ids[-81:], ids[:37]],
        texts=list(TEXTS),
        messages=list(MESSAGES) if with_template else None,
    )


@torch.no_grad()
def answers(folder: Path) -> dict[str, Any]:
    """Ours, from a remote-code folder, as protocol.py names them: every prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    asked = questions(folder, "")
    logits = model(torch.tensor([asked.ids])).logits[0]
    scores = _scores(logits[:-1], asked.ids[1:])
    # A pass that ends before the last token: with dynamic NTK scaling it is another one.
    shorter = _scores(model(torch.tensor([asked.ids[:-1]])).logits[0], asked.ids[1:])
    found: dict[str, Any] = {
        "logits": logits.numpy(),
        "scores": scores.numpy(),
        "likelihood": shorter[LENGTH // 2 - 1 :].sum().item(),
        "embeddings": [_embedding(model, tokenizer(text)["input_ids"]) for text in asked.texts[:EMBEDDED]],
        "greedy": [_continued(model, ids) for ids in asked.prompts],
        "tokens": [tokenizer(text)["input_ids"] for text in asked.texts],
        "ends": _ends(folder),
    }
    if asked.messages is not None:
        text = tokenizer.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        found["chat"] = {"text": text, "ids": prompt}
        found["assistant_loss"] = _loss_of_answer(model, tokenizer, asked.messages[1:3])
        found["completion"] = tokenizer.decode(_continued(model, prompt), skip_special_tokens=True)
    return found


def _continued(model: Any, ids: list[int]) -> list[int]:
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    mask = torch.ones(1, len(ids), dtype=torch.long)
    return model.generate(torch.tensor([ids]), attention_mask=mask, **settings)[0, len(ids) :].tolist()


def _scores(logits: torch.Tensor, following: list[int]) -> torch.Tensor:
    """Log-probabilities [T] of the tokens that follow, from logits [T, V]."""
    return logits.log_softmax(-1).gather(1, torch.tensor(following)[:, None])[:, 0]


def _embedding(model: Any, ids: list[int]) -> list[float]:
    return model.model(torch.tensor([ids])).last_hidden_state[0].mean(0).tolist()


def _loss_of_answer(model: Any, tokenizer: Any, conversation: list[dict[str, str]]) -> float:
    """Mean loss of the last message's tokens and of the end of its turn, by the text of the conversation alone."""
    *before, answer = conversation
    prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    text = prompt + answer["content"] + tokenizer.convert_ids_to_tokens(_ends_of(model)[-1])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    labels = torch.tensor([[-100] * start + ids[start:]])
    return model(torch.tensor([ids]), labels=labels).loss.item()


def _ends_of(model: Any) -> list[int]:
    return sorted(model.generation_config.eos_token_id)


def _ends(folder: Path) -> list[int]:
    named = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    return sorted([named] if isinstance(named, int) else named)
