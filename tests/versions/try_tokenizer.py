"""Load tokenizer folders in every way that this transformers version has, and print what was right as JSON.

Started by tokenizer_versions.py with PYTHONPATH set to one version's environment.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

Load = Callable[[Path], Any]

CHECKS = ("ids", "text", "saved", "moved", "offsets", "template", "mask")
WAYS: dict[str, Load] = {
    "AutoTokenizer, trust_remote_code": lambda folder: AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    "AutoTokenizer": lambda folder: AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    "PreTrainedTokenizerFast": PreTrainedTokenizerFast.from_pretrained,
}


def outcomes(folder: Path, load: Load) -> dict[str, str]:
    """Return a word per check; "NO ..." where a tokenizer was loaded and is wrong."""
    try:
        tokenizer = load(folder)
    except ValueError as error:
        asked = next((name for name in ("trust_remote_code", "tiktoken") if name in str(error)), None)
        if asked is None:
            raise
        return {"class": f"asks for {asked}"} | dict.fromkeys(CHECKS, "-")
    cases = json.loads((folder / "cases.json").read_text())
    with tempfile.TemporaryDirectory() as root:
        saved, moved = Path(root) / "saved", Path(root) / "moved.folder"
        tokenizer.save_pretrained(saved)
        shutil.copyfile(folder / "config.json", saved / "config.json")  # as the saved model would
        shutil.copytree(folder, moved)
        return {
            "class": type(tokenizer).__name__,
            "ids": wrong_ids(tokenizer, cases),
            "text": wrong_texts(tokenizer, cases),
            "saved": all_right(load, saved, cases),
            "moved": all_right(load, moved, cases),
            "offsets": wrong_offsets(tokenizer, cases),
            "template": wrong_template(tokenizer, folder / "prompt.json"),
            "mask": wrong_mask(tokenizer, folder / "prompt.json"),
        }


def wrong_ids(tokenizer: Any, cases: list[tuple[str, list[int], str]]) -> str:
    wrong = sum(tokenizer(text)["input_ids"] != ids for text, ids, _ in cases)
    return f"NO, {wrong} of {len(cases)} differ" if wrong else "yes"


def wrong_texts(tokenizer: Any, cases: list[tuple[str, list[int], str]]) -> str:
    wrong = sum(tokenizer.decode(ids, skip_special_tokens=True) != decoded for _, ids, decoded in cases)
    return f"NO, {wrong} of {len(cases)} differ" if wrong else "yes"


def wrong_template(tokenizer: Any, prompt: Path) -> str:
    if not prompt.exists():
        return "-"
    conversation = json.loads(prompt.read_text())
    text = tokenizer.apply_chat_template(conversation["messages"], add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(conversation["messages"], add_generation_prompt=True, return_dict=False)
    same = ids == conversation["ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    return "yes" if same else "NO"


def wrong_offsets(tokenizer: Any, cases: list[tuple[str, list[int], str]]) -> str:
    try:
        wrong = sum(not covered(tokenizer, text) for text, _, _ in cases)
    except NotImplementedError:
        return "refused"
    return f"{wrong} of {len(cases)} not covered" if wrong else "yes"


def covered(tokenizer: Any, text: str) -> bool:
    """Whether the offsets span every character, and every character leads to a token that spans it."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    spans = encoding["offset_mapping"]
    found = [encoding.char_to_token(at) for at in range(len(text))]
    return all(token is not None and spans[token][0] <= at < spans[token][1] for at, token in enumerate(found))


def wrong_mask(tokenizer: Any, prompt: Path) -> str:
    if not prompt.exists():
        return "-"
    conversation = json.loads(prompt.read_text())
    settings = {"return_dict": True, "return_assistant_tokens_mask": True, "add_generation_prompt": True}
    try:
        out = tokenizer.apply_chat_template(conversation["messages"], **settings)
    except NotImplementedError:
        return "refused"
    kept = [index for index, marked in zip(out["input_ids"], out["assistant_masks"], strict=True) if marked]
    return "yes" if kept == conversation["answers"] else "NO"


def all_right(load: Load, folder: Path, cases: list[tuple[str, list[int], str]]) -> str:
    try:
        tokenizer = load(folder)
    except (ValueError, OSError) as error:
        return f"NO: {type(error).__name__}"
    found = {wrong_ids(tokenizer, cases), wrong_texts(tokenizer, cases)}
    return "yes" if found == {"yes"} else max(found - {"yes"})


def as_published(folder: Path, root: Path) -> Path:
    """A copy without tokenizer.json."""
    copied = Path(shutil.copytree(folder, root / folder.name))
    (copied / "tokenizer.json").unlink()
    return copied


def main(folders: list[Path]) -> None:
    found = [{"folder": folder.name, "way": way, **outcomes(folder, WAYS[way])} for way in WAYS for folder in folders]
    with tempfile.TemporaryDirectory() as root:
        for folder in folders:
            result = outcomes(as_published(folder, Path(root)), WAYS["AutoTokenizer, trust_remote_code"])
            found.append({"folder": folder.name, "way": "AutoTokenizer, trust_remote_code, published", **result})
    print(json.dumps(found))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
