"""Bad input is refused with one sentence before anything is written; no fault leaves a folder that looks finished."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm2_model import InternLM2ForCausalLM
from tests.faults.fault_harness import (
    TINY,
    Child,
    Conditions,
    Outcome,
    assert_refused,
    contents,
    convert_words,
    count_operations,
    quick_folder,
    revert_words,
    run_child,
    run_script,
    snapshot,
    train_quick_tokenizer,
)
from tests.faults.fault_moments import (
    AS_BEFORE,
    COMMANDS,
    REFUSED,
    WEIGHTS,
    Place,
    expected_result,
    failing_at_operations,
    killed_before_operations,
    make_place,
    others_of,
    signalled_at_random,
    signalled_before_operations,
    signalled_while_hanging,
)
from tests.faults.fuzzing import KINDS
from tests.faults.hostile_pickles import HOSTILE, hostile_surroundings, in_dict, write_archive
from tests.support.checkpoints import Shape, build, save_model_config
from tests.support.conversions import save_as_bin, weights
from tests.support.tokenizer_fixture import NORMAL, append_pieces, train_tokenizer
from weight_conversion.files.copying import Copier, Move
from weight_conversion.files.dtypes import FLOAT32
from weight_conversion.files.views import StoredTensor
from weight_conversion.mapping import families
from weight_conversion.running import convert as convert_module
from weight_conversion.running import revert as revert_module

REPOSITORY = Path(__file__).resolve().parents[2]
FAMILIES = ("internlm", "internlm2")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Place of each family, to be copied."""
    tokenizer = train_quick_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    return {family: make_place(tmp_path_factory.mktemp(family), family, tokenizer).root for family in FAMILIES}


@contextmanager
def copied_place(bases: dict[str, Path], family: str) -> Iterator[Place]:
    with quick_folder() as folder:
        shutil.copytree(bases[family], folder / "work")
        yield Place(folder / "work", family)


@pytest.fixture
def place(bases: dict[str, Path]) -> Iterator[Place]:
    with copied_place(bases, "internlm2") as found:
        yield found


@pytest.fixture
def internlm(bases: dict[str, Path]) -> Iterator[Place]:
    with copied_place(bases, "internlm") as found:
        yield found


def refused(place: Place, command: tuple[str, list[str]], *words: str) -> None:
    """One sentence with these words, and not even the times of the folders have changed."""
    before = snapshot(place.root)
    assert_refused(run_script(*command), *words)
    assert snapshot(place.root) == before


def change_shard(place: Place, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    state = torch.load(place.source / name)
    change(state)
    torch.save(state, place.source / name)


def change_config(place: Place, **changes: Any) -> None:
    """Changes model_config.pt; a value `...` takes the key out."""
    path = place.source / "model_config.pt"
    config = {**CONFIGS[place.family], **changes}
    save_model_config(path, {key: value for key, value in config.items() if value is not ...})


CONFIGS = {
    family: {
        "num_layers": 2,
        "hidden_size": 16,
        "vocab_size": 128,
        "num_attention_heads": 4,
        "num_kv_attention_heads": TINY[family].kv_heads,
        "layer_norm_epsilon": 1e-5,
        "dtype": torch.float32,
    }
    for family in FAMILIES
}


# --------------------------------------------------------------------------------------- checkpoints that are not whole

Change = Callable[[Place], Any]
A, B, C, D = (f"model_tp{tp}_pp{pp}.pt" for tp in (0, 1) for pp in (0, 1))


def shard(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda place: change_shard(place, name, change)


def remove(*names: str) -> Change:
    return lambda place: [(place.source / name).unlink() for name in names]


def write(name: str, content: bytes) -> Change:
    return lambda place: (place.source / name).write_bytes(content)


def config(**changes: Any) -> Change:
    return lambda place: change_config(place, **changes)


def rename(state: dict[str, Any], old: str, new: str) -> None:
    for name in [name for name in state if name.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)


def link(name: str, to: str) -> Change:
    def change(place: Place) -> None:
        path = place.root / name
        path.rename(path.with_name("moved")) if path.is_dir() else path.unlink()
        path.symlink_to(to)

    return change


def a_folder(place: Place) -> None:
    (place.source / C).unlink()
    (place.source / C).mkdir()


def kind_of(folder: str, name: str, kind: str) -> Change:
    """Something that is no file under the name of one: opening it waits for ever, or reading it never ends."""

    def change(place: Place) -> None:
        path = place.root / folder / name
        path.unlink(missing_ok=True)
        KINDS[kind](path)

    return change


def shards_of_four_ranks(place: Place) -> None:
    build(place.root / "four", "internlm2", shape=Shape(16, 2, 4, 4, 256, 128), tp=4, pp=2)
    for tp, pp in ((2, 0), (2, 1), (3, 0), (3, 1)):
        shutil.copy(place.root / "four" / f"model_tp{tp}_pp{pp}.pt", place.source)


def a_shard_of_one_rank(place: Place) -> None:
    build(place.root / "one", "internlm2", shape=TINY["internlm2"], pp=2)
    shutil.copy(place.root / "one" / A, place.source / C)


def biases(place: Place) -> None:
    build(place.source, "internlm2", shape=TINY["internlm2"], tp=2, pp=2, bias=True)


def a_bias_on_rank_one(place: Place) -> None:
    biases(place)
    change_shard(place, C, lambda state: state.update({"layers.0.attention.wo.bias": torch.zeros(16)}))


WQKV, NORM, W1 = "layers.0.attention.wqkv.weight", "layers.0.ffn_norm.weight", "layers.0.feed_forward.w1.weight"

BAD_CHECKPOINTS: dict[str, tuple[Change, list[str]]] = {
    **{
        f"a {kind} for {name}": (kind_of("source", name, kind), [name, f"a {kind}"])
        for name in (A, D)
        for kind in ("FIFO", "device", "socket")
    },
    "a FIFO for model_config.pt": (kind_of("source", "model_config.pt", "FIFO"), ["model_config.pt is missing"]),
    "a shard is missing": (remove(D), ["source", f"lacks {D}"]),
    "the first stage is missing": (remove(A, C), [f"lacks {A}, {C}"]),
    "the last stage is missing": (remove(B, D), ["model_config.pt", "num_layers = 2", "1 layers"]),
    "a rank is missing": (remove(C, D), [A, "tok_embeddings.weight", "[128, 8]", "[128, 16]"]),
    "all shards are missing": (remove(A, B, C, D), ["source", "no shard", "model_tp*_pp*.pt"]),
    "model_config.pt is missing": (remove("model_config.pt"), ["model_config.pt is missing"]),
    "the source is missing": (lambda place: shutil.rmtree(place.source), ["source is not a folder"]),
    "a shard of zero bytes": (write(B, b""), [B, "empty"]),
    "a shard that is text": (write(B, b"not found"), [B, "damaged"]),
    "model_config.pt of zero bytes": (write("model_config.pt", b""), ["model_config.pt", "empty"]),
    "a shard of the old format": (
        lambda place: torch.save({}, place.source / C, _use_new_zipfile_serialization=False),
        [C, "before torch 1.6"],
    ),
    "shards of 2 and of 4 ranks": (shards_of_four_ranks, ["tok_embeddings.weight", "[128, 4]", "on each of 4"]),
    "a shard of 1 rank among 2": (a_shard_of_one_rank, [C, "tok_embeddings.weight", "[128, 16]", "[128, 8]"]),
    "another type on one rank": (
        shard(C, lambda state: state.update({WQKV: state[WQKV].half()})),
        [C, WQKV, "torch.float16", A, "torch.float32"],
    ),
    "another shape on one rank": (
        shard(C, lambda state: state.update({W1: state[W1][:-1].clone()})),
        [C, W1, "[127, 16]", "[128, 16]"],
    ),
    "another shape on the first rank": (
        shard(A, lambda state: state.update({"tok_embeddings.weight": torch.zeros(99, 8)})),
        ["model_config.pt", "vocab_size = 128", A, "'tok_embeddings.weight'", "[99, 8]"],
    ),
    "another number of dimensions": (
        shard(D, lambda state: state.update({NORM: torch.zeros(1, 16)})),
        [D, NORM, "[1, 16]", "[16]"],
    ),
    "a scalar": (shard(D, lambda state: state.update({NORM: torch.tensor(1.0)})), [D, NORM, "[]", "[16]"]),
    "replicated tensors that differ": (
        shard(D, lambda state: state["norm.weight"].view(torch.int32)[3].add_(1)),
        [D, "'norm.weight'", "differs", B],
    ),
    "an unknown tensor": (shard(D, lambda state: state.update({"extra": torch.zeros(1)})), [D, "'extra'"]),
    "an unknown tensor of a layer": (
        shard(D, lambda state: state.update({"layers.0.extra.weight": torch.zeros(1)})),
        [D, "'layers.0.extra.weight'"],
    ),
    "a tensor missing on one rank": (
        shard(D, lambda state: state.pop(WQKV)),
        ["source", "layers.1.attention.wqkv.weight", "model_tp1_pp*.pt", "each of 2"],
    ),
    "a tensor missing on all ranks": (
        lambda place: [change_shard(place, name, lambda state: state.pop(W1)) for name in (B, D)],
        ["source", "layers.1.feed_forward.w1.weight", "model_tp0_pp*.pt"],
    ),
    "the whole MLP missing": (
        lambda place: [
            change_shard(place, name, lambda state: [state.pop(W1.replace("1", x)) for x in "123"]) for name in (A, C)
        ],
        ["source", W1],
    ),
    "a bias missing": (
        lambda place: [biases(place), change_shard(place, C, lambda state: state.pop(WQKV.replace("weight", "bias")))],
        ["source", "layers.0.attention.wqkv.bias", "model_tp1_pp*.pt"],
    ),
    "a bias where only rank 0 has it": (a_bias_on_rank_one, [C, "layers.0.attention.wo.bias", "rank 1"]),
    "the embedding in two stages": (
        shard(B, lambda state: state.update({"tok_embeddings.weight": torch.zeros(128, 8)})),
        [B, A, "'tok_embeddings.weight'"],
    ),
    "a tensor with and without prefix": (
        shard(B, lambda state: state.update({"model.norm.weight": state["norm.weight"].clone()})),
        [B, "'model.norm.weight'", "'norm.weight'"],
    ),
    "a layer left out": (
        shard(B, lambda state: rename(state, "layers.0.", "layers.1.")),
        [B, "layer 1", "no layer 0"],
    ),
    "a layer far away": (
        shard(B, lambda state: rename(state, "layers.0.", "layers.999999.")),
        [B, "layer 999999", "no layer 0"],
    ),
    "a layer number of no end": (
        lambda place: [
            change_shard(place, name, lambda state: rename(state, "layers.0.", f"layers.{'9' * 5000}."))
            for name in (B, D)
        ],
        ["model_config.pt", "num_layers = 2"],
    ),
    "ranks with different layers": (
        shard(D, lambda state: state.update({"layers.1.ffn_norm.weight": torch.zeros(16)})),
        [D, "2 layers", "stage 1 has 1"],
    ),
    "a layer count that is not model_config's": (config(num_layers=3), ["model_config.pt", "num_layers = 3", "2"]),
    "a layer count of no end": (config(num_layers=10**5000), ["num_layers = a whole number of about 5001 digits"]),
    "a vocabulary of no end": (config(vocab_size=10**5000), ["vocab_size = a whole number of about 5001 digits"]),
    "another vocabulary in model_config": (config(vocab_size=129), ["vocab_size = 129", "128", A]),
    "another hidden size in model_config": (config(hidden_size=32), [A, "tok_embeddings.weight", "[128, 8]"]),
    "other heads in model_config": (config(num_attention_heads=2), [A, WQKV, "shape"]),
    "other key/value heads in model_config": (config(num_kv_attention_heads=4), [A, WQKV, "[16, 16]", "[24, 16]"]),
    "heads that do not divide": (config(num_attention_heads=3), ["model_config.pt", "3 heads"]),
    "key/value heads that ranks cannot share": (config(num_kv_attention_heads=1), [WQKV, "2", "key/value"]),
    "no heads": (config(num_attention_heads=...), ["model_config.pt", "num_attention_heads is None"]),
    "zero heads": (config(num_attention_heads=0), ["num_attention_heads is 0"]),
    "heads of no end": (config(num_attention_heads=10**5000), ["num_attention_heads"]),
    "a text for a size": (config(hidden_size="16"), ["hidden_size is '16'"]),
    "a tensor for a size": (config(hidden_size=torch.zeros(1)), ["model_config.pt", "hidden_size"]),
    "a text for epsilon": (config(layer_norm_epsilon="1e-5"), ["layer_norm_epsilon is '1e-5'"]),
    "no number for epsilon": (config(layer_norm_epsilon=float("nan")), ["layer_norm_epsilon is nan"]),
    "a negative rope base": (config(rope_base=-1), ["rope_base is -1"]),
    "a type for the rope base": (config(rope_base=torch.float32), ["rope_base is torch.float32"]),
    "settings that contradict": (config(adapt_hf=True, qk_interleaved=True), ["qk_interleaved", "adapt_hf"]),
    "model_config that is a list": (
        lambda place: torch.save([1], place.source / "model_config.pt"),
        ["model_config.pt", "a list", "expected a dict"],
    ),
    "model_config with keys that are no names": (
        lambda place: torch.save({1: 2}, place.source / "model_config.pt"),
        ["model_config.pt", "expected a dict"],
    ),
    "whole numbers for weights": (
        lambda place: [
            change_shard(place, name, lambda state: state.update({NORM: state[NORM].int()})) for name in (A, C)
        ],
        [A, NORM, "torch.int32", "floating-point"],
    ),
    "a tensor saved by columns": (
        shard(C, lambda state: state.update({W1: state[W1].T.contiguous().T})),
        [C, W1, "row by row"],
    ),
    "a shard that is a list": (lambda place: torch.save([], place.source / B), [B, "a list", "expected a dict"]),
    "a shard without tensors": (
        lambda place: torch.save({}, place.source / B),
        ["source", "layers.1.attention.wqkv.weight", "model_tp0_pp*.pt"],
    ),
    "a shard with other things": (shard(B, lambda state: state.update(step=5)), [B, "'step'", "expected only tensors"]),
    "a tensor name of two lines": (shard(B, lambda state: state.update({"a\nb": torch.zeros(1)})), [B, r"'a\nb'"]),
    "a tensor without a name": (shard(B, lambda state: state.update({"": torch.zeros(1)})), [B, "''"]),
    "a mixture of experts": (
        shard(B, lambda state: state.update({"layers.0.feed_forward.moe_layer.x": torch.zeros(1)})),
        ["source", "mixture of experts", "moe_layer"],
    ),
    "a file of isp": (write("model_tp0_wp0_pp0.pt", b""), ["two layouts", "model_tp*_wp*_pp*.pt"]),
    "a file of a universal checkpoint": (write("__0_0.distcp", b""), ["__0_0.distcp", "universal checkpoint"]),
    "a file of fsdp": (write("model_tp0_pp0_dp0.pt", b""), ["model_tp0_pp0_dp0.pt", "fsdp"]),
    "a file of experts": (write("model_moe_layer0_expert0_tp0.pt", b""), ["model_moe_layer0", "MoE"]),
    "a rank far away": (write("model_tp99999999999_pp99999999999.pt", b""), ["lacks model_tp2_pp0.pt"]),
    "a shard that links to itself": (link(f"source/{B}", B), [B, "symbolic links"]),
    "a shard that links to nowhere": (link(f"source/{B}", "nowhere"), [B, "No such file"]),
    "model_config that links to itself": (link("source/model_config.pt", "model_config.pt"), ["model_config.pt"]),
    "a source that links to itself": (link("source", "source"), ["source is not a folder"]),
    "a shard that is a folder": (a_folder, [C, "directory"]),
}


@pytest.mark.parametrize("fault", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(fault: str, place: Place) -> None:
    change, words = BAD_CHECKPOINTS[fault]
    change(place)
    refused(place, place.convert_command(), *words)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.6, 0.97, 0.999])
@pytest.mark.parametrize("name", [B, "model_config.pt"])
def test_a_cut_file_is_refused(name: str, part: float, place: Place) -> None:
    size = (place.source / name).stat().st_size
    os.truncate(place.source / name, int(size * part))
    refused(place, place.convert_command(), name, "truncated")


INTERNLM_WQKV, INTERNLM_W2 = "blocks.0.mixer.Wqkv.weight", "blocks.0.mlp.w2.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shard(A, lambda state: state.pop(INTERNLM_WQKV)), ["blocks.0.mixer.Wqkv.weight", "model_tp0_pp*.pt"]),
        (shard(B, lambda state: state.pop(INTERNLM_WQKV)), ["blocks.1.mixer.Wqkv.weight", "model_tp0_pp*.pt"]),
        (shard(C, lambda state: state.pop("blocks.0.mixer.Wqkv.bias")), ["Wqkv.bias", "model_tp1_pp*.pt"]),
        (shard(A, lambda state: state.pop("blocks.0.mixer.out_proj.bias")), ["out_proj.bias", "model_tp0_pp*.pt"]),
        (
            lambda place: [change_shard(place, name, lambda state: state.pop(INTERNLM_W2)) for name in (A, C)],
            ["source", "blocks.0.mlp.w1.weight or w2.weight"],
        ),
        (
            shard(B, lambda state: rename(state, "blocks.0.mlp.w2", "blocks.0.mlp.w4")),
            [B, "'blocks.0.mlp.w4.weight'"],
        ),
        (shard(C, lambda state: rename(state, "blocks.", "layers.")), ["source"]),
    ],
    ids=range(7),
)
def test_a_bad_internlm_checkpoint_is_refused(change: Change, words: list[str], internlm: Place) -> None:
    change(internlm)
    refused(internlm, internlm.convert_command(), *words)


@pytest.mark.parametrize("script", ["internlm", "internlm2"])
def test_a_checkpoint_of_the_other_family_is_refused(script: str, bases: dict[str, Path]) -> None:
    other = {"internlm": "internlm2", "internlm2": "internlm"}[script]
    with copied_place(bases, other) as place:
        refused(place, (f"convert2hf_{script}", place.convert_command()[1]), "source")
        refused(place, (f"revert_{script}", place.revert_command()[1]), "config.json", script, other)


# -------------------------------------------------------------------------------------------------------- tokenizers


def piece_of(message: bytes) -> bytes:
    """A model of <unk> and one more piece, whose protobuf message is given."""
    unknown = b"\x0a\x05<unk>\x15" + bytes(4) + b"\x18\x02"
    return b"".join(b"\x0a" + bytes([len(piece)]) + piece for piece in (unknown, message))


def tokenizer(content: bytes) -> Change:
    return lambda place: place.tokenizer.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda place: train_tokenizer(place.tokenizer, 320), ["320 pieces", "128"]),
        (tokenizer(b""), ["not a SentencePiece model"]),
        (tokenizer(b"some text"), ["not a SentencePiece model"]),
        (tokenizer(b'{"model": {}}'), ["not a SentencePiece model"]),
        (tokenizer(bytes(range(256)) * 8), ["not a SentencePiece model"]),
        (lambda place: os.truncate(place.tokenizer, place.tokenizer.stat().st_size // 2), ["tokenizer.model"]),
        (lambda place: place.tokenizer.write_bytes(piece_of(b"\x0a\x02\xff\xfe")), ["not a SentencePiece model"]),
        (lambda place: place.tokenizer.write_bytes(piece_of(b"\x08\x01")), ["not a SentencePiece model"]),
        (lambda place: place.tokenizer.write_bytes(piece_of(b"\x0a\x01a\x18\x63")), ["not a SentencePiece model"]),
        (lambda place: place.tokenizer.unlink(), ["does not exist"]),
        (lambda place: (place.tokenizer.unlink(), place.tokenizer.mkdir()), ["does not exist"]),
        (link("tokenizer.model", "tokenizer.model"), ["does not exist"]),
        (kind_of(".", "tokenizer.model", "FIFO"), ["a FIFO"]),
        (kind_of(".", "tokenizer.model", "device"), ["a device"]),
    ],
    ids=[
        *("too large", "empty", "text", "JSON", "bytes", "cut", "no UTF-8", "a number for a text", "no kind"),
        *("missing", "empty folder", "link to itself", "FIFO", "device"),
    ],
)
def test_a_bad_tokenizer_is_refused(change: Change, words: list[str], place: Place) -> None:
    change(place)
    refused(place, place.convert_command(), str(place.tokenizer), *words)


def test_chat_with_a_tokenizer_that_has_no_chat_tokens_is_refused(place: Place) -> None:
    refused(place, place.convert_command("--chat"), str(place.tokenizer), "--chat")


# ------------------------------------------------------------------------------ Hugging Face folders that are not whole

FIRST = "model-00001-of-00007.safetensors"
INDEX = "model.safetensors.index.json"


def shard_of(place: Place, tensor: str) -> Path:
    return place.hf / json.loads((place.hf / INDEX).read_text())["weight_map"][tensor]


def change_json(name: str, **changes: Any) -> Change:
    """Changes keys of a JSON file in the folder; a value `...` takes the key out."""

    def change(place: Place) -> None:
        path = place.hf / name
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def change_map(tensor: str, file: object) -> Change:
    def change(place: Place) -> None:
        path = place.hf / INDEX
        content = json.loads(path.read_text())
        content["weight_map"][tensor] = file
        path.write_text(json.dumps(content))

    return change


def hf_tensor(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Changes the file that holds a tensor, not the index."""

    def apply(place: Place) -> None:
        path = shard_of(place, name)
        state = load_file(path)
        change(state)
        save_file(state, path)

    return apply


def hf_bytes(change: Callable[[bytearray], Any]) -> Change:
    """Changes the bytes of the file that holds the embedding alone."""

    def apply(place: Place) -> None:
        path = shard_of(place, EMBEDDING)
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return apply


def hf_header(old: str, new: str) -> Change:
    """Changes the header of that file, which keeps its length."""
    assert len(old) == len(new)

    def change(content: bytearray) -> None:
        assert content.count(old.encode()) == 1
        content[:] = content.replace(old.encode(), new.encode())

    return hf_bytes(change)


def bin_file(content: object) -> Change:
    return lambda place: torch.save(content, place.hf / "pytorch_model.bin")


OUTPUT, EMBEDDING = "output.weight", "model.tok_embeddings.weight"
HF_WQKV = "model.layers.1.attention.wqkv.weight"

BAD_FOLDERS: dict[str, tuple[Change, list[str]]] = {
    "the folder is missing": (lambda place: shutil.rmtree(place.hf), ["hf is not a folder"]),
    "the folder links to itself": (link("hf", "hf"), ["hf is not a folder"]),
    "a FIFO for weights": (kind_of("hf", FIRST, "FIFO"), [FIRST, "missing"]),
    "a FIFO for a .bin": (kind_of("hf", "pytorch_model.bin", "FIFO"), ["pytorch_model.bin", "a FIFO"]),
    "a FIFO for the single file": (kind_of("hf", "model.safetensors", "FIFO"), ["model.safetensors", "a FIFO"]),
    "a device for the single file": (kind_of("hf", "model.safetensors", "device"), ["model.safetensors", "a device"]),
    "a FIFO for config.json": (kind_of("hf", "config.json", "FIFO"), ["config.json", "missing"]),
    "a FIFO for the index": (kind_of("hf", INDEX, "FIFO"), [INDEX, "missing"]),
    "a file that config.json names": (
        change_json("config.json", transformers_weights="x.safetensors"),
        ["config.json", "transformers_weights", "'x.safetensors'"],
    ),
    "an index whose files are gone": (
        lambda place: [path.unlink() for path in place.hf.glob("model-*")],
        [INDEX, "missing", "remove it"],
    ),
    "no weights": (lambda place: [path.unlink() for path in place.hf.glob("model*")], ["hf", "model.safetensors"]),
    "config.json is missing": (lambda place: (place.hf / "config.json").unlink(), ["config.json is missing"]),
    "config.json links to itself": (link("hf/config.json", "config.json"), ["config.json is missing"]),
    "config.json of zero bytes": (lambda place: (place.hf / "config.json").write_bytes(b""), ["is not JSON"]),
    "config.json that is a list": (lambda place: (place.hf / "config.json").write_text("[]"), ["list", "object"]),
    "config.json without end": (lambda place: (place.hf / "config.json").write_text("[" * 99999), ["is not JSON"]),
    "config.json in no encoding": (lambda place: (place.hf / "config.json").write_bytes(b'"\xff"'), ["is not JSON"]),
    "config.json of another model": (change_json("config.json", model_type="mistral"), ["'mistral'", "'internlm2'"]),
    "config.json without a type": (change_json("config.json", model_type=...), ["None", "'internlm2'"]),
    "a size that is text": (change_json("config.json", hidden_size="16"), ["hidden_size is '16'"]),
    "a size that is negative": (change_json("config.json", vocab_size=-1), ["vocab_size is -1"]),
    "a size that is true": (change_json("config.json", num_attention_heads=True), ["num_attention_heads is True"]),
    "a size of no end": (
        change_json("config.json", num_hidden_layers=10**4000),
        ["num_hidden_layers is a whole number of about 4001 digits"],
    ),
    "a size that is missing": (change_json("config.json", intermediate_size=...), ["intermediate_size is None"]),
    "no max_position_embeddings": (change_json("config.json", max_position_embeddings=...), ["max_position"]),
    "heads that do not divide": (change_json("config.json", num_attention_heads=3), ["config.json", "3 heads"]),
    "another vocabulary": (change_json("config.json", vocab_size=127), ["tok_embeddings", "[128, 16]", "[127, 16]"]),
    "more layers": (change_json("config.json", num_hidden_layers=3), ["hf lacks tensor", "model.layers.2."]),
    "fewer layers": (change_json("config.json", num_hidden_layers=1), ["model.layers.1."]),
    "other key/value heads": (change_json("config.json", num_key_value_heads=4), ["wqkv", "[32, 16]", "[48, 16]"]),
    "an epsilon that is text": (change_json("config.json", rms_norm_eps="x"), ["rms_norm_eps is 'x'"]),
    "an epsilon that is no number": (change_json("config.json", rms_norm_eps=float("nan")), ["rms_norm_eps is nan"]),
    "a base that is a list": (change_json("config.json", rope_theta=[1]), ["rope_theta is [1]"]),
    "a base that is negative": (change_json("config.json", rope_theta=-1), ["rope_theta is -1"]),
    "a base that contradicts": (change_json("config.json", rope_theta=5), ["contradict", "5", "10000"]),
    "scaling that is text": (change_json("config.json", rope_scaling="dynamic"), ["rope_scaling is 'dynamic'"]),
    "scaling that is a list": (change_json("config.json", rope_parameters=[1]), ["rope_parameters is [1]"]),
    "scaling that contradicts": (change_json("config.json", rope_scaling={"type": ["a"]}), ["contradict"]),
    "a factor that is text": (
        change_json("config.json", rope_parameters={"type": "dynamic", "factor": "2"}, rope_scaling=...),
        ["factor is '2'"],
    ),
    "factors that contradict": (
        change_json(
            "config.json",
            rope_parameters={"rope_type": "dynamic", "factor": 2},
            rope_scaling={"type": "dynamic", "factor": 3},
        ),
        ["contradict", "2", "3"],
    ),
    "the index names an absent file": (change_map(OUTPUT, "absent.safetensors"), ["absent.safetensors", INDEX]),
    "the index names another file": (change_map(OUTPUT, FIRST), [FIRST, OUTPUT, INDEX]),
    "the index names an absent tensor": (change_map("extra", FIRST), [FIRST, "'extra'", INDEX]),
    "the index leads outside": (change_map(OUTPUT, "../source/model_tp0_pp0.pt"), [INDEX, "plain file name"]),
    "the index leads outside, absolutely": (change_map(OUTPUT, "/etc/passwd"), [INDEX, "'/etc/passwd'"]),
    "the index leads outside, by dots": (change_map(OUTPUT, ".."), [INDEX, "'..'"]),
    "the index names nothing": (change_map(OUTPUT, ""), [INDEX, "''"]),
    "the index names the folder": (change_map(OUTPUT, "."), [INDEX, "'.'"]),
    "the index names a NUL": (change_map(OUTPUT, "a\0b"), [INDEX, "missing"]),
    "the index names half a character": (change_map(OUTPUT, "\ud800"), [INDEX, "missing"]),
    "the index names config.json": (change_map(OUTPUT, "config.json"), ["config.json", "safetensors"]),
    "the index names no text": (change_map(OUTPUT, 5), [INDEX, "weight_map"]),
    "the index has no map": (change_json(INDEX, weight_map=...), [INDEX, "weight_map"]),
    "the index has a list": (change_json(INDEX, weight_map=[]), [INDEX, "weight_map"]),
    "the index is no JSON": (lambda place: (place.hf / INDEX).write_text("{"), [INDEX, "is not JSON"]),
    "the index links to itself": (link(f"hf/{INDEX}", INDEX), [INDEX, "missing"]),
    "a file of the index links to itself": (link(f"hf/{FIRST}", FIRST), [FIRST, "missing"]),
    "a file of zero bytes": (lambda place: (place.hf / FIRST).write_bytes(b""), [FIRST, "0 bytes"]),
    "a file that is cut": (lambda place: os.truncate(place.hf / FIRST, 500), [FIRST, "truncated"]),
    "a file that is longer": (hf_bytes(lambda content: content.append(0)), ["truncated or damaged"]),
    "a file with a longer header": (hf_bytes(lambda content: content.__setitem__(7, 1)), ["header of"]),
    "a file with other JSON": (hf_bytes(lambda content: content.__setitem__(8, 91)), ["not JSON"]),
    "offsets that are too long": (hf_header('"data_offsets":[0,8192]', '"data_offsets":[0,9192]'), [EMBEDDING, "9192"]),
    "offsets that overlap the header": (hf_header("[0,8192]", "[-1,191]"), [EMBEDDING, "negative"]),
    "a tensor that is missing": (hf_tensor(HF_WQKV, lambda state: state.pop(HF_WQKV)), [HF_WQKV, INDEX]),
    "a tensor that is unknown": (
        hf_tensor(HF_WQKV, lambda state: state.update(extra=torch.zeros(1))),
        ["safetensors", "'extra'"],
    ),
    "a tensor in two files": (
        hf_tensor(HF_WQKV, lambda state: state.update({OUTPUT: torch.zeros(128, 16)})),
        [OUTPUT, "is in", "and in"],
    ),
    "another shape": (
        hf_tensor(HF_WQKV, lambda state: state.update({HF_WQKV: torch.zeros(31, 16)})),
        [HF_WQKV, "[31, 16]", "[32, 16]"],
    ),
    "whole numbers for weights": (
        hf_tensor(HF_WQKV, lambda state: state.update({HF_WQKV: torch.zeros(32, 16, dtype=torch.int32)})),
        [HF_WQKV, "torch.int32", "floating-point"],
    ),
    "a .bin that is a list": (bin_file([torch.zeros(1)]), ["pytorch_model.bin", "a list", "expected a dict"]),
    "a .bin that is an optimizer": (
        bin_file({"state": {0: {}}, "param_groups": []}),
        ["pytorch_model.bin", "'state'", "expected only tensors"],
    ),
    "a .bin with training arguments": (bin_file({"lr": 1e-4}), ["pytorch_model.bin", "'lr'"]),
    "a .bin that is a module": (bin_file(torch.nn.Linear(1, 1)), ["pytorch_model.bin", "torch.nn", "Nothing in it"]),
    "a .bin that is one tensor": (bin_file(torch.zeros(1)), ["pytorch_model.bin", "expected a dict"]),
    "a .bin of zero bytes": (lambda place: (place.hf / "pytorch_model.bin").touch(), ["pytorch_model.bin", "empty"]),
    "a .bin that links to itself": (
        lambda place: (place.hf / "pytorch_model-1.bin").symlink_to("pytorch_model-1.bin"),
        ["pytorch_model-1.bin", "symbolic links"],
    ),
    "a .bin among others that is none": (
        lambda place: (save_as_bin(place.hf), torch.save([1], place.hf / "pytorch_model-00003.bin")),
        ["pytorch_model-00003.bin", "a list", "expected a dict"],
    ),
    "a .bin that is cut": (
        lambda place: (save_as_bin(place.hf), os.truncate(place.hf / "pytorch_model-00002-of-00002.bin", 4000)),
        ["pytorch_model-00002-of-00002.bin", "truncated"],
    ),
    ".bin files of two saves": (
        lambda place: (
            save_as_bin(place.hf),
            (place.hf / "pytorch_model-00002-of-00002.bin").rename(place.hf / "pytorch_model-00002-of-00003.bin"),
        ),
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00003.bin", "several saves"],
    ),
    "a .bin that is missing": (
        lambda place: (save_as_bin(place.hf), (place.hf / "pytorch_model-00002-of-00002.bin").unlink()),
        ["hf lacks tensor"],
    ),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_bad_folder_is_refused(fault: str, place: Place) -> None:
    change, words = BAD_FOLDERS[fault]
    change(place)
    refused(place, place.revert_command(), *words)


def test_the_bad_folders_were_good_before(place: Place, internlm: Place) -> None:
    for each in (place, internlm):
        assert run_script(*each.revert_command("--verify", "--embed_split")).status == 0
        shutil.rmtree(each.target)
        save_as_bin(each.hf)
        assert run_script(*each.revert_command("--verify", "--embed_split")).status == 0
        bins = {path.name: torch.load(path) for path in each.target.glob("model_tp*")}
        for name, state in bins.items():
            pp0, pp1 = (torch.load(each.source / name.replace("pp0", f"pp{stage}")) for stage in (0, 1))
            assert torch.equal(state["norm.weight"], pp1["norm.weight"])
            first = next(iter(pp0))
            assert torch.equal(state[first], pp0[first])


def test_a_folder_saved_twice_is_read_as_transformers_reads_it(place: Place) -> None:
    """First in shards, then whole: transformers loads the single file, whatever the index says."""
    new = {name: tensor + 1 for name, tensor in weights(place.hf).items()}
    save_file(new, place.hf / "model.safetensors", metadata={"format": "pt"})
    torch.save({name: tensor + 2 for name, tensor in new.items()}, place.hf / "pytorch_model.bin")
    torch.save({}, place.hf / "pytorch_model-00001-of-00001.bin")
    model = InternLM2ForCausalLM.from_pretrained(place.hf, dtype="auto").state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in new.items())
    for flags, added in ((["--safetensors"], 0), ([], 2)):
        outcome = run_script(*place.revert_command(*flags))
        assert outcome.status == 0
        assert "also holds" in outcome.errors
        assert INDEX in outcome.errors or "more" in outcome.errors
        norm = torch.load(place.target / "model_tp0_pp0.pt")["norm.weight"]
        assert torch.equal(norm, new["model.norm.weight"] + added)
        shutil.rmtree(place.target)


def test_an_index_of_files_that_are_gone_does_not_hide_the_others(place: Place) -> None:
    """As after a conversion from .bin to safetensors that left the index."""
    (place.hf / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {OUTPUT: "pytorch_model-1.bin"}}))
    outcome = run_script(*place.revert_command())
    assert outcome.status == 0
    assert "also holds pytorch_model.bin.index.json, not read" in outcome.errors


@pytest.mark.parametrize("flags", [(), ("--embed_split",)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_vocabulary_that_does_not_divide_is_told_from_heads_and_sizes(
    family: str, flags: tuple[str, ...], bases: dict[str, Path]
) -> None:
    """As resize_token_embeddings leaves it, and what it can do about it."""
    with copied_place(bases, family) as place:
        for path in place.hf.glob("*.safetensors"):
            tensors = {
                name: torch.cat([tensor, tensor[:1]]) if tensor.shape[0] == 128 and tensor.shape[-1] == 16 else tensor
                for name, tensor in load_file(path).items()
                if "embed" in name or "output" in name or "lm_head" in name
            }
            save_file(load_file(path) | tensors, path)
        change_json("config.json", vocab_size=129)(place)
        words = ["the vocabulary of 129", "pad_to_multiple_of=2", "does not divide by 2"]
        refused(place, place.revert_command(*flags), *words)


@pytest.mark.parametrize("tp", [3, 5, 8])
def test_heads_that_do_not_divide_are_told_before_a_vocabulary_that_could_be_enlarged(tp: int, place: Place) -> None:
    outcome = run_script(f"revert_{place.family}", revert_words(place.hf, place.target, tp))
    assert_refused(outcome, f"key/value heads do not divide by {tp}, but by 1, 2")
    assert "warning" not in outcome.errors


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_shards_of_the_last_tensor_parallel_rank(family: str, bases: dict[str, Path]) -> None:
    with copied_place(bases, family) as place:
        for path in place.source.glob("model_tp1_*"):
            path.unlink()
        refused(place, place.convert_command(), "shards of the", "ranks are missing")


@pytest.mark.parametrize("tp", ["0", "-1", "x", "1.5", ""])
def test_a_parallel_size_that_is_none_is_refused(tp: str, place: Place) -> None:
    outcome = run_script("revert_internlm2", ["--src", str(place.hf), "--tgt", str(place.target), "--tp_size", tp])
    assert outcome.status == 2
    assert "--tp_size" in outcome.errors
    assert not place.target.exists()


@pytest.mark.parametrize("tp", [3, 4, 1000000])
def test_a_parallel_size_that_does_not_divide_is_refused(tp: int, place: Place) -> None:
    refused(place, ("revert_internlm2", revert_words(place.hf, place.target, tp)), str(tp), "key/value heads")


@pytest.mark.parametrize(
    "size", ["0GB", "-1GB", "ten", "10", "", "nanGB", "infGB", "1.5.5GB", "10Gigs", "GB", "1e400GB", "0.0001KB", "10BB"]
)
def test_a_shard_size_that_is_none_is_refused(size: str, place: Place) -> None:
    before = snapshot(place.root)
    outcome = run_script(
        "convert2hf_internlm2", convert_words(place.source, place.target, place.tokenizer, f"--max_shard={size}")
    )
    assert outcome.status == 2
    assert "--max_shard" in outcome.errors
    assert "10GB" in outcome.errors
    assert snapshot(place.root) == before


@pytest.mark.parametrize("missing", ["compat_internlm2.py", "*.py"])
def test_an_installation_without_the_models_code_is_refused(
    missing: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once gave a folder that no transformers loads, without a word."""
    package = shutil.copytree(REPOSITORY / "internlm2_model", tmp_path / "package")
    for path in package.glob(missing):
        path.unlink()
    family = families.FAMILIES["internlm2"]
    own = replace(family.forms["internlm2"], code=package)
    monkeypatch.setitem(vars(family), "forms", {**family.forms, "internlm2": own})
    refused(place, place.convert_command(), str(package), "lacks", "compat_internlm2.py")


# --------------------------------------------------------------------------------------------------------- the target


@pytest.mark.parametrize("command", [Place.convert_command, Place.revert_command])
def test_a_target_with_files_is_refused_before_any_work(command: Callable[..., Any], place: Place) -> None:
    place.target.mkdir()
    (place.target / "notes.txt").write_text("kept")
    (place.source / B).write_bytes(b"")  # would be found if any work was done
    (place.hf / "config.json").write_bytes(b"")
    refused(place, command(place), str(place.target), "not empty", "--force")


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_target_that_is_or_holds_the_source_is_refused(force: tuple[str, ...], place: Place) -> None:
    for target in (place.source, place.root, place.root / "hf" / ".." / "source"):
        refused(place, place.convert_command(*force, target=target), "--tgt", "source")
    for target in (place.hf, place.root):
        refused(place, place.revert_command(*force, target=target), "--tgt", "source")


@pytest.mark.parametrize("kind", ["file", "link to a file", "link to itself"])
def test_a_target_that_is_no_folder_is_refused(kind: str, place: Place) -> None:
    if kind == "file":
        place.target.write_text("kept")
    else:
        place.target.symlink_to({"link to a file": place.tokenizer, "link to itself": place.target}[kind])
    for command in (place.convert_command("--force"), place.revert_command("--force")):
        refused(place, command, str(place.target), "a link or a file")


@pytest.mark.parametrize("flag", ["--src", "--tgt", "--tokenizer", "--config"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_name_is_a_wrong_flag(
    flag: str, family: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--tgt "" --force, of an unset variable, once replaced the current folder."""
    with copied_place(bases, family) as place:
        monkeypatch.chdir(place.root)
        before = snapshot(place.root)
        for script, words in (place.convert_command("--force", "--config", "."), place.revert_command("--force")):
            if flag in words:
                words[words.index(flag) + 1] = ""
                outcome = run_script(script, words)
                assert outcome.status == 2
                assert f"{flag}: the name is empty" in outcome.errors
        assert snapshot(place.root) == before


@pytest.mark.parametrize("direction", COMMANDS)
def test_the_current_folder_is_not_replaced(direction: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    current = place.root / "current"
    (current / "in").mkdir(parents=True)
    monkeypatch.chdir(current / "in")
    for target in (".", "..", "../in", "../../current"):
        command = COMMANDS[direction](place, "--force", target=Path(target))
        refused(place, command, "the current folder", str(current / "in"))


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_link_to_an_empty_folder_is_followed(direction: str, place: Place) -> None:
    (place.root / "disk" / "empty").mkdir(parents=True)
    place.target.symlink_to(place.root / "disk" / "empty")
    assert run_script(*COMMANDS[direction](place)).status == 0
    assert place.target.is_symlink()
    assert [path.name for path in (place.root / "disk").iterdir()] == ["empty"]
    assert any(place.target.glob("model*"))


def test_room_on_the_disk_is_checked_before(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    for command in (place.convert_command(), place.revert_command()):
        refused(place, command, str(place.root), "0.00 GB free", "needed")


# ------------------------------------------------------------------------------------------------------ hostile files


def hostile_shard(place: Place, pickled: bytes) -> tuple[str, list[str]]:
    write_archive(place.source / D, pickled)
    return place.convert_command()


def hostile_config(place: Place, pickled: bytes) -> tuple[str, list[str]]:
    write_archive(place.source / "model_config.pt", pickled)
    return place.convert_command()


def hostile_bin(place: Place, pickled: bytes) -> tuple[str, list[str]]:
    save_as_bin(place.hf)
    write_archive(place.hf / "pytorch_model-00001-of-00002.bin", pickled)
    return place.revert_command()


@pytest.mark.parametrize("payload", HOSTILE)
@pytest.mark.parametrize("plant", [hostile_shard, hostile_config, hostile_bin])
def test_no_pickle_of_a_source_runs_anything(
    plant: Callable[[Place, bytes], tuple[str, list[str]]], payload: str, place: Place, tmp_path: Path
) -> None:
    with hostile_surroundings(tmp_path, on_import=payload.startswith("import")) as marker:
        for pickled in (HOSTILE[payload](marker), in_dict(HOSTILE[payload](marker))):
            refused(place, plant(place, pickled), "Nothing in it was run")
    assert not marker.exists()


def test_a_bare_pickle_for_a_shard_runs_nothing(place: Place, tmp_path: Path) -> None:
    """torch before 1.6 wrote bare pickles; they are not read."""
    with hostile_surroundings(tmp_path, on_import=False) as marker:
        (place.source / B).write_bytes(HOSTILE["os.system"](marker))
        refused(place, place.convert_command(), B)
    assert not marker.exists()


def test_code_in_a_folder_is_not_run(place: Place, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for path in [*place.hf.glob("*.py"), place.hf / "sitecustomize.py", place.source / "model_config.py"]:
        path.write_text(f"open({str(marker)!r}, 'w')")
    assert run_script(*place.revert_command()).status == 0
    shutil.rmtree(place.target)
    assert run_script(*place.convert_command()).status == 0
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------------------ --verify


def test_md5_files_are_checked_with_verify_alone(place: Place) -> None:
    digests = {name: hashlib.md5((place.source / name).read_bytes()).hexdigest() for name in (A, B, C, D)}
    (place.source / f"{A}.md5").write_text(f"{digests[A]}  {A}\n")
    (place.source / f"{B}.md5").write_text(digests[B].upper())
    (place.source / C.replace(".pt", ".md5")).write_text(f"MD5 ({C}) = {digests[C]}")
    assert run_script(*place.convert_command("--verify")).status == 0
    shutil.rmtree(place.target)
    for wrong in (digests[A], "", "\0\xff", "0" * 32):
        (place.source / f"{D}.md5").write_text(wrong, encoding="latin-1")
        refused(place, place.convert_command("--verify"), D, digests[D], f"{D}.md5")
    assert run_script(*place.convert_command()).status == 0


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_finds_what_was_written_wrongly(
    family: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte changes on the disk between writing and reading again: of a tensor's start or end, or of the header."""
    directions = [(convert_module, "gather", Place.convert_command), (revert_module, "scatter", Place.revert_command)]
    with copied_place(bases, family) as place:
        for module, method, command in directions:
            for pattern, position in (("model*1*", 20), ("model*1*", -1), ("model*1*", -5000), ("model*", -3000)):
                work = getattr(Copier, method)

                def damaging(copier: Copier, *tasks: Any, work: Any = work, at: Any = (pattern, position)) -> Any:
                    done = work(copier, *tasks)
                    path = sorted((place.root / ".target.partial" / "new").glob(at[0]))[-1]
                    flip(path, at[1] % path.stat().st_size)
                    return done

                with monkeypatch.context() as patch:
                    patch.setattr(module.Copier, method, damaging)
                    outcome = run_script(*command(place, "--verify"))
                if outcome.status == 0:  # revert writes its headers after the weights, over the damage
                    assert method == "scatter"
                    assert position in (20, -1)
                    shutil.rmtree(place.target)
                else:
                    assert_refused(outcome, "model")
                assert sorted(path.name for path in place.root.iterdir()) == ["hf", "source", "tokenizer.model"]


# ------------------------------------------------------------------------------------------------- killed at any moment


ONE_IN = 3
"""Of the moments when a run can be disturbed, one in so many is tried here; benchmarks/fault_campaign.py tries all."""


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("direction", COMMANDS)
def test_killed_before_any_file_operation(direction: str, force: bool, place: Place) -> None:
    verdicts = killed_before_operations(place, direction, force, ONE_IN)
    assert len(verdicts) > 20
    assert verdicts[0] == AS_BEFORE
    assert verdicts == sorted(verdicts)  # as before, and from some moment on complete


@pytest.mark.parametrize(
    ("direction", "number"),
    [("convert", signal.SIGINT), ("revert", signal.SIGINT), ("convert", signal.SIGTERM), ("revert", signal.SIGHUP)],
)
def test_signalled_before_any_file_operation(direction: str, number: int, place: Place) -> None:
    one_in = ONE_IN if number == signal.SIGINT else 3 * ONE_IN  # they go one way in the program
    verdicts = signalled_before_operations(place, direction, True, number, one_in)
    assert verdicts.count(AS_BEFORE) > 8


@pytest.mark.parametrize(
    ("direction", "number"),
    [
        *((direction, number) for direction in COMMANDS for number in (signal.SIGKILL, signal.SIGINT)),
        ("convert", signal.SIGTERM),
        ("revert", signal.SIGHUP),
    ],
)
def test_killed_at_random_moments(direction: str, number: int, place: Place) -> None:
    assert len(signalled_at_random(place, direction, number, 12, seed=number)) == 12


@pytest.mark.parametrize(
    ("direction", "number"), [("convert", signal.SIGINT), ("revert", signal.SIGTERM), ("convert", signal.SIGHUP)]
)
def test_a_read_that_never_returns_does_not_keep_a_signal_from_ending_the_run(
    direction: str, number: int, place: Place
) -> None:
    assert len(signalled_while_hanging(place, direction, number, 2, seed=number)) == 2


def test_a_signal_that_is_ignored_stays_so(place: Place) -> None:
    """As under nohup."""
    script, words = place.convert_command()
    command = [sys.executable, str(REPOSITORY / f"{script}.py"), *words]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ) as run:
        while run.poll() is None:
            run.send_signal(signal.SIGHUP)
            time.sleep(0.02)
    assert run.returncode == 0
    assert (place.target / "config.json").exists()


def test_an_interrupt_while_threads_copy_is_raised_when_they_have_ended(tmp_path: Path) -> None:
    """Not within the lock that a thread then waits for: that hung one run in two thousand."""
    shape, strides = (8, 2**18), (2**18, 1)
    source, target = (StoredTensor("a", tmp_path / name, 0, FLOAT32, shape, strides) for name in ("in", "out"))
    for tensor in (source, target):
        tensor.path.write_bytes(bytes(tensor.nbytes))
    rows = [(target.view().narrow(0, row, 1), source.view().narrow(0, row, 1)) for row in range(8)]
    progressed: list[int] = []

    def interrupt(count: int) -> None:
        progressed.append(count)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # for the main thread to hear it

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            Copier(interrupt).gather([[Move(target, tuple(rows))]])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert raised.traceback[-1].name == "held_back"
    assert len(progressed) == 1  # of eight blocks: after the first the thread stopped


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("direction", COMMANDS)
def test_an_error_of_any_file_operation(direction: str, error: int, place: Place) -> None:
    verdicts = failing_at_operations(place, direction, True, error, ONE_IN)
    assert verdicts.count(REFUSED) > 20


# ------------------------------------------------------------------------------------------------ limits of the system


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_limit_on_file_sizes(direction: str, place: Place) -> None:
    result = expected_result(place, COMMANDS[direction])
    sizes = sorted({len(content) for content in result.files.values()})
    messages = 1000  # what the warnings and the sentence take: they go to a file here
    for limit in [messages, *(size - 1 for size in sizes if size > messages)]:
        outcome = run_child(*COMMANDS[direction](place), Conditions(place.root, file_size=limit))
        assert_refused(outcome, str(place.root), "File too large", "ulimit -f")
        assert ("--max_shard" in outcome.errors) == (direction == "convert")
        assert not place.target.exists()
        assert others_of(place) == result.others
    outcome = run_child(*COMMANDS[direction](place), Conditions(place.root, file_size=sizes[-1]))
    assert outcome.status == 0


@pytest.mark.parametrize("direction", COMMANDS)
def test_more_files_than_may_be_open(direction: str, place: Place) -> None:
    shutil.rmtree(place.source)
    if direction == "convert":  # 2 x 40 shards
        build(place.source, "internlm2", shape=Shape(16, 40, 4, 2, 256, 128), tp=2, pp=40)
        command = place.convert_command()
    else:  # a file for every tensor, to 64 shards
        shape = Shape(hidden=128, layers=2, heads=64, kv_heads=64, vocab=128)
        build(place.source, "internlm2", shape=shape)
        assert run_script(*place.convert_command("--force", "--max_shard", "1KB", target=place.hf)).status == 0
        command = ("revert_internlm2", revert_words(place.hf, place.target, 64))
    assert run_script(*command).status == 0
    expected = contents(place.target)
    shutil.rmtree(place.target)
    outcome = run_child(*command, Conditions(place.root, open_files=32))
    assert outcome.status == 0, outcome
    assert contents(place.target) == expected


@pytest.mark.parametrize("direction", COMMANDS)
def test_no_thread_to_be_had(direction: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def start_or_fail(thread: threading.Thread) -> None:
        if thread.name.startswith("copying"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    for flags in ((), ("--verify",)):
        before = snapshot(place.root, times=False)
        assert_refused(run_script(*COMMANDS[direction](place, *flags)), "can't start new thread", "ulimit -u")
        assert snapshot(place.root, times=False) == before


@pytest.mark.parametrize("megabytes", [100, 190, 210, 300, 600])
def test_too_little_address_space(megabytes: int, place: Place) -> None:
    """One sentence, or success; never a traceback, whatever the libraries do with the little they get."""
    before = snapshot(place.root, times=False)
    outcome = run_itself(place, place.convert_command(), f'ulimit -v {megabytes << 10}; "$@"')
    if outcome.status:
        assert outcome.status == 1, outcome
        assert "Traceback" not in outcome.errors
        assert outcome.sentences[-1].startswith("error: "), outcome
        assert snapshot(place.root, times=False) == before


@pytest.mark.parametrize("megabytes", [200, 215, 230, 260, 290])
def test_too_little_address_space_for_a_large_tokenizer(megabytes: int, place: Place) -> None:
    """Comparing it takes more memory than all else, and libraries that get none crash."""
    shutil.rmtree(place.source)
    build(place.source, "internlm2", shape=Shape(16, 1, 4, 2, vocab=92544))
    train_tokenizer(place.tokenizer)
    numbers = Random(0)
    append_pieces(place.tokenizer, (f"{numbers.randrange(10**12)}+{number}" for number in range(92000)), NORMAL)
    before = snapshot(place.root, times=False)
    outcome = run_itself(place, place.convert_command(), f'ulimit -v {megabytes << 10}; "$@"')
    if outcome.status:
        assert_refused(outcome, "ulimit -v")
        assert snapshot(place.root, times=False) == before


@contextmanager
def mounted(folder: Path, options: str, kind: str = "tmpfs") -> Iterator[Path]:
    """A file system at `folder`, in memory unless another kind is named; for "bind" `options` is the other folder."""
    folder.mkdir(exist_ok=True)
    words = ["--bind", options] if kind == "bind" else ["-t", kind, "-o", options, kind]
    command = ["mount", *words, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"mounting a file system is not permitted here: {done.stderr.strip() if done else 'no mount'}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
@pytest.mark.parametrize("direction", COMMANDS)
def test_a_mount_point_is_no_target(direction: str, kind: str, place: Place) -> None:
    """As a container's volume: known before anything is written, and a folder in it is a target."""
    disk = place.root.parent / "disk"
    (place.root.parent / "elsewhere").mkdir()
    options = {"tmpfs": "size=100m", "bind": str(place.root.parent / "elsewhere")}[kind]
    with mounted(disk, options, kind):
        for force in ((), ("--force",)):
            outcome = run_script(*COMMANDS[direction](place, *force, target=disk))
            assert_refused(outcome, "the mount point", str(disk), f"such as {disk}/model")
        assert list(disk.iterdir()) == []
        assert run_script(*COMMANDS[direction](place, target=disk / "model")).status == 0


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_target_in_the_lower_layer_of_an_overlay(direction: str, place: Place) -> None:
    """As a folder of a container's image: it cannot be moved, which is known before anything is written."""
    layers = [place.root.parent / name for name in ("lower", "upper", "work_folder")]
    for folder in (*layers, layers[0] / "empty", layers[0] / "full"):
        folder.mkdir()
    (layers[0] / "full" / WEIGHTS[direction]).write_text("old")
    options = "lowerdir={},upperdir={},workdir={},redirect_dir=off".format(*layers)
    with mounted(place.root.parent / "disk", options, "overlay") as disk:
        outcome = run_script(*COMMANDS[direction](place, "--force", target=disk / "full"))
        assert_refused(outcome, str(disk / "full"), "cannot be replaced", "layer", os.strerror(errno.EXDEV))
        assert contents(disk / "full") == {WEIGHTS[direction]: b"old"}
        assert run_script(*COMMANDS[direction](place, target=disk / "empty")).status == 0
        assert sorted(path.name for path in disk.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_disk_that_is_full(direction: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything starts; where others fill the disk meanwhile, a sentence and nothing left."""
    result = expected_result(place, COMMANDS[direction])
    total = sum(len(content) for content in result.files.values())
    for part in (0.02, 0.2, 0.5, 0.8, 0.9, 0.95):
        with mounted(place.root.parent / "disk", f"size={int(total * part)}") as disk:
            command = COMMANDS[direction](place, target=disk / "target")
            assert_refused(run_script(*command), str(disk), "GB free", "needed")
            assert list(disk.iterdir()) == []
            with monkeypatch.context() as patch:
                patch.setattr("weight_conversion.running.publishing.Publication.check_space", lambda *_: None)
                assert_refused(run_script(*command), str(disk), "No space left", "make room")
            assert list(disk.iterdir()) == []
    with mounted(place.root.parent / "disk", f"size={total + (68 << 20)}") as disk:
        assert run_script(*COMMANDS[direction](place, target=disk / "target")).status == 0
        assert contents(disk / "target") == result.files


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_disk_that_cannot_be_written(direction: str, place: Place) -> None:
    with mounted(place.root.parent / "disk", "ro") as disk:
        outcome = run_script(*COMMANDS[direction](place, target=disk / "target"))
        assert_refused(outcome, str(disk), "Read-only file system", "choose one")


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_folder_that_may_not_be_written(direction: str, bases: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(bases["internlm2"], Path(folder) / "work")
        place = Place(Path(folder) / "work", "internlm2")
        place.root.chmod(0o555)
        user = 65534 if os.geteuid() == 0 else 0  # root may write anywhere, so the child becomes nobody
        outcome = run_child(*COMMANDS[direction](place), Conditions(place.root, user=user))
        assert_refused(outcome, str(place.root), "Permission denied", "permissions")
        place.root.chmod(0o755)


# ------------------------------------------------------------------------------------------------ two runs at one time


@pytest.mark.parametrize("direction", COMMANDS)
def test_a_second_run_at_the_same_time_is_refused(direction: str, place: Place) -> None:
    command = COMMANDS[direction]
    result = expected_result(place, command)
    operations = count_operations(*command(place), place.root)
    shutil.rmtree(place.target)
    for moment in (operations * 2 // 5, operations // 2, operations * 4 // 5):
        first = Child(*command(place), Conditions(place.root, wait_at=moment))
        first.until("waiting")
        for more in ((), ("--force",)):
            assert_refused(run_script(*command(place, *more)), "another run is writing", str(place.root))
        first.go_on()
        assert first.end().status == 0
        assert contents(place.target) == result.files
        assert others_of(place) == result.others
        shutil.rmtree(place.target)


# ----------------------------------------------------------------------------------------- the real program, end to end


def test_the_scripts_themselves_end_with_a_sentence(place: Place) -> None:
    """As a user runs them: exit status, error stream, nothing on the output, whatever the current folder."""
    os.truncate(place.source / B, 1000)
    (place.hf / "config.json").write_text("{")
    for (script, words), name in ((place.convert_command(), B), (place.revert_command(), "config.json")):
        before = snapshot(place.root)
        run = subprocess.run(
            [sys.executable, REPOSITORY / f"{script}.py", *words],
            capture_output=True,
            text=True,
            cwd=place.root,
            check=False,
        )
        assert_refused(Outcome(run.returncode, run.stderr), name)
        assert snapshot(place.root) == before


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_disturb_nothing(closed: str, place: Place) -> None:
    script, words = place.convert_command()
    quoted = " ".join(f"'{word}'" for word in [sys.executable, str(REPOSITORY / f"{script}.py"), *words])
    assert subprocess.run(["sh", "-c", f"{quoted} {closed}"], capture_output=True, check=False).returncode == 0
    assert (place.target / "config.json").exists()


def run_itself(place: Place, command: tuple[str, list[str]], setting: str, **environment: str) -> Outcome:
    """The script in a shell, its words in "$@", in `setting`; with what was said on the error stream."""
    script, words = command
    run = subprocess.run(
        ["bash", "-c", setting, "bash", sys.executable, str(REPOSITORY / f"{script}.py"), *words],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        cwd=place.root,
        check=False,
    )
    return Outcome(run.returncode, run.stderr)


@pytest.mark.parametrize(
    ("direction", "setting"),
    [
        ("convert", '"$@" >/dev/full'),
        ("revert", '"$@" >/dev/full 2>/dev/full'),
        ("convert", 'set -o pipefail; "$@" 2> >(true) | true'),
        ("revert", 'set -o pipefail; "$@" | true'),
    ],
)
def test_what_cannot_be_printed_changes_no_exit_status(direction: str, setting: str, place: Place) -> None:
    command = COMMANDS[direction](place)
    outcome = run_itself(place, command, setting)
    assert (outcome.status, outcome.sentences) == (0, [])
    assert len(contents(place.target)) > 2
    assert run_itself(place, command, setting).status == 1  # for want of --force


@pytest.mark.parametrize(("name", "encoding"), [("\u5f20\u91cf", "ascii"), ("a\udcff\udcfe", "utf-8:strict")])
def test_a_name_that_cannot_be_printed(name: str, encoding: str, place: Place) -> None:
    (place.root / name).mkdir()
    for command in (place.convert_command, place.revert_command):
        words = command("--verify", target=place.root / name / name)
        assert run_itself(place, words, '"$@"', PYTHONIOENCODING=encoding).status == 0
        shutil.rmtree(place.root / name / name)


def test_a_terminal_that_is_gone_does_not_end_a_run(place: Place) -> None:
    """The bar of progress is then written to nobody."""
    for command in (place.convert_command, place.revert_command):
        master, slave = os.openpty()
        script, words = command()
        with subprocess.Popen(
            [sys.executable, str(REPOSITORY / f"{script}.py"), *words],
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        ) as run:
            os.close(slave)
            os.close(master)
        assert run.returncode == 0
        shutil.rmtree(place.target)


def test_success_says_that_it_verified(place: Place) -> None:
    for command in (place.convert_command, place.revert_command):
        for flags, said in (([], False), (["--verify"], True)):
            outcome = run_script(*command(*flags))
            assert ("Verified: every tensor was read again and equals its source." in outcome.output) == said
            shutil.rmtree(place.target)
