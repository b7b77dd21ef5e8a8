"""Values and sizes that no checkpoint has end in one short sentence: nothing crashes, hangs, or is believed."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.fault_harness import TINY, assert_refused, run_script
from tests.faults.fault_moments import Place
from tests.faults.hostile_pickles import write_archive
from tests.support.checkpoints import save_model_config
from weight_conversion.errors import ConversionError, shown
from weight_conversion.files.plain_pickle import MAX_DEPTH, loads
from weight_conversion.files.safetensors_file import MAX_TENSORS, read_header
from weight_conversion.files.torch_file import read_plain_dict, read_state_dict

KEY = b"X\x0a\x00\x00\x00num_layers"
DEEP = b")" + 1_000_000 * b"\x85"  # a tuple in a tuple in a tuple ...
DOUBLED = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # each time twice itself: 2^60 in the end

BAD_PICKLES = {
    "a deep tuple": b"\x80\x02}" + KEY + DEEP + b"s.",
    "a deep tuple as a key": b"\x80\x02}" + DEEP + KEY + b"s.",
    "a doubled tuple": b"\x80\x02}" + KEY + DOUBLED + b"s.",
    "a doubled tuple as a key": b"\x80\x02}" + DOUBLED + KEY + b"s.",
    "a list that holds itself": b"\x80\x02}" + KEY + b"]q\x00h\x00as.",
    "a dict that holds itself": b"\x80\x02}q\x00" + KEY + b"h\x00s.",
    "a tuple as a key of an OrderedDict": b"\x80\x02ccollections\nOrderedDict\n]" + DEEP + KEY + b"\x86a\x85R.",
    "a tuple as a storage's key": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + DEEP + b"NK\x01tQ.",
    "a set": b"\x80\x04\x8f(" + DEEP + b"\x90.",
    "a tensor of a deep tuple": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + DEEP + b"K\x00))tR.",
    "a memo far away": b"\x80\x02}r\xff\xff\xff\x7fj\xff\xff\xff\x7e.",
    "more than the stack holds": b"\x80\x02}\x87.",
    "no mark": b"\x80\x02}u.",
    "half an item": b"\x80\x02}(" + KEY + b"u.",
    "a name of many megabytes": b"\x80\x02c" + b"x" * 3_000_000 + b"\ny\n.",
    "a name with escape codes": b"\x80\x02c\x1b[31m\nred\n.",
}


@pytest.mark.parametrize("fault", BAD_PICKLES)
def test_a_pickle_of_endless_values_is_refused(fault: str, tmp_path: Path) -> None:
    path = write_archive(tmp_path / "model_config.pt", BAD_PICKLES[fault])
    for read in (read_plain_dict, read_state_dict):
        with pytest.raises(ConversionError, match="Nothing in it was run") as refused:
            read(path)
        assert_short(str(refused.value), path)


def test_a_value_as_deep_as_allowed_is_read_and_one_deeper_is_not() -> None:
    value: Any = {}
    for _ in range(MAX_DEPTH - 1):
        value = {"a": [value]}["a"]
    assert loads(pickle.dumps(value, 2)) == value
    with pytest.raises(ValueError, match="deep in each other"):
        loads(pickle.dumps([value], 2))


def assert_short(sentence: str, path: Path) -> None:
    assert len(sentence) < 700 + len(str(path)), sentence[:1000]
    assert sentence.isprintable(), ascii(sentence[:1000])


VALUES = [
    10**6000,
    -(10**6000),
    "a" * 3_000_000,
    "\x1b[31mred\x1b[0m\nnext line\u202e\u2028",
    b"\x1b\x00" * 500,
    {("a", i): [list(range(100))] for i in range(1000)},
    [[[[[[["deep"]]]]]]],
    float("nan"),
    None,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_whatever_a_file_holds_is_shown_short_and_without_control_characters(value: object) -> None:
    assert len(shown(value)) <= 210
    assert shown(value).isprintable()


# ------------------------------------------------------------------------------------------------- the whole script


SETTINGS = {
    "num_layers": 2,
    "hidden_size": 16,
    "vocab_size": 128,
    "num_attention_heads": 4,
    "num_kv_attention_heads": TINY["internlm2"].kv_heads,
}
ESCAPE = "\x1b[2J\x1b[31m" + "x" * 3_000_000


def refused(outcome: Any, place: Place, *words: str) -> None:
    assert_refused(outcome, *words)
    assert_short(outcome.sentences[0], place.root)
    assert not [path for path in place.root.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rope_base", 10**400, ["rope_base", "about 401 digits"]),
        ("rope_base", float("nan"), ["rope_base is nan"]),
        ("layer_norm_epsilon", 10**6000, ["layer_norm_epsilon", "about 6001 digits"]),
        ("layer_norm_epsilon", float("inf"), ["layer_norm_epsilon is inf"]),
        ("layer_norm_epsilon", -1e-5, ["layer_norm_epsilon is -1e-05"]),
        ("hidden_size", 10**6000, ["hidden_size", "about 6001 digits"]),
        ("vocab_size", ESCAPE, ["vocab_size = '\\x1b[2J"]),
        ("num_layers", [10**6000], ["num_layers = [a whole number of about 6001 digits]"]),
        ("num_layers", ESCAPE, ["num_layers = '\\x1b[2J"]),
    ],
    ids=lambda value: shown(value)[:30],
)
def test_settings_that_no_training_run_has(key: str, value: object, words: list[str], place: Place) -> None:
    save_model_config(place.source / "model_config.pt", {**SETTINGS, key: value})
    refused(run_script(*place.convert_command()), place, "model_config.pt", *words)


def test_a_tensor_whose_name_is_long_and_has_escape_codes(place: Place) -> None:
    path = place.source / "model_tp0_pp0.pt"
    torch.save(torch.load(path) | {ESCAPE: torch.zeros(1)}, path)
    refused(run_script(*place.convert_command()), place, "'\\x1b[2J", "is not expected")
    state = {ESCAPE: torch.zeros(1)}
    for path in [*place.hf.glob("model-*.safetensors"), place.hf / "model.safetensors.index.json"]:
        state |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    save_file(state, place.hf / "model.safetensors")
    refused(run_script(*place.revert_command()), place, "'\\x1b[2J", "is not expected")


def changed_config(place: Place, text: str, key: str) -> None:
    config = json.loads((place.hf / "config.json").read_text())
    for old in ("rope_parameters", "rope_scaling"):
        config.pop(old, None)
    config[key] = "VALUE"
    (place.hf / "config.json").write_text(json.dumps(config).replace('"VALUE"', text))


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("rope_theta", "1" + "0" * 400, ["rope_theta", "about 401 digits"]),
        ("rope_theta", "NaN", ["rope_theta is nan"]),
        ("rope_theta", "1e999", ["rope_theta is inf"]),
        ("rms_norm_eps", "1" + "0" * 400, ["rms_norm_eps"]),
        ("rms_norm_eps", "NaN", ["rms_norm_eps is nan"]),
        ("rms_norm_eps", "1" + "0" * 6000, ["config.json is not JSON"]),
        ("num_hidden_layers", "1000000000", ["1000000000 layers"]),
        ("model_type", json.dumps(ESCAPE), ["model_type '\\x1b[2J"]),
    ],
)
def test_settings_that_no_model_has(key: str, text: str, words: list[str], place: Place) -> None:
    changed_config(place, text, key)
    refused(run_script(*place.revert_command()), place, *words)


def test_more_ranks_than_a_model_has_columns(place: Place) -> None:
    script, words = place.revert_command()
    refused(run_script(script, [*words, "--wp_size", "1000000000"]), place, "--wp_size 1000000000", "hidden size")
    refused(run_script(script, [*words, "--pp_size", "1000000000"]), place, "1000000000")
    words[words.index("--tp_size") + 1] = "1000000000"
    refused(run_script(script, words), place, "--tp_size 1000000000", "hidden size")


# -------------------------------------------------------------------------------------------- headers of safetensors


def header_of(entries: Callable[[], Iterator[str]]) -> bytes:
    return b"{" + ",".join(entries()).encode() + b"}"


HUGE = '"dtype":"F32","shape":[0{}],"data_offsets":[0,0]'.format(",4611686018427387904" * 8)
HEADERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "900,000 empty entries": (lambda: header_of(lambda: (f'"{i}":{{}}' for i in range(900_000))), f"{MAX_TENSORS}"),
    "200,000 huge shapes": (lambda: header_of(lambda: (f'"{i}":{{{HUGE}}}' for i in range(200_000))), f"{MAX_TENSORS}"),
    "a shape of a million sizes": (
        lambda: b'{"a":{"dtype":"F32","shape":[' + b"9223372036854775807," * 1_000_000 + b'0],"data_offsets":[0,0]}}',
        "1000001 dimensions",
    ),
    "a name of megabytes": (lambda: json.dumps({ESCAPE: {"dtype": "F32"}}).encode(), "'\\x1b[2J"),
    "a type of megabytes": (lambda: json.dumps({"a": {"dtype": ESCAPE}}).encode(), "'\\x1b[2J"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_of_endless_sizes_is_refused(fault: str, tmp_path: Path) -> None:
    make, word = HEADERS[fault]
    path, text = tmp_path / "model.safetensors", make()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ConversionError) as refused:
        read_header(path)
    assert word in str(refused.value)
    assert_short(str(refused.value), path)
