"""A page and its translation say the same: blocks, headings, tables, lists, links, and what stands in them as code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.pages.pages import (
    ENGLISH_ONLY,
    PAGES,
    PAIRS,
    README,
    README_CHINESE,
    REPOSITORY,
    Block,
    anchors,
    blocks,
    code,
    in_chinese,
    links,
    name_of,
    prose,
    target,
)
from tests.versions.page_table import WORDS, table_in_chinese, table_of

over_pairs = pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=[page.name for page, _ in PAIRS])


def test_every_page_is_in_both_languages() -> None:
    assert {name_of(page) for page in PAGES} == {name_of(page) for pair in PAIRS for page in pair} | set(ENGLISH_ONLY)
    assert not [name for name in ENGLISH_ONLY if in_chinese(REPOSITORY / name).exists()]


@pytest.mark.parametrize("page", [README, README_CHINESE], ids=lambda page: page.name)
def test_the_first_page_is_short(page: Path) -> None:
    """Somebody reads it in five minutes. What does not fit is for a page of docs/."""
    assert len(page.read_text(encoding="utf-8").splitlines()) < 300


@over_pairs
def test_both_languages_have_the_same_blocks(english: Path, chinese: Path) -> None:
    assert [comparable(block) for block in blocks(english)] == [comparable(block) for block in blocks(chinese)]


def comparable(block: Block) -> tuple[str, Any]:
    """What a translation must leave as it is: all but comments, the words of a drawing, and labels of a diagram."""
    if block.language == "text":
        return "text", re.findall(r"[\w/*-]*[._]\w[\w./*-]*", block.text)
    if block.language == "mermaid":
        return "mermaid", re.sub(r'"[^"]*"', '""', block.text)
    return block.language, [re.sub(r"(^|\s+)#.*", "", line) for line in block.text.splitlines()]


@over_pairs
def test_both_languages_have_the_same_structure(english: Path, chinese: Path) -> None:
    """Headings, table sizes, lists and what stands in them as code: names, flags, defaults, messages."""
    assert outline(english) == outline(chinese)


def outline(page: Path) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for line in prose(page).splitlines():
        if heading := re.match(r"(#+) ", line):
            found.append(("heading", len(heading[1])))
        elif line.startswith("|"):
            found.append(("row", [sorted(set(code(cell))) for cell in line.strip("|").split("|")]))
        elif item := re.match(r"(\d+\.|-) ", line):
            found.append(("item", item[1]))
    return found


@over_pairs
def test_both_languages_link_to_the_same_places_and_to_each_other(english: Path, chinese: Path) -> None:
    """A link to a page leads to it in the language of the page that it stands on, and to the same heading."""
    first, *others = links(english)
    first_chinese, *others_chinese = links(chinese)
    assert target(english, first) == (chinese, "")
    assert target(chinese, first_chinese) == (english, "")
    assert [place(chinese, link) for link in others_chinese] == [translated(english, link) for link in others]


def place(page: Path, link: str) -> tuple[Any, int | None]:
    """Where a link leads: an address or a file, and which heading of it."""
    if link.startswith("https://"):
        return link, None
    file, anchor = target(page, link)
    return file, anchors(file).index(anchor) if anchor else None


def translated(page: Path, link: str) -> tuple[Any, int | None]:
    """Where the translation of a page must link to."""
    found, heading = place(page, link)
    return dict(PAIRS).get(found, found), heading


def test_the_table_of_versions_is_translated() -> None:
    english, chinese = (
        table_of((REPOSITORY / "docs" / page).read_text(encoding="utf-8"))
        for page in ("versions.md", "versions-zh-Hans.md")
    )
    assert chinese == table_in_chinese(english)
    unused = [word for word in WORDS if word not in english]
    assert not unused, unused
