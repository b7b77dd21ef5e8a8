"""Links lead somewhere, every page is linked to, and the drawings of the folder and of its parts name what is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.pages.pages import ENGLISH, PAGES, README, REPOSITORY, anchors, blocks, links, name_of, target

RESULTS = [page for folder in ("benchmarks", "tests") for page in (REPOSITORY / folder).rglob("*.md")]
LINKING = sorted({*PAGES, *REPOSITORY.glob("*.md"), *RESULTS})


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if not link.startswith("https://"):
            file, anchor = target(page, link)
            assert file.is_file(), link
            assert not anchor or anchor in anchors(file), link


def test_every_page_is_linked_to() -> None:
    """Each page is found from README.md, over links."""
    reached, left = {README}, [README]
    while left:
        page = left.pop()
        for link in links(page):
            file, _ = target(page, link)
            if file in ENGLISH and file not in reached:
                reached.add(file)
                left.append(file)
    assert reached == set(ENGLISH)


@pytest.mark.parametrize("page", sorted(RESULTS), ids=name_of)
def test_results_lie_beside_what_made_them(page: Path) -> None:
    assert page.with_suffix(".py").is_file()


def test_the_tree_shows_the_folder() -> None:
    """The drawing in docs/contributing.md names everything that lies at the top."""
    (drawn,) = (block.text for block in blocks(REPOSITORY / "docs" / "contributing.md") if block.language == "text")
    shown = {line.split()[1].rstrip("/") for line in drawn.splitlines() if line.startswith(("├", "└"))}
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs the repository's own list of files")
    present = {path.split("/")[0] for path in listed.stdout.split() if "/" in path or path.endswith(".py")}
    assert shown == {name for name in present if not name.startswith(".")}


def test_the_overview_names_every_module() -> None:
    """weight_conversion/__init__.py draws the rooms; what is not in it is found by nobody."""
    package = REPOSITORY / "weight_conversion"
    drawn = set(re.findall(r"\w+", (package / "__init__.py").read_text(encoding="utf-8")))
    modules = {path.stem for path in package.rglob("*.py")} - {"__init__"}
    assert modules <= drawn
