"""Random layouts come back exactly; random damage is told or harmless. The counts are small here, and large in
benchmarks/fault_campaign.py, whose last results stand in benchmarks/fault_campaign.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.faults.fault_harness import quick_folder, train_quick_tokenizer
from tests.faults.fuzzing import SOURCES, Subject, check_layout, payload, random_layout, structure, with_cut, with_flip
from tests.support.checkpoints import Shape, build

SHARED = Path(__file__).resolve().parents[3] / "shared" / "internevo_checkpoints"
FAMILIES = ("internlm", "internlm2")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_quick_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def subjects(tokenizer: Path) -> Iterator[dict[tuple[str, str], Subject]]:
    with quick_folder() as folder:
        yield {
            (family, kind): Subject(folder / f"{family}_{kind}", family, kind, tokenizer)
            for family in FAMILIES
            for kind in SOURCES
        }


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_layout_comes_back_exactly(tokenizer: Path, random: Random) -> None:
    layout = random_layout(random)
    note(str(layout))
    with quick_folder() as folder:
        check_layout(layout, folder, tokenizer)


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_cut_file_is_refused(
    kind: str, family: str, subjects: dict[tuple[str, str], Subject], random: Random
) -> None:
    subject = subjects[family, kind]
    path = random.choice(subject.weights + subject.settings)
    length = random.randrange(path.stat().st_size)
    note(f"{path.name} cut to {length} bytes")
    verdict = subject.check(path, with_cut(path, length))
    # the line break at the end of a JSON file may go
    assert verdict == "refused" or (path.suffix == ".json" and length == path.stat().st_size - 1)


@settings(max_examples=80, deadline=None)
@given(st.randoms(use_true_random=False))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_changed_byte_of_structure_is_told_or_harmless(
    kind: str, family: str, subjects: dict[tuple[str, str], Subject], random: Random
) -> None:
    subject = subjects[family, kind]
    path = random.choice(subject.weights + subject.settings)
    position, mask = random.choice(structure(path)), random.randrange(1, 256)
    note(f"{path.name} at {position} changed by {mask:#x}")
    subject.check(path, with_flip(path, position, mask))


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "safetensors"])
def test_a_changed_byte_of_a_tensor_is_told_by_its_checksum(
    kind: str, family: str, subjects: dict[tuple[str, str], Subject], random: Random
) -> None:
    subject = subjects[family, kind]
    path = random.choice([path for path in subject.weights if path.name != "model_config.pt"])
    position, mask = random.choice(payload(path)), random.randrange(1, 256)
    note(f"{path.name} at {position} changed by {mask:#x}")
    assert subject.check(path, with_flip(path, position, mask)) == "refused"


def test_a_changed_byte_of_a_safetensors_tensor_cannot_be_told(subjects: dict[tuple[str, str], Subject]) -> None:
    """The format has no checksums: the one damage that goes through, as docs/troubleshooting.md says."""
    subject = subjects["internlm2", "safetensors"]
    path = subject.weights[0]
    with pytest.raises(AssertionError, match="differ"):
        subject.check(path, with_flip(path, payload(path)[100], 1))


def test_settings_that_nothing_confirms_are_the_only_ones_to_change(subjects: dict[tuple[str, str], Subject]) -> None:
    """Changing a digit anywhere in config.json: weights never differ, and few settings can."""
    subject = subjects["internlm2", "safetensors"]
    (path,) = (path for path in subject.settings if path.name == "config.json")
    content, verdicts = path.read_bytes(), Counter()
    for position, byte in enumerate(content):
        if chr(byte).isdigit():
            verdicts[subject.check(path, with_flip(path, position, 1))] += 1
    assert verdicts["refused"] > 10
    assert verdicts["setting"] > 0


def test_a_changed_tokenizer_is_refused_or_written_as_it_is(tokenizer: Path) -> None:
    """A SentencePiece model has no checksum either; damage must not go further than its pieces."""
    with quick_folder() as folder:
        subject = Subject(folder / "subject", "internlm2", "shards", tokenizer)
        path, random = subject.tokenizer, Random(0)
        changes = [(random.randrange(path.stat().st_size), random.randrange(1, 256)) for _ in range(100)]
        verdicts = {subject.check(path, with_flip(path, *change)) for change in changes}
    assert verdicts == {"refused", "pieces"}


# ---------------------------------------------------------------------------------------- the builder of checkpoints


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("internlm2_tp1_pp2_split", {"pp": 2}),
        ("internlm2_tp2_pp1_vocab", {"tp": 2, "embedding": "vocabulary"}),
        ("internlm2_tp2_pp1_split_bias", {"tp": 2, "bias": True}),
        ("internlm2_tp2_pp1_split_adapt0", {"tp": 2, "interleaved": True}),
        ("internlm_tp1_pp1_split", {"bias": True}),
        ("internlm_tp2_pp1_vocab", {"tp": 2, "bias": True, "embedding": "vocabulary"}),
        ("internlm_tp2_pp1_split_legacymlp", {"tp": 2, "bias": True, "mlp_version": 1}),
        (
            "internlm_tp2_pp2_split_2023",
            {"tp": 2, "pp": 2, "bias": True, "mlp_version": 1, "prefix": "model.", "inv_freq": True},
        ),
    ],
)
def test_the_builder_writes_what_training_writes(name: str, choices: dict[str, object], tmp_path: Path) -> None:
    """Names, shapes, types and settings of real checkpoints."""
    if not SHARED.is_dir():
        pytest.skip("needs the training framework's own checkpoints beside the repository (../shared)")
    family = name.split("_")[0]
    kv_heads = {"internlm": 4, "internlm2": 2}[family]
    build(tmp_path, family, shape=Shape(64, 4, 4, kv_heads, 256, 320), **choices)
    real = sorted((SHARED / name).glob("model_tp*_pp*.pt"))
    assert [path.name for path in real] == sorted(path.name for path in tmp_path.glob("model_tp*_pp*.pt"))
    for path in real:
        ours, theirs = torch.load(tmp_path / path.name), torch.load(path)
        assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {
            key: (t.shape, t.dtype) for key, t in theirs.items()
        }
