"""Try the real tokenizers' files on several transformers versions, and write the result as a Markdown table.

    make tokenizer-versions    # writes tests/versions/tokenizer_versions.md

Needs the real tokenizer models and the recorded cases beside the repository (../shared). Each version runs in its own
environment. Exit status 1 if a tokenizer was loaded and is wrong. That a version asks for trust_remote_code is right.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from environments import environment_variables

from tests.support.real_tokenizers import SHARED
from weight_conversion.folders.hf_folder import code_files, copy_code
from weight_conversion.mapping.families import FAMILIES
from weight_conversion.tokenizer.sentencepiece_model import SentencePieceModel
from weight_conversion.tokenizer.specs import TokenizerSpec
from weight_conversion.tokenizer.tokenizer_files import Tokenizer
from weight_conversion.tokenizer.tokenizer_json import SlowTokenizer, SpecialTokens

HERE = Path(__file__).resolve().parent
REPORT = HERE / "tokenizer_versions.md"
VERSIONS = ("4.57.6", "5.0.0", "5.4.0", "5.8.0", "5.12.1", "5.17.0", "5.24.0")
CASES, PROMPT = "cases.json", "prompt.json"

INTRODUCTION = """# Tokenizers on transformers {versions}

Made by `make tokenizer-versions` from the real tokenizer models. Four folders as the converters write them: InternLM
and InternLM2, each without and with `--chat`. **ids**: those recorded from the published tokenizers, {cases} texts in
all. **text**: decoding them gives the text back, byte for byte. **saved**: ids and text are right after save_pretrained
and loading again. **moved**: they are right after the folder was moved. **offsets**: return_offsets_mapping and
char_to_token cover every character of every text. **template**: apply_chat_template gives the ids of the prompt that
`chat` builds. **mask**: return_assistant_tokens_mask marks the answers and the ends of their turns, nothing else. "yes"
holds for every folder that was loaded. "published" are copies of the folders without tokenizer.json, as those on the
Hub are, with this repository's modules beside them.

"""
REMARKS = """
"asks for trust_remote_code" is an error that says so; nothing wrong is loaded. TokenizersBackend is transformers 5's
own class over tokenizer.json, and its PreTrainedTokenizerFast is the same class. Versions 5.3 to 5.11 put it in the
place of InternLM2TokenizerFast, also with trust_remote_code=True. Texts that are not covered spell the name of a piece
that a chat token took the place of, as `[UNUSED_TOKEN_146]`: classes other than this repository's give the right id and
the last character of the name as its span. Without tokenizer.json, offsets and masks are refused by an error: the slow
tokenizer has none; and there versions 5.3 to 5.11 ask for tiktoken, to read InternLM2's tokenizer.model by themselves.
"""


def write_folder(folder: Path, family: Any, chat: bool) -> None:
    """Write what a converted model's folder holds beside its weights, and the cases to try on it."""
    folder.mkdir()
    copy_code(code_files(family.code, family.model_type), folder)
    warnings = Tokenizer.read(_model_file(family)).files(family.tokenizer, chat).write(folder)
    if warnings:
        raise RuntimeError(warnings[0])
    config = {
        "model_type": family.model_type,
        "architectures": [f"{family.name}ForCausalLM"],
        "auto_map": {"AutoConfig": f"configuration_{family.model_type}.{family.name}Config"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / CASES).write_text(json.dumps(list(_cases(family, chat))))
    if chat:
        (folder / PROMPT).write_text(json.dumps(_prompt(family)))


def _cases(family: Any, chat: bool) -> Iterable[tuple[str, list[int], str]]:
    """Yield (text, ids, what decoding without special tokens gives)."""
    recorded = _recorded(family.model_type)
    if chat and family.model_type == "internlm2":  # the chat tokens change these texts' ids
        recorded = [case for case in recorded if not re.search(r"<\||UNUSED", case["text"])]
        recorded += _recorded("internlm2_chat")
    for case in recorded:
        yield case["text"], case["ids"], _decoded(case["text"], family.tokenizer, chat)


def _prompt(family: Any) -> dict[str, Any]:
    """Return a conversation and the ids of the prompt that the model's chat method builds for it."""
    chat_module = import_module(f"{family.package}.chat_{family.model_type}")
    text = "<s>" + chat_module.prompt_text("再见!", [("Hello  there", "你好 😀\n")], "Be brief.")
    spec: TokenizerSpec = family.tokenizer
    names = {0: "<unk>", 1: "<s>", 2: "</s>"} | {token.id: token.content for token in spec.chat_tokens}
    slow = SlowTokenizer(SentencePieceModel.read(_model_file(family)), SpecialTokens(names, "<s>"))
    turns = [("system", "Be brief."), ("user", "Hello  there"), ("assistant", "你好 😀\n"), ("user", "再见!")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "ids": slow.encode(text), "answers": slow.encode("你好 😀\n" + spec.end_of_turn)}


def _model_file(family: Any) -> Path:
    return SHARED / "tokenizers" / f"tokenizer_{family.model_type}.model"


def _recorded(name: str) -> list[dict[str, Any]]:
    return json.loads((SHARED / "golden" / f"tokenizer_{name}.json").read_text(encoding="utf-8"))


def _decoded(text: str, spec: TokenizerSpec, chat: bool) -> str:
    skipped = ["<s>", "</s>"]
    for token in spec.chat_tokens if chat else ():
        skipped += [token.content, token.piece]
    return re.sub("|".join(map(re.escape, skipped)), "", text).replace("▁", " ")


def run(version: str, folders: list[Path]) -> list[dict[str, str]]:
    """Return what try_tokenizer.py found in one version: a dict per folder and way to load."""
    command = [sys.executable, "-W", "ignore", str(HERE / "try_tokenizer.py"), *map(str, folders)]
    finished = subprocess.run(
        command, env=environment_variables(version), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if finished.returncode:
        raise RuntimeError(f"transformers {version}:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> int:
    with tempfile.TemporaryDirectory() as root:
        folders = []
        for family in FAMILIES.values():
            for chat in (False, True):
                folders.append(Path(root) / (family.name + (" chat" if chat else "")))
                write_folder(folders[-1], family, chat)
        count = sum(len(json.loads((folder / CASES).read_text())) for folder in folders)
        found = {version: run(version, folders) for version in VERSIONS}
    table = "\n".join(_lines(found))
    introduction = INTRODUCTION.format(versions=f"{VERSIONS[0]} to {VERSIONS[-1]}", cases=count)
    REPORT.write_text(introduction + table + "\n" + REMARKS, encoding="utf-8")
    print(table)
    return int("NO" in table)


def _lines(found: dict[str, list[dict[str, str]]]) -> Iterable[str]:
    columns = ("class", "ids", "text", "saved", "moved", "offsets", "template", "mask")
    yield "| transformers | loaded with | " + " | ".join(columns) + " |"
    yield "| --- | --- " + "| --- " * len(columns) + "|"
    for version, results in found.items():
        for way in dict.fromkeys(result["way"] for result in results):
            rows = [result for result in results if result["way"] == way]
            cells = [_summary([(row["folder"], row[column]) for row in rows]) for column in columns]
            yield f"| {version} | {way} | " + " | ".join(cells) + " |"


def _summary(values: list[tuple[str, str]]) -> str:
    """One word if all folders that say something agree, else one per family if its two do, else one per folder."""
    values = [(folder, value) for folder, value in values if value != "-"] or [("", "-")]
    if len({value for _, value in values}) == 1:
        return values[0][1]
    families: dict[str, set[str]] = {}
    for folder, value in values:
        families.setdefault(folder.removesuffix(" chat"), set()).add(value)
    if all(len(each) == 1 for each in families.values()):
        return ", ".join(f"{name}: {value}" for name, (value,) in families.items())
    return ", ".join(f"{folder}: {value}" for folder, value in values)


if __name__ == "__main__":
    sys.exit(main())
