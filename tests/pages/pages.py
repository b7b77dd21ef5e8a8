"""The pages of the project, and how the tests here read them.

README.md and docs/NAME.md are English; README-zh-Hans.md and docs/NAME-zh-Hans.md are the same pages in Chinese.
Pages that only somebody who changes the code reads are in English alone (ENGLISH_ONLY).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CHINESE_NAME = "-zh-Hans.md"
ENGLISH_ONLY = ("docs/transformers-api.md",)
SCRIPTS = ("convert2hf_internlm.py", "convert2hf_internlm2.py", "revert_internlm.py", "revert_internlm2.py")
HELD_AS = "huggingface_model"
"""The name of this folder in the repository that holds it."""

PAGES = (
    *sorted(REPOSITORY.glob("README*.md"), reverse=True),
    *sorted((REPOSITORY / "docs").glob("*.md")),
)
README, README_CHINESE = REPOSITORY / "README.md", REPOSITORY / "README-zh-Hans.md"


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def in_chinese(page: Path) -> Path:
    return page.with_name(page.name.removesuffix(".md") + CHINESE_NAME)


ENGLISH = tuple(page for page in PAGES if not page.name.endswith(CHINESE_NAME))
PAIRS = tuple((page, in_chinese(page)) for page in ENGLISH if name_of(page) not in ENGLISH_ONLY)
"""Each page that is in both languages: English, Chinese."""


@dataclass(frozen=True)
class Block:
    """A fenced block: the page it is on, its language, its text, and the line on which it starts."""

    page: Path
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, fence[1], fence[2], text[: fence.start()].count("\n") + 1) for fence in fences]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def section(page: Path, heading: str) -> str:
    """The prose from a heading to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", prose(page), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no heading {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The body rows of the tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [index for index, row in enumerate(cells) if set("".join(row)) <= set(":-| ")]
    return [row for index, row in enumerate(cells) if index not in rules and index + 1 not in rules]


def code(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", prose(page))


def anchors(page: Path) -> list[str]:
    """Anchors that the headings get: lower case, punctuation dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def target(page: Path, link: str) -> tuple[Path, str]:
    """The file and the anchor that an internal link of a page leads to."""
    name, _, anchor = link.partition("#")
    return (page.parent / name).resolve() if name else page, anchor


def commands(page: Path) -> list[str]:
    """The lines of the page's bash blocks, continued ones joined, comments dropped."""
    lines = (
        " ".join(re.sub(r"(^|\s)#.*", "", line).split())
        for block in blocks(page)
        if block.language == "bash"
        for line in block.text.replace("\\\n", "").splitlines()
    )
    return [line for line in lines if line]
