"""What the tokenizer files say about each family."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .chat_templates import INTERNLM2_CHAT_TEMPLATE, INTERNLM_CHAT_TEMPLATE


@dataclass(frozen=True)
class ChatToken:
    """A special token of a chat model, on the id of a piece that pretraining left unused."""

    content: str
    id: int
    piece: str


@dataclass(frozen=True)
class TokenizerSpec:
    """What the tokenizer files say about one family."""

    class_name: str
    module: str | None
    """The module beside the weights that has the class; None where transformers has it."""
    chat_tokens: tuple[ChatToken, ...]
    end_of_turn: str
    chat_template: str

    def eos_token_ids(self, chat: bool) -> int | list[int]:
        """Return `eos_token_id` of generation_config.json: `</s>`, and with chat the end of a turn as well."""
        ends = [token.id for token in self.chat_tokens if token.content == self.end_of_turn]
        return [2, *ends] if chat else 2

    def without_code(self) -> TokenizerSpec:
        """The same tokenizer as a class of transformers, which reads tokenizer.json."""
        return replace(self, class_name="PreTrainedTokenizerFast", module=None)


INTERNLM_TOKENIZER = TokenizerSpec(
    class_name="InternLMTokenizer",
    module="tokenization_internlm",
    chat_tokens=(ChatToken("<eoh>", 103027, "<eoh>"), ChatToken("<eoa>", 103028, "<eoa>")),
    end_of_turn="<eoa>",
    chat_template=INTERNLM_CHAT_TEMPLATE,
)

INTERNLM2_TOKENIZER = TokenizerSpec(
    class_name="InternLM2Tokenizer",
    module="tokenization_internlm2",
    chat_tokens=tuple(
        ChatToken(f"<|{name}|>", 92538 + offset, f"[UNUSED_TOKEN_{141 + offset}]")
        for offset, name in enumerate(
            ("plugin", "interpreter", "action_end", "action_start", "im_end", "im_start"),
        )
    ),
    end_of_turn="<|im_end|>",
    chat_template=INTERNLM2_CHAT_TEMPLATE,
)
