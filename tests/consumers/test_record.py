"""What `make consumers` is made of, without the tools: the list, the protocol, the comparison, the page."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.consumers import consumers as table
from tests.consumers import environments
from tests.consumers.compare import compare
from tests.consumers.folders import CASES, Case
from tests.consumers.protocol import Questions
from tests.consumers.texts import MESSAGES, TEXTS

HERE = Path(__file__).resolve().parent

EXPECTED: dict[str, Any] = {
    "logits": np.arange(12.0).reshape(3, 4),
    "greedy": [[1, 2, 3], [4, 5, 6]],
    "tokens": [[1, 7], [1, 8]],
    "chat": {"text": "hello", "ids": [1, 9]},
    "ends": [2, 92542],
    "completion": "yes",
}


def same() -> dict[str, Any]:
    return {**EXPECTED, "chat": [1, 9]}


# ---------------------------------------------------------------------------------------------------------- the list


def test_the_list_names_programs_that_exist_pins_and_known_folders() -> None:
    for tool in environments.tools().values():
        if tool.read:
            continue
        assert (HERE / "tools" / tool.program).is_file()
        assert tool.ways
        assert all("==" in requirement for requirement in (*tool.requirements, *tool.then, *tool.sources))
        for limit in tool.limits:
            covered = [way for way in tool.ways if any(limit.covers(way.name, case) for case in way.cases())]
            assert len(covered) == len(limit.ways), f"{tool.name}: {limit.why}"


@pytest.mark.parametrize(
    "limit", ['ways = ["other"]', 'ways = ["one"]\nkinds = ["plian"]', 'ways = ["one"]\nfamilies = ["llama"]']
)
def test_a_limit_of_nothing_is_refused(limit: str, tmp_path: Path) -> None:
    listed = tmp_path / "tools.toml"
    listed.write_text(f'[a]\ntitle = "A"\n[a.ways.one]\n[[a.limits]]\nwhy = "x"\n{limit}\n')
    with pytest.raises(ValueError, match=r"tools\.toml, a: "):
        environments.tools(listed)


def test_there_are_fifty_different_texts() -> None:
    assert len(set(TEXTS)) == len(TEXTS) == 50


# ---------------------------------------------------------------------------------------------------- the comparison


def test_equal_answers_are_right() -> None:
    result = compare(same(), EXPECTED)
    assert result.wrong == ""
    assert result.agreed["greedy"] == "6/6"
    assert result.agreed["tokens"] == "2/2"
    assert compare({"chat": "hello"}, EXPECTED).wrong == ""


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("logits", EXPECTED["logits"] * 1.0001, "logits 1e-04"),
        ("logits", EXPECTED["logits"][:2], "of shape [2, 4], not [3, 4]"),
        ("logits", EXPECTED["logits"] * np.nan, "logits nan"),
        ("greedy", [[1, 2, 3], [4, 9, 6]], "greedy 4/6"),
        ("greedy", [[1, 2, 3], [4, 5]], "greedy 5/6"),
        ("greedy", [[1, 2, 3], [4, 5, 6, 7]], "greedy"),
        ("tokens", [[1, 7], [8]], "tokens 1/2"),
        ("chat", [1, 10], "chat is [1, 10]"),
        ("chat", "hallo", "chat is 'hallo'"),
        ("ends", [2], "ends is [2], not [2, 92542]"),
        ("completion", "no", "completion is 'no', not 'yes'"),
        ("error", "ValueError: what", "stops: ValueError: what"),
    ],
)
def test_every_difference_is_told(name: str, answer: Any, said: str) -> None:
    assert said in compare({**same(), name: answer}, EXPECTED).wrong


def test_a_small_difference_is_rounding() -> None:
    assert compare({"logits": EXPECTED["logits"] * (1 + 1e-5)}, EXPECTED).wrong == ""


def test_a_quantized_model_is_compared_with_what_the_tool_sets_beside_it() -> None:
    logits = EXPECTED["logits"]
    assert compare({"dequantized": np.stack([logits, logits * (1 + 1e-6)])}, EXPECTED).agreed == {
        "dequantized": "1e-06"
    }
    assert compare({"dequantized": np.stack([logits, logits + 1])}, EXPECTED).wrong.startswith("dequantized")


def test_silence_is_no_answer() -> None:
    with pytest.raises(ValueError, match="answered nothing"):
        compare({}, EXPECTED)


# ------------------------------------------------------------------------------------------------------ the protocol

PROGRAM = """
class Tool:
    def __init__(self, folder, way):
        if way == "broken":
            raise ValueError("no such folder")
        self.way = way
    def logits(self, ids):
        return [[float(token)] * 2 for token in ids]
    def tokens(self, text):
        return [len(text)]
    def chat(self, messages):
        return messages[0]["content"]
def open_folder(folder, way):
    return Tool(folder, way)
"""


def asked(tmp_path: Path, messages: Any, *ways: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The answers and the arrays of each way, from one process."""
    (tmp_path / "program.py").write_text(PROGRAM)
    files = []
    for number, way in enumerate(ways):
        files += [tmp_path / f"{number}.questions", tmp_path / f"{number}.answers"]
        files[-2].write_text(json.dumps(Questions("folder", way, [3, 4], [[3]], ["a", "bc"], messages).__dict__))
    command = [sys.executable, HERE / "protocol.py", tmp_path / "program.py", *files]
    subprocess.run(command, check=True, capture_output=True)
    answers = []
    for target in files[1::2]:
        with np.load(target.with_suffix(".npz")) as arrays:
            answers.append((json.loads(target.read_text()), {name: arrays[name].tolist() for name in arrays.files}))
    return answers


def test_a_program_is_asked_what_it_has_methods_for(tmp_path: Path) -> None:
    ((answers, arrays),) = asked(tmp_path, list(MESSAGES), "plain")
    assert answers == {"tokens": [[1], [2]], "chat": MESSAGES[0]["content"]}
    assert arrays == {"logits": [[3, 3], [4, 4]]}
    assert asked(tmp_path, None, "plain")[0][0] == {"tokens": [[1], [2]]}


def test_an_exception_is_an_answer_and_the_next_folder_is_asked_about(tmp_path: Path) -> None:
    broken, plain = asked(tmp_path, None, "broken", "plain")
    assert broken[0] == {"error": "ValueError: no such folder"}
    assert plain[0] == {"tokens": [[1], [2]]}


@pytest.mark.parametrize(("together", "processes"), [(False, 3), (True, 2)])
def test_folders_and_ways_of_one_environment_may_share_a_process(
    together: bool, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = tuple(
        environments.Way(name, environment=variables) for name, variables in (("a", {}), ("b", {}), ("c", {"X": "1"}))
    )
    calls: list[list[str]] = []

    def answered(_: Any, batch: Any, folders: Path) -> list[dict[str, Any]]:
        calls.append([way.name for way, _ in batch])
        return [{"way": way.name} for way, _ in batch]

    monkeypatch.setattr(table, "_ask", answered)
    pairs = [(way, CASES[0]) for way in ways]
    found = list(table._ask_all(replace(tool_with(), together=together), pairs, tmp_path))
    assert found == [(pair, {"way": pair[0].name}) for pair in pairs]
    assert len(calls) == processes


# ---------------------------------------------------------------------------------------------------------- the page


def tool_with(limits: tuple[environments.Limit, ...] = ()) -> environments.Tool:
    return environments.Tool("a", "A", ways=(environments.Way("one", kinds=("plain",)),), limits=limits)


def record_of(wrong: str, name: str = "internlm2-llama-plain") -> dict[str, Any]:
    cells = {f"one | {case.name}": {"agreed": {"logits": "1e-06"}, "wrong": ""} for case in CASES}
    cells[f"one | {name}"]["wrong"] = wrong
    return {
        "ours": "ours",
        "date": "2026-02-03",
        "transformers": "5.1.2",
        "megabytes": 100,
        "minutes": 1,
        "tried_minutes": 1,
        "cells": cells,
    }


def test_what_is_wrong_fails_unless_it_is_a_limit_and_a_limit_that_is_none_fails() -> None:
    case = Case("internlm2", "llama", "plain")
    limit = environments.Limit("it cannot", ("one",), (case.format,), (case.family,), (case.kind,))
    assert table._failures(tool_with(), record_of("")["cells"]) == []
    assert "greedy 1/2" in table._failures(tool_with(), record_of("greedy 1/2")["cells"])[0]
    assert table._failures(tool_with((limit,)), record_of("greedy 1/2")["cells"]) == []
    assert "Remove it" in table._failures(tool_with((limit,)), record_of("")["cells"])[0]


def test_a_wrong_cell_says_why() -> None:
    limit = environments.Limit("it cannot", ("one",), ("llama",), ("internlm2",), ("plain",))
    page = table.render({"a": tool_with((limit,))}, {"a": record_of("greedy 1/2")})
    assert "| one | InternLM2, llama | no [1] |" in page
    assert "[1] it cannot" in page
    assert "| one | InternLM, llama | logits 1e-06 |" in page
    unknown = table.render({"a": tool_with()}, {"a": record_of("greedy 1/2")})
    assert "[1] greedy 1/2" in unknown
    assert "not run here" not in page


def test_a_section_names_the_day_and_the_versions() -> None:
    tool = replace(tool_with(), requirements=("a==1.0",))
    (line,) = [line for line in table.render({"a": tool}, {"a": record_of("")}).splitlines() if "a==1.0" in line]
    assert line.startswith("a==1.0, which brought transformers==5.1.2; ours: ours. Tried on 2026-02-03.")
    pinned = replace(tool, requirements=("a==1.0", "transformers==5.1.2"))
    assert "which brought" not in table.render({"a": pinned}, {"a": record_of("")})


def test_a_note_stands_before_the_versions() -> None:
    tool = replace(tool_with(), requirements=("a==1.0",), note="Half of it is older.")
    page = table.render({"a": tool}, {"a": record_of("")})
    assert "Half of it is older." in page
    assert page.index("Half of it is older.") < page.index("a==1.0")


def test_what_is_installed_over_the_requirements_brings_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(environments, "_pip", lambda _, *arguments: asked.append(arguments))
    environments._install(replace(tool_with(), requirements=("a==1.0",), then=("b==2.0",)))
    assert asked == [("install", "--no-compile", "a==1.0"), ("install", "--no-compile", "--no-deps", "b==2.0")]


def test_the_version_in_an_environment_is_read_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    assert environments._version(tool_with(), "transformers") == ""
    (tmp_path / "a/lib/python3.11/site-packages/transformers-5.1.2.dist-info").mkdir(parents=True)
    assert environments._version(tool_with(), "transformers") == "5.1.2"


def test_tools_that_were_read_or_not_run_say_so() -> None:
    read = replace(tool_with(), read="it needs a GPU.")
    assert "Read, not run: it needs a GPU." in table.render({"a": read}, {})
    assert "Not run yet" in table.render({"a": tool_with()}, {})


def test_the_page_is_what_the_record_says() -> None:
    record = json.loads(table.RECORD.read_text(encoding="utf-8"))
    known = environments.tools()
    assert table.REPORT.read_text(encoding="utf-8") == table.render(known, record)
    for name, tried in record.items():
        assert table._failures(known[name], tried["cells"]) == []
