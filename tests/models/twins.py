"""Where the two model packages differ, definition by definition, their names made alike.

The packages repeat each other, because each stands alone beside its weights. What may differ is in twins.txt; a mend in
one of them that the other lacks is not. `python tests/models/twins.py` writes that file anew.
"""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = ("configuration", "modeling", "compat", "chat", "tokenization", "tokenization_fast")
LIST = Path(__file__).with_name("twins.txt")
HEADER = """\
What differs between internlm_model (-) and internlm2_model (+), their names made alike: `python tests/models/twins.py`
wrote this. A mend in one package belongs in the other; what is here is a difference between the two models.
"""

ALIKE = {  # InternLM's word for what InternLM2 calls otherwise
    "InternLM2": "InternLM",
    "internlm2": "internlm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn": "attention",
    "o_proj": "wo",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def module_of(family: str, module: str) -> Path:
    name, _, fast = module.partition("_")
    return REPOSITORY / f"{family}_model" / f"{name}_{family}{'_' + fast if fast else ''}.py"


def definitions(text: str) -> dict[str, list[str]]:
    """The lines of a module by what they define; what stands outside of definitions goes by the name of the class, or
    of nothing. A comment goes with what it stands before.
    """
    lines, found = text.splitlines(), dict[str, list[str]]()
    start = 0

    def take(name: str, end: int) -> None:
        nonlocal start
        found.setdefault(name, []).extend(line for line in lines[start:end] if line.strip())
        start = end

    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                name = f"{node.name}.{member.name}" if isinstance(member, ast.FunctionDef) else node.name
                take(name, member.end_lineno or 0)
        else:
            take(node.name if isinstance(node, ast.FunctionDef) else "", node.end_lineno or 0)
    take("", len(lines))
    return found


def alike(text: str) -> str:
    words = "|".join(sorted(ALIKE, key=len, reverse=True))
    return re.sub(rf"(?<![A-Za-z])({words})(?![a-z])", lambda word: ALIKE[word[0]], text)


def differences() -> list[str]:
    """One paragraph for each run of lines that differs: module and definition, then the lines of each package."""
    found = []
    for module in MODULES:
        first, second = (
            definitions(alike(module_of(family, module).read_text(encoding="utf-8")))
            for family in ("internlm", "internlm2")
        )
        for name in dict.fromkeys((*first, *second)):
            where = f"{module}: {name or 'outside of definitions'}"
            if name not in second:
                found.append(f"{where}\n- only in internlm_model")
            elif name not in first:
                found.append(f"{where}\n+ only in internlm2_model")
            else:
                found += [f"{where}\n{hunk}" for hunk in hunks(first[name], second[name])]
    return found


def hunks(first: list[str], second: list[str]) -> list[str]:
    changes = difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes()
    return [
        "\n".join([*(f"- {line}" for line in first[a:b]), *(f"+ {line}" for line in second[c:d])])
        for kind, a, b, c, d in changes
        if kind != "equal"
    ]


def listed() -> list[str]:
    """The differences that twins.txt allows."""
    return LIST.read_text(encoding="utf-8").removeprefix(HEADER).strip().split("\n\n")


if __name__ == "__main__":
    LIST.write_text("\n\n".join([HEADER.strip(), *differences()]) + "\n", encoding="utf-8")
