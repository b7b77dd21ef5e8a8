"""A checkpoint or tokenizer that is not whole is refused with one sentence before anything is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.changes import A, B, C, Change, D, copied_place, kind_of, link, refused
from tests.faults.fault_harness import TINY
from tests.faults.fault_moments import Place
from tests.support.checkpoints import Shape, build, save_model_config
from tests.support.conversions import FAMILIES
from tests.support.tokenizer_fixture import train_tokenizer


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


def a_folder(place: Place) -> None:
    (place.source / C).unlink()
    (place.source / C).mkdir()


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


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_shards_of_the_last_tensor_parallel_rank(family: str, bases: dict[str, Path]) -> None:
    with copied_place(bases, family) as place:
        for path in place.source.glob("model_tp1_*"):
            path.unlink()
        refused(place, place.convert_command(), "shards of the", "ranks are missing")


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
