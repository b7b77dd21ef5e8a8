"""The two model packages differ where the models do, and nowhere else: a mend in one is not forgotten in the other."""

from __future__ import annotations

from collections import Counter

from tests.models.twins import alike, definitions, differences, hunks, listed

WHAT_TO_DO = (
    "Make the same change in the other package. If it is a difference between the two models: "
    "python tests/models/twins.py"
)


def test_the_packages_differ_where_the_models_do() -> None:
    found, allowed = Counter(differences()), Counter(listed())
    unexpected = "\n\n".join((found - allowed).elements())
    gone = "\n\n".join((allowed - found).elements())
    assert not unexpected, f"internlm_model (-) and internlm2_model (+) differ in\n\n{unexpected}\n\n{WHAT_TO_DO}"
    assert not gone, f"no longer a difference:\n\n{gone}\n\n{WHAT_TO_DO}"


def test_a_changed_line_is_found_and_named() -> None:
    before = "LIMIT = 1\n\n\nclass A:\n    size = 2\n\n    # why\n    def get(self):\n        return self.size\n"
    after = before.replace("return self.size", "return self.size + 1")
    first, second = definitions(before), definitions(after)
    assert list(first) == ["", "A", "A.get"]
    assert [name for name in first if first[name] != second[name]] == ["A.get"]
    assert hunks(first["A.get"], second["A.get"]) == ["-         return self.size\n+         return self.size + 1"]


def test_every_line_belongs_to_something() -> None:
    text = (
        "import os\n\nX = 1  # one\n\n@deco\ndef f():\n    pass\n\n\nclass B(A):\n    '''doc'''\n\n    x: int\n# end\n"
    )
    lines = [line for part in definitions(text).values() for line in part]
    assert sorted(lines) == sorted(line for line in text.splitlines() if line.strip())


def test_names_are_made_alike_and_parts_of_words_are_not() -> None:
    assert (
        alike("InternLM2ForCausalLM internlm2_model self.lm_head") == "InternLMForCausalLM internlm_model self.output"
    )
    assert alike("down_projected") == "down_projected"
