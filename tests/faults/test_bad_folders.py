"""A Hugging Face folder that is not whole, and sizes that cannot be, are refused before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm2_model import InternLM2ForCausalLM
from tests.faults.changes import Change, copied_place, kind_of, link, refused
from tests.faults.fault_harness import REPOSITORY, assert_refused, convert_words, revert_words, run_script, snapshot
from tests.faults.fault_moments import Place
from tests.support.conversions import FAMILIES, save_as_bin, weights
from weight_conversion.mapping import families

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
