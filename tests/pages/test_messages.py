"""The messages that docs/troubleshooting.md explains are those of the code."""

from __future__ import annotations

import ast

from tests.pages.pages import REPOSITORY, code, rows, section

TROUBLESHOOTING = REPOSITORY / "docs" / "troubleshooting.md"
FROM_LIBRARIES = ("contains custom code which must be executed", "FlashAttention2 has been toggled on")
"""Messages that transformers has."""


def messages_of_code() -> list[str]:
    """Every string of the code as a message would show it, with … for what is filled in."""
    found = []
    for package in ("weight_conversion", "internlm_model", "internlm2_model"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_the_messages_of_the_pages_are_those_of_the_code() -> None:
    known = messages_of_code()
    tables = [section(TROUBLESHOOTING, f"Messages of the {what}") for what in ("scripts", "models and tokenizers")]
    messages = [code(message)[0] for table in tables for message, _ in rows(table)]
    assert len(messages) > 30
    unknown = [message for message in messages if not any(message in text for text in known)]
    assert [message for message in unknown if not message.startswith(FROM_LIBRARIES)] == []
