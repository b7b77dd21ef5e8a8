"""The folder that the InternEvo training framework saves: which shards there are and what their tensors are called.

    model_config.pt            the model's settings, a dict
    model_tp{t}_pp{p}.pt       tensors of tensor-parallel rank t in pipeline stage p

    2 stages, 4 layers                      the same in 2 interleaved chunks (chunk-major order)
    pp0: embedding, layers 0 1              pp0: 0.model.embedding, 0.model.layers.0 | 1.model.layers.0 (= 2)
    pp1: layers 0 1 (= 2 3), norm, head     pp1: 0.model.layers.0 (= 1)              | 1.model.layers.0 (= 3), ...

Layer numbers restart at 0 in every stage and chunk; here they are counted through, and wrapper prefixes are dropped,
so that the rest of the program sees one name per tensor and, under it, one tensor per tensor-parallel rank.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConversionError, naming
from ..files.torch_file import TorchFileWriter, check_records, read_plain_dict, read_state_dict, write_plain_dict
from ..files.views import StoredTensor, TensorSpec

MODEL_CONFIG = "model_config.pt"
SHARD = re.compile(r"model_tp(0|[1-9][0-9]*)_pp(0|[1-9][0-9]*)\.pt")
UNSUPPORTED = {
    re.compile(r"model_tp\d+_wp\d+_pp\d+\.pt"): "isp (weights split over a weight-parallel group)",
    re.compile(r"model_wp\d+_pp\d+\.pt"): "isp (weights split over a weight-parallel group)",
    re.compile(r"model_tp\d+_pp\d+_(dp|zo)\d+\.pt"): "fsdp (weights split over data-parallel ranks)",
    re.compile(r"model_moe_.*\.pt"): "MoE (mixture of experts)",
}
TENSOR_NAME = re.compile(
    r"(?:(?P<chunk>[0-9]{1,6})\.)?(?:model\.)?(?:(?P<stem>blocks|layers)\.(?P<layer>[0-9]{1,6})\.)?(?P<rest>.+)"
)


def shard_name(tp_rank: int, pp_rank: int | Literal["*"] = 0) -> str:
    return f"model_tp{tp_rank}_pp{pp_rank}.pt"


@dataclass(frozen=True)
class TrainingCheckpoint:
    """An InternEvo checkpoint: its settings and, by name, each tensor on every tensor-parallel rank (None: absent)."""

    folder: Path
    shards: tuple[Path, ...]
    tp_size: int
    pp_size: int
    num_layers: int
    config: dict[str, Any]
    tensors: dict[str, list[StoredTensor | None]]

    def first(self, name: str) -> StoredTensor | None:
        """The tensor on the first rank that has it."""
        return next((tensor for tensor in self.tensors.get(name, []) if tensor is not None), None)


def read_checkpoint(folder: Path) -> TrainingCheckpoint:
    """Finds the shards and their tensors, reading headers only; ConversionError where the folder is not whole."""
    if not folder.is_dir():
        raise ConversionError(f"{folder} is not a folder. --src takes the folder that holds {shard_name(0)}.")
    grid = _shard_grid(folder)
    config_file = folder / MODEL_CONFIG
    if not config_file.is_file():
        raise ConversionError(f"{config_file} is missing. InternEvo saves it beside the shards; copy it there too.")
    config = read_plain_dict(config_file)
    tp_size = 1 + max(tp for tp, _ in grid)
    pp_size = 1 + max(pp for _, pp in grid)
    shards = {place: read_state_dict(path) for place, path in grid.items()}
    named = [_Shard(tp, pp, grid[tp, pp], tensors) for (tp, pp), tensors in shards.items()]
    first_layer, num_layers = _first_layers(named)
    tensors: dict[str, list[StoredTensor | None]] = {}
    for shard in named:
        for name, tensor in shard.renumbered(first_layer):
            ranks = tensors.setdefault(name, [None] * tp_size)
            twin = ranks[shard.tp]
            if twin is not None:
                raise ConversionError(
                    f"{shard.path}: tensor {tensor.name!r} is {name!r} of the whole model, which {twin.path} holds too "
                    f"({twin.name!r}). Shards of different runs seem to be mixed in {folder}."
                )
            ranks[shard.tp] = tensor
    return TrainingCheckpoint(folder, tuple(grid.values()), tp_size, pp_size, num_layers, config, tensors)


def _shard_grid(folder: Path) -> dict[tuple[int, int], Path]:
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        for pattern, layout in UNSUPPORTED.items():
            if pattern.fullmatch(name):
                raise ConversionError(
                    f"{folder / name} belongs to a checkpoint of layout {layout}, which is not supported. Save it with "
                    "tensor and pipeline parallelism alone (model_tp*_pp*.pt)."
                )
    grid = {(int(m[1]), int(m[2])): folder / name for name in names if (m := SHARD.fullmatch(name))}
    if not grid:
        raise ConversionError(
            f"{folder} holds no shard model_tp*_pp*.pt. --src takes the folder of one step of an InternEvo checkpoint, "
            "such as ckpt/1000."
        )
    tp_size, pp_size = 1 + max(tp for tp, _ in grid), 1 + max(pp for _, pp in grid)
    places = ((tp, pp) for pp in range(pp_size) for tp in range(tp_size))  # millions, if a name says so
    holes = [shard_name(*place) for place in itertools.islice((p for p in places if p not in grid), 5)]
    if holes:
        raise ConversionError(
            f"{folder} has shards up to {shard_name(tp_size - 1, pp_size - 1)} but lacks {', '.join(holes[:4])}"
            f"{' and more' if len(holes) > 4 else ''}. Copy the missing shards, or remove shards of another run."
        )
    return grid


@dataclass(frozen=True)
class _Shard:
    tp: int
    pp: int
    path: Path
    tensors: Mapping[str, StoredTensor]

    def parsed(self) -> Iterator[tuple[StoredTensor, int, str | None, int, str]]:
        """(tensor, chunk, stem of its layer, number of its layer in chunk and stage, rest of the name)."""
        for name, tensor in self.tensors.items():
            found = TENSOR_NAME.fullmatch(name)
            if found is None:
                raise ConversionError(f"{self.path}: a tensor has the name {name!r}, which no model gives.")
            yield tensor, int(found["chunk"] or 0), found["stem"], int(found["layer"] or 0), found["rest"]

    def layers(self) -> dict[int, set[int]]:
        """The layer numbers that the shard has, by chunk."""
        layers: dict[int, set[int]] = {}
        for _, chunk, stem, layer, _ in self.parsed():
            layers.setdefault(chunk, set()).update([layer] if stem else [])
        return layers

    def renumbered(self, first_layer: Mapping[tuple[int, int], int]) -> Iterator[tuple[str, StoredTensor]]:
        for tensor, chunk, stem, layer, rest in self.parsed():
            yield (f"{stem}.{first_layer[chunk, self.pp] + layer}.{rest}" if stem else rest), tensor


def _first_layers(shards: Sequence[_Shard]) -> tuple[dict[tuple[int, int], int], int]:
    """The number in the whole model of layer 0 of each (chunk, stage), and how many layers there are."""
    counts: dict[tuple[int, int], int] = {}
    for shard in shards:
        for chunk, layers in shard.layers().items():
            count = len(layers)
            if layers != set(range(count)):
                absent = next(layer for layer in itertools.count() if layer not in layers)
                raise ConversionError(f"{shard.path} has layer {max(layers)} but no layer {absent}: it is incomplete.")
            if counts.setdefault((chunk, shard.pp), count) != count:
                raise ConversionError(
                    f"{shard.path} has {count} layers, another rank of pipeline stage {shard.pp} has "
                    f"{counts[chunk, shard.pp]}. Shards of different runs seem to be mixed."
                )
    first, total = {}, 0
    for place in sorted(counts):
        first[place] = total
        total += counts[place]
    return first, total


def verify_files(checkpoint: TrainingCheckpoint) -> None:
    """Reads every shard whole: its records' checksums, and its .md5 file where there is one."""
    for path in checkpoint.shards:
        check_records(path)
        for beside in (path.with_name(path.name + ".md5"), path.with_suffix(".md5")):
            if beside.is_file():
                _check_md5(path, beside)


def _check_md5(path: Path, beside: Path) -> None:
    with naming(beside):
        words = beside.read_text(encoding="utf-8", errors="replace").split()
    with naming(path), path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found not in (word.lower() for word in words):
        raise ConversionError(f"{path} has MD5 {found}, but {beside} says {' '.join(words)[:80]!r}. Copy it again.")


# ---------------------------------------------------------------------------------------------------------- writing


def shard_writers(folder: Path, ranks: Sequence[Sequence[TensorSpec]]) -> list[TorchFileWriter]:
    """One file per tensor-parallel rank, all of pipeline stage 0."""
    return [TorchFileWriter(folder / shard_name(rank), specs) for rank, specs in enumerate(ranks)]


def write_model_config(folder: Path, config: Mapping[str, Any]) -> None:
    write_plain_dict(folder / MODEL_CONFIG, config)
