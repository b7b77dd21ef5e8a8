"""The chat templates: the text of every kind of message, the mask of what the model writes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.tokenizer_fixture import train_tokenizer
from weight_conversion.tokenizer.specs import INTERNLM2_TOKENIZER, INTERNLM_TOKENIZER, TokenizerSpec
from weight_conversion.tokenizer.tokenizer_files import Tokenizer

SPECS = {"internlm": INTERNLM_TOKENIZER, "internlm2": INTERNLM2_TOKENIZER}
END = {"internlm": "<eoa>", "internlm2": "<|im_end|>"}
TOOL = {"name": "weather", "description": "Wetter in Köln <now>", "parameters": {"type": "object", "properties": {}}}
TOOL_TEXT = (
    '{"name": "weather", "description": "Wetter in Köln <now>", "parameters": {"type": "object", "properties": {}}}'
)
CALL = '<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": "Köln"}}<|action_end|>'


def small_spec(family: str, model: Path) -> tuple[TokenizerSpec, Path]:
    """Train a tokenizer whose chat tokens lie on its own unused pieces."""
    spec: TokenizerSpec = SPECS[family]
    train_tokenizer(model, 400, user_defined_symbols=[token.piece for token in spec.chat_tokens])
    tokens = tuple(replace(token, id=3 + offset) for offset, token in enumerate(spec.chat_tokens))
    return replace(spec, chat_tokens=tokens), model


def small_tokenizer(family: str, folder: Path) -> Any:
    spec, model = small_spec(family, folder / "trained.model")
    assert Tokenizer.read(model).files(spec, chat=True).write(folder) == ()
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module", params=SPECS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(family: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_tokenizer(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """InternLM2's, the family that has a format for tools."""
    return small_tokenizer("internlm2", tmp_path_factory.mktemp("tools"))


def render(tokenizer: Any, *messages: dict[str, Any], **kwargs: Any) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


# The mask


@pytest.mark.parametrize("answers", [["one"], ["two  and\n two", "", "天 😀"]])
def test_the_mask_covers_the_answers_and_their_ends(family: str, tokenizer: Any, answers: list[str]) -> None:
    messages = [{"role": "system", "content": "be brief"}]
    for answer in answers:
        messages += [user("why?"), assistant(answer)]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    kept = [index for index, written in zip(out["input_ids"], out["assistant_masks"], strict=True) if written]
    assert tokenizer.decode(kept) == "".join(answer + END[family] for answer in answers)
    assert tokenizer.decode(out["input_ids"]) == render(tokenizer, *messages)


def test_no_mark_is_in_the_prompt(tokenizer: Any) -> None:
    out = tokenizer.apply_chat_template(
        [user("a"), assistant("b"), user("c")],
        add_generation_prompt=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    written = [index for index, marked in enumerate(out["assistant_masks"]) if marked]
    assert len(written) == 2
    assert "generation" not in tokenizer.decode(out["input_ids"])


def test_the_text_is_the_same_for_a_renderer_that_skips_the_markers(tokenizer: Any) -> None:
    plain = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert plain != tokenizer.chat_template
    messages = [user("a"), assistant("b\n"), user(" c")]
    rendered = jinja2.Environment().from_string(plain).render(messages=messages, bos_token="<s>")
    assert rendered == render(tokenizer, *messages)


# Content


def test_content_may_be_a_list_of_text_parts(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert render(tokenizer, user(parts), assistant(parts)) == render(tokenizer, user("one two"), assistant("one two"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([{"type": "image", "url": "a.png"}], "found the type image"),
        ([{"text": "a"}], "The parts of a content are text"),
        (None, "found neither in a message of the role user"),
        ({"text": "a"}, "found neither in a message of the role user"),
        (3, "found neither in a message of the role user"),
    ],
)
def test_other_content_is_refused(tokenizer: Any, content: Any, found: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=found):
        render(tokenizer, user(content))


def test_a_message_without_content_is_refused(tokenizer: Any) -> None:
    for message in ({"role": "user"}, {"role": "assistant"}, assistant(None)):
        with pytest.raises(jinja2.TemplateError, match="found neither in a message of the role"):
            render(tokenizer, message)


@pytest.mark.parametrize("role", ["human", "User", "", "developer"])
def test_other_roles_are_refused(tokenizer: Any, role: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=f"The roles are system, user.* assistant.*; found {role}"):
        render(tokenizer, user("a"), {"role": role, "content": "b"})


# Tools


@pytest.mark.parametrize("tool", [TOOL, {"type": "function", "function": TOOL}])
def test_tools_come_after_the_system_message(with_tools: Any, tool: dict[str, Any]) -> None:
    listed = f"<|im_start|>system name=<|plugin|>\n[{TOOL_TEXT}]<|im_end|>\n"
    system, question = "<|im_start|>system\nS<|im_end|>\n", "<|im_start|>user\nQ<|im_end|>\n"
    answer = "<|im_start|>assistant\n"
    settings: dict[str, Any] = {"tools": [tool], "add_generation_prompt": True}
    assert render(with_tools, user("Q"), **settings) == f"<s>{listed}{question}{answer}"
    found = render(with_tools, {"role": "system", "content": "S"}, user("Q"), **settings)
    assert found == f"<s>{system}{listed}{question}{answer}"
    two = render(with_tools, user("Q"), tools=[tool, tool])
    assert f"\n[{TOOL_TEXT}, {TOOL_TEXT}]<|im_end|>\n" in two


def test_a_python_function_is_a_tool(with_tools: Any) -> None:
    def add(first: int) -> int:
        """Add one.

        Args:
            first: the number
        """
        return first + 1

    assert '\n[{"name": "add", "description": "Add one.", "parameters": {' in render(with_tools, user("Q"), tools=[add])


@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'])
@pytest.mark.parametrize("content", [None, "Let me look."])
def test_calls_and_what_they_gave(with_tools: Any, content: str | None, arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        user("Q"),
        assistant(content, tool_calls=[call, call]),
        {"role": "tool", "name": "weather", "tool_call_id": "1", "content": "22"},
        assistant("Warm."),
    ]
    expected = (
        f"<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{content or ''}{CALL}{CALL}<|im_end|>\n"
        "<|im_start|>environment name=<|plugin|>\n22<|im_end|>\n<|im_start|>assistant\nWarm.<|im_end|>\n"
    )
    assert render(with_tools, *messages) == expected
    out = with_tools.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    kept = [index for index, written in zip(out["input_ids"], out["assistant_masks"], strict=True) if written]
    assert with_tools.decode(kept) == f"{content or ''}{CALL}{CALL}<|im_end|>Warm.<|im_end|>"


def test_a_call_without_its_wrapper_is_the_same(with_tools: Any) -> None:
    call = {"name": "weather", "arguments": {"city": "Köln"}}
    assert render(with_tools, assistant("", tool_calls=[call])).endswith(f"assistant\n{CALL}<|im_end|>\n")


def test_the_environment_names_what_ran(with_tools: Any) -> None:
    shown = render(with_tools, {"role": "environment", "name": "interpreter", "content": "3"})
    assert shown == "<s><|im_start|>environment name=<|interpreter|>\n3<|im_end|>\n"
    shown = render(with_tools, {"role": "system", "name": "interpreter", "content": "3"})
    assert shown == "<s><|im_start|>system name=<|interpreter|>\n3<|im_end|>\n"
    shown = render(with_tools, {"role": "user", "name": "plugin", "content": "3"})
    assert shown == "<s><|im_start|>user\n3<|im_end|>\n"


def test_tools_are_refused_where_no_format_was_taught(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("internlm", tmp_path)
    with pytest.raises(jinja2.TemplateError, match="InternLM has no format for tools; InternLM2 has one"):
        render(tokenizer, user("Q"), tools=[TOOL])
    with pytest.raises(jinja2.TemplateError, match="InternLM has no format for tool calls"):
        render(tokenizer, assistant(None, tool_calls=[{"function": {"name": "f", "arguments": {}}}]))
    with pytest.raises(jinja2.TemplateError, match="found tool"):
        render(tokenizer, {"role": "tool", "content": "22"})
