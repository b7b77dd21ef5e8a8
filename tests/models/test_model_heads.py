"""The heads beside the causal one: what they read, their losses, and folders with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForTokenClassification

from internlm2_model import InternLM2ForRewardModel
from tests.support.model_families import FAMILIES, INTERNLM2, Family, padded, tokens

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)
LENGTHS = (7, 40, 1, 12)  # one of them beyond the tiny models' trained length of 32


def head(family: Family, name: str, rope: str = "dynamic", **overrides: Any) -> Any:
    """A model with the golden body and a random head."""
    torch.manual_seed(0)
    config = family.config(rope, initializer_range=0.5, num_labels=3, **overrides)
    model = family.cls(f"For{name}")(config).eval()
    model.model.load_state_dict(family.model(rope).model.state_dict())
    return model


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------- sequence classification


def packed_rows() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A row [1, 60] of sequences, its positions, and the sequences."""
    rows = [tokens(1, length, seed=length) for length in LENGTHS]
    return torch.cat(rows, 1), torch.cat([torch.arange(length) for length in LENGTHS])[None], rows


@over_families
@pytest.mark.parametrize("told_by", ["position_ids", "indexes", "cu_seqlens", "cu_seq_lens_q"])
@torch.no_grad()
def test_classification_gives_one_answer_for_each_packed_sequence(family: Family, told_by: str) -> None:
    model = head(family, "SequenceClassification")
    ids, positions, rows = packed_rows()
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    given = positions if told_by == "position_ids" else positions[0] if told_by == "indexes" else offsets
    labels = torch.tensor([0, 2, 1, 2])
    outputs = model(ids, labels=labels, **{told_by: given})
    alone = torch.cat([model(row).logits for row in rows])
    close(outputs.logits, alone)
    close(outputs.loss, F.cross_entropy(alone, labels))


@over_families
@torch.no_grad()
def test_classification_of_several_packed_rows_leaves_padding_out(family: Family) -> None:
    model = head(family, "SequenceClassification")
    pad = model.config.pad_token_id
    first, second, third = tokens(1, 20, seed=1), tokens(1, 17, seed=2), tokens(1, 34, seed=3)
    ids = torch.cat((torch.cat((first, second), 1), torch.cat((torch.full((1, 3), pad), third), 1)))
    positions = torch.stack((torch.cat((torch.arange(20), torch.arange(17))), torch.tensor([0, 0, 0, *range(34)])))
    alone = torch.cat([model(row).logits for row in (first, second, third)])
    close(model(ids, position_ids=positions).logits, alone)


@over_families
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_classification_of_padded_rows_is_that_of_the_rows(family: Family, side: str) -> None:
    model = head(family, "SequenceClassification")
    rows = [tokens(1, length, seed=length) for length in LENGTHS]
    ids, mask = padded(rows, side)
    close(model(ids, attention_mask=mask).logits, torch.cat([model(row).logits for row in rows]))


# -------------------------------------------------------------------------- token classification, question answering


@over_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_token_classification(family: Family, side: str) -> None:
    model = head(family, "TokenClassification")
    rows = [tokens(1, 9, seed=1), tokens(1, 40, seed=2)]
    ids, mask = padded(rows, side)
    labels = torch.randint(0, 3, ids.shape).masked_fill(mask == 0, -100)
    outputs = model(ids, attention_mask=mask, labels=labels)
    assert outputs.logits.shape == (2, 40, 3)
    for index, row in enumerate(rows):
        states = model.model(row).last_hidden_state[0]
        close(outputs.logits[index][mask[index] == 1], F.linear(states, model.score.weight, model.score.bias))
    close(outputs.loss, F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), ignore_index=-100))
    outputs.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@over_families
def test_question_answering(family: Family) -> None:
    model = head(family, "QuestionAnswering")
    rows = [tokens(1, 9, seed=1), tokens(1, 40, seed=2)]
    ids, mask = padded(rows, "right")
    start, end = torch.tensor([3, 12]), torch.tensor([5, 30])
    outputs = model(ids, attention_mask=mask, start_positions=start, end_positions=end)
    for index, row in enumerate(rows):
        states = model.model(row).last_hidden_state[0]
        both = F.linear(states, model.qa_outputs.weight, model.qa_outputs.bias)
        close(outputs.start_logits[index][mask[index] == 1], both[:, 0])
        close(outputs.end_logits[index][mask[index] == 1], both[:, 1])
    losses = F.cross_entropy(outputs.start_logits, start) + F.cross_entropy(outputs.end_logits, end)
    close(outputs.loss, losses / 2)
    with pytest.raises(ValueError, match="start_positions and end_positions both, or neither"):
        model(ids, start_positions=start)


@over_families
@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("TokenClassification", AutoModelForTokenClassification),
        ("QuestionAnswering", AutoModelForQuestionAnswering),
    ],
)
@torch.no_grad()
def test_the_auto_classes_load_the_heads(family: Family, name: str, auto: Any, tmp_path: Path) -> None:
    model, ids = head(family, name), tokens(1, 12)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == f"{family.prefix}For{name}"
    assert type(loaded) is not type(model)  # the folder's own code
    torch.testing.assert_close(loaded(ids)[0], model(ids)[0])
    tuples = model(ids, return_dict=False)
    assert isinstance(tuples, tuple)
    torch.testing.assert_close(tuples[0], model(ids)[0])


# ------------------------------------------------------------------------------------------------------ reward model


class Letters:
    """As much of a tokenizer as the reward model uses: a turn is its role's first letter and its text."""

    def apply_chat_template(self, conversation: list[dict[str, str]], tokenize: bool) -> str:
        assert tokenize is False
        return "".join(f"{turn['role'][0]}{turn['content']}" for turn in conversation)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert add_special_tokens is False
        return {"input_ids": [3 + ord(letter) % 300 for letter in text]}


CHATS = [
    [{"role": "user", "content": "Hello! What's your name?"}, {"role": "assistant", "content": answer}]
    for answer in ("My name is InternLM2! What can I do for you?", "I have no idea.", "No.")
]
REWARD_TOKEN = 319


def reward_model(**overrides: Any) -> Any:
    return head(INTERNLM2, "RewardModel", reward_token_id=REWARD_TOKEN, **overrides)


def expected_score(model: Any, chat: list[dict[str, str]]) -> float:
    text = Letters().apply_chat_template(chat, tokenize=False)
    ids = torch.tensor([[*Letters()(text, add_special_tokens=False)["input_ids"], REWARD_TOKEN]])
    return float(model.model(ids).last_hidden_state[0, -1] @ model.v_head.weight[0])


@torch.no_grad()
def test_reward_scores_are_read_at_the_reward_token() -> None:
    model, tokenizer = reward_model(), Letters()
    expected = [expected_score(model, chat) for chat in CHATS]
    assert len({round(score, 3) for score in expected}) == len(CHATS)
    assert model.get_scores(tokenizer, CHATS) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert [model.get_score(tokenizer, chat) for chat in CHATS] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert model.compare(tokenizer, CHATS[0], CHATS[1]) is (expected[0] > expected[1])
    assert model.compare(tokenizer, CHATS[1], CHATS[0]) is (expected[1] > expected[0])
    logits = model.compare(tokenizer, CHATS[0], CHATS[1], return_logits=True)
    assert logits == pytest.approx(tuple(expected[:2]), rel=1e-4, abs=1e-4)
    places = model.rank(tokenizer, CHATS)
    assert sorted(places) == [0, 1, 2]
    assert [expected[places.index(place)] for place in range(3)] == sorted(expected, reverse=True)
    assert model.rank(tokenizer, CHATS, return_logits=True) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@torch.no_grad()
def test_a_published_reward_folder_loads_with_automodel(tmp_path: Path) -> None:
    model = reward_model()
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["reward_token_id"] == REWARD_TOKEN
    assert raw["auto_map"]["AutoModel"] == "modeling_internlm2.InternLM2ForRewardModel"
    published = {name: raw["auto_map"][name] for name in ("AutoConfig", "AutoModel")}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "auto_map": published}))
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "InternLM2ForRewardModel"
    assert {name for name in loaded.state_dict() if not name.startswith("model.")} == {"v_head.weight"}
    assert loaded.get_score(Letters(), CHATS[0]) == pytest.approx(expected_score(model, CHATS[0]), rel=1e-4, abs=1e-4)


def test_what_the_reward_model_cannot_do_is_refused() -> None:
    model = InternLM2ForRewardModel(INTERNLM2.config())
    with pytest.raises(ValueError, match="names no reward_token_id"):
        model.get_score(Letters(), CHATS[0])
    with pytest.raises(ValueError, match="no loss for labels"):
        model(tokens(1, 4), labels=torch.tensor([1]))
