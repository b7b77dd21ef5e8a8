"""Random layouts and random damage, and what must hold of them. A test draws a few, benchmarks/fault_campaign.py many.

Checks raise AssertionError where a promise is broken, and say what happened where it is kept.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

from tests.faults.fault_harness import TINY, assert_refused, contents, convert_words, revert_words, run_script
from tests.support.checkpoints import Shape, build
from tests.support.conversions import assert_same, run_flags, weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HAS_DEFAULT = ("layer_norm_epsilon", "embed_split_hidden", "vocab_size", "num_layers", "dtype", "mlp_ratio", "no_bias")
"""Keys of model_config.pt without which the same model is meant, or is still plain from the shards."""

# ---------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """A checkpoint, and how it is to be converted and reverted.

    `choices` are those of checkpoints.Recipe, and so are those of the run that the model is reverted for.
    """

    family: str
    choices: dict[str, Any]
    dtype: str
    max_shard: str
    back: dict[str, Any]


def _random_run(random: Random) -> dict[str, Any]:
    """Sizes and mode of a training run of the current framework."""
    wp = random.choice([None, None, 1, 2, 4])
    pp = random.choice([1, 1, 2, 3, 4])
    return {
        "tp": random.choice([1, 2, 4]),
        "wp": wp,
        "isp_2025": wp is not None and random.random() < 0.3,
        "pp": pp,
        "chunks": random.choice([1, 1, 2, 3]),
        "fused_mlp": wp is not None and random.random() < 0.4,
    }


def random_layout(random: Random) -> Layout:
    """Any layout that training can write, of a small model."""
    family = random.choice(["internlm", "internlm2"])
    run, back = _random_run(random), _random_run(random)
    tp = run["tp"]
    back["chunks"] = back["chunks"] if back["pp"] > 1 else 1
    unit = math.lcm(*(size for one in (run, back) for size in (one["tp"], one["wp"] or 1)))
    smallest = back["chunks"] * back["pp"]  # the framework builds no stage without a layer, and equal chunks
    kv_heads = unit * random.choice([1, 2])
    heads = kv_heads * (random.choice([1, 2, 3]) if family == "internlm2" else 1)
    shape = Shape(
        hidden=math.lcm(heads * random.choice([2, 4, 6]), unit),
        layers=math.lcm(run["chunks"], smallest) * (1 if smallest > 2 else random.randint(1, 2)),
        heads=heads,
        kv_heads=kv_heads,
        intermediate=256 * random.choice([1, 1, 2]),
        vocab=unit * random.randint(64 // unit, 160 // unit),
    )
    if random.random() < 0.1:  # I/tp == H: the MLP is square
        shape = Shape(256 // (1 if run["wp"] else tp), shape.layers, kv_heads, kv_heads, 256, shape.vocab)
    stored = random.choice(list(DTYPES))
    llama_like = family == "internlm" and random.random() < 0.25
    version = 2 if run["fused_mlp"] else random.choice([1, 2])
    if family == "internlm":
        back["mlp_version"] = 2 if back["fused_mlp"] else random.choice([1, 2])
    back["embedding"] = "hidden" if back["wp"] else random.choice(["hidden", "vocabulary"])
    interleaved = random.random() < 0.3
    may_be_left_out = [*HAS_DEFAULT, "norm_head", *([] if interleaved else ["adapt_hf"])]
    norm_head = family == "internlm2" and random.random() < 0.2
    fused = family == "internlm" or random.random() < 0.7
    pieces = family == "internlm2" and fused and random.random() < 0.4
    may_be_left_out += ["enable_qkv_fusion"] if pieces else []
    choices = {
        "shape": shape,
        **run,
        "v_shaped": run["chunks"] == 2 and random.random() < 0.3,
        "dtype": DTYPES[stored],
        "bias": not llama_like and random.random() < 0.5,
        "embedding": random.choice(["hidden", *([] if run["wp"] else ["vocabulary"]), "unnamed vocabulary"]),
        "interleaved": interleaved,
        "fused": fused,
        "pieces": pieces,
        "mlp_version": version,
        "prefix": random.choice(["", "model."]),
        "inv_freq": random.random() < 0.3,
        "norm_head": norm_head,
        "llama_like": llama_like,
        "omit": tuple(k for k in may_be_left_out if random.random() < 0.2 and not (norm_head and k == "norm_head")),
        "seed": random.randrange(1 << 16),
    }
    return Layout(
        family,
        choices,
        dtype=stored if random.random() < 0.7 else random.choice(list(DTYPES)),
        max_shard=random.choice(["10GB", "100KB", "30KB", "5KB"]),
        back=back,
    )


def check_layout(layout: Layout, folder: Path, tokenizer: Path) -> None:
    """Convert, revert, convert: each step gives exactly what the checkpoint holds; `folder` is used up."""
    internlm, shape = layout.family == "internlm", layout.choices["shape"]

    def converted(source: Path, target: Path, run: dict[str, Any]) -> dict[str, torch.Tensor]:
        square = internlm and shape.intermediate // (1 if run["wp"] else run["tp"]) == shape.hidden
        more = ["--max_shard", layout.max_shard, *(["--version", str(run["mlp_version"])] if square else [])]
        words = convert_words(source, target, tokenizer, *more, "--dtype", layout.dtype, "--verify")
        outcome = run_script(f"convert2hf_{layout.family}", words)
        assert outcome.status == 0, outcome
        return weights(target)

    full = build(folder / "source", layout.family, **layout.choices)
    expected = {name: tensor.to(DTYPES[layout.dtype]) for name, tensor in full.items()}
    found = converted(folder / "source", folder / "hf", layout.choices)
    assert_same(found, expected)
    _check_relaid(layout, folder)

    words = revert_words(folder / "hf", folder / "back", layout.back["tp"], *run_flags(layout.back), "--verify")
    outcome = run_script(f"revert_{layout.family}", words)
    assert outcome.status == 0, outcome
    if layout.choices["dtype"] is DTYPES[layout.dtype] and not layout.choices["norm_head"]:
        _check_reverted(layout, folder, "back", fused=True)
    converted(folder / "back", folder / "again", layout.back)
    first, second = contents(folder / "hf"), contents(folder / "again")
    different = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    # the training framework's epsilon and rotary base went through model_config.pt, and came back
    assert not different, different


def _check_relaid(layout: Layout, folder: Path) -> None:
    """From the one training layout to the other without a Hugging Face folder; a square MLP does not tell its names."""
    words = revert_words(folder / "source", folder / "relaid", layout.back["tp"], *run_flags(layout.back), "--verify")
    outcome = run_script(f"revert_{layout.family}", words)
    shape, parts = layout.choices["shape"], 1 if layout.choices["wp"] else layout.choices["tp"]
    if layout.family == "internlm" and shape.intermediate // parts == shape.hidden:
        assert_refused(outcome)
        return
    assert outcome.status == 0, outcome
    _check_reverted(layout, folder, "relaid", fused=layout.choices["fused"])


def _check_reverted(layout: Layout, folder: Path, found: str, *, fused: bool) -> None:
    """The shards are those that training would have written in this layout."""
    kept = {key: layout.choices[key] for key in ("shape", "dtype", "bias", "seed")}
    build(folder / "oracle", layout.family, **kept, **layout.back, fused=fused)
    names = sorted(path.name for path in (folder / "oracle").glob("model_*p*_pp*.pt"))
    assert names == sorted(path.name for path in (folder / found).glob("model_*p*_pp*.pt"))
    both_names = layout.back["tp"] == 1  # of an embedding that one shard has all of
    for name in names:
        expected = torch.load(folder / "oracle" / name)
        again = {key.replace(".word_embeddings", ""): value for key, value in expected.items() if both_names}
        assert_same(torch.load(folder / found / name), expected | again)


# ----------------------------------------------------------------------------------------------------------- damage


@dataclass(frozen=True)
class Source:
    """A kind of source that is damaged, and the command that reads it with --verify."""

    what: str
    script: str
    """convert2hf or revert."""
    suffix: str
    """Of the files that hold the weights."""
    run: dict[str, Any]
    """Sizes and mode of the training run, as choices of checkpoints.Recipe."""


TENSOR_PARALLEL: dict[str, Any] = {"tp": 2, "pp": 2}
WEIGHT_PARALLEL: dict[str, Any] = {"tp": 2, "wp": 2, "pp": 2, "fused_mlp": True}
SOURCES = {
    "shards": Source("InternEvo shards", "convert2hf", ".pt", TENSOR_PARALLEL),
    "isp": Source("InternEvo shards of isp", "convert2hf", ".pt", WEIGHT_PARALLEL),
    "resharded": Source("InternEvo shards of isp, resharded", "revert", ".pt", WEIGHT_PARALLEL),
    "safetensors": Source("safetensors folder", "revert", ".safetensors", TENSOR_PARALLEL),
    "bin": Source(".bin folder", "revert", ".bin", TENSOR_PARALLEL),
}
"""The Hugging Face folders have several files and an index."""


class Subject:
    """A source folder of a kind named in SOURCES, and a command that reads it with --verify."""

    def __init__(self, root: Path, family: str, kind: str, tokenizer: Path) -> None:
        self._root, self._family, self._kind = root, family, SOURCES[kind]
        self.tokenizer = root / "tokenizer.model"
        root.mkdir()
        shutil.copy(tokenizer, self.tokenizer)
        self._source = root / "checkpoint"
        build(self._source, family, shape=TINY[family], bias=family == "internlm", **self._kind.run)
        if self._kind.suffix != ".pt":
            self._make_folder()
        assert run_script(*self._command()).status == 0
        self._expected = contents(root / "target")
        shutil.rmtree(root / "target")
        self.weights = sorted(self._source.glob(f"*{self._kind.suffix}"))
        self.settings = sorted(self._source.glob("*.json")) if self._kind.suffix != ".pt" else []
        self.settings = [path for path in self.settings if path.name == "config.json" or "index" in path.name]

    def _make_folder(self) -> None:
        words = convert_words(self._source, self._root / "hf", self.tokenizer, "--max_shard", "20KB")
        assert run_script(f"convert2hf_{self._family}", words).status == 0
        self._source = self._root / "hf"
        if self._kind.suffix == ".bin":
            index: dict[str, str] = {}
            for number, path in enumerate(sorted(self._source.glob("*.safetensors"))):
                name = f"pytorch_model-{number}.bin"
                tensors = load_file(path)
                torch.save(tensors, self._source / name)
                index |= dict.fromkeys(tensors, name)
                path.unlink()
            (self._source / "model.safetensors.index.json").unlink()
            (self._source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))

    def _command(self) -> tuple[str, list[str]]:
        target, script = self._root / "target", f"{self._kind.script}_{self._family}"
        if self._kind.script == "convert2hf":
            return script, convert_words(self._source, target, self.tokenizer, "--verify")
        return script, revert_words(self._source, target, 2, "--embed_split", "--verify")

    def check(self, path: Path, content: bytes) -> str:
        """Runs the command while `path` holds `content`; what happened:

        refused    one sentence, and nothing is there
        exact      all that is written is as without the change, to the byte
        setting    all weights are as without the change, but a setting that nothing confirms is another
        pieces     all but the tokenizer is as without the change; that is copied as it is
        """
        return self.check_replaced(path, lambda place: place.write_bytes(content))

    def check_replaced(self, path: Path, make: Callable[[Path], object]) -> str:
        """The same while `path` is what `make` makes there."""
        aside = path.with_name(".aside")
        path.rename(aside)
        try:
            make(path)
            outcome = run_script(*self._command())
        finally:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            aside.rename(path)
        target = self._root / "target"
        if outcome.status:
            assert_refused(outcome)
            left = {"checkpoint", "tokenizer.model", "target", "hf"} & {entry.name for entry in self._root.iterdir()}
            assert "target" not in left
            assert len(list(self._root.iterdir())) == len(left)
            return "refused"
        found = contents(target)
        shutil.rmtree(target)
        names = found.keys() | self._expected.keys()
        different = {name for name in names if found.get(name) != self._expected.get(name)}
        if not different:
            return "exact"
        if different == {"tokenizer.model"} and path == self.tokenizer:
            return "pieces"
        assert path in self.settings, f"{path.name} damaged: {sorted(different)} differ"
        assert different == {"model_config.pt"}, different
        return "setting"


def _make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "socket": _make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}
"""What can stand where a file is expected."""


def structure(path: Path) -> list[int]:
    """The positions of the bytes that are not a tensor's."""
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        return list(range(8 + int.from_bytes(path.read_bytes()[:8], "little")))
    if path.suffix != ".pt" and path.suffix != ".bin":
        return list(range(size))
    positions = set(range(size))
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if "/data/" in info.filename:
                file.seek(info.header_offset + 26)
                lengths = file.read(4)  # of the name and of the extra field
                start = info.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
                positions -= set(range(start, start + info.file_size))
    return sorted(positions)


def payload(path: Path) -> list[int]:
    """The positions of the bytes of tensors."""
    return sorted(set(range(path.stat().st_size)) - set(structure(path)))


def with_flip(path: Path, position: int, mask: int) -> bytes:
    """The content of a file with the bits `mask` of one byte changed."""
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    return bytes(content)


def with_cut(path: Path, length: int) -> bytes:
    """The first `length` bytes of a file."""
    return path.read_bytes()[:length]
