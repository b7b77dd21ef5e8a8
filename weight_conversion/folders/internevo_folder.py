"""The folder that the InternEvo training framework saves: its settings, and what its shards hold.

    model_config.pt              the model's settings, a dict
    model_tp{t}_pp{p}.pt, ...    tensors of one rank: grid.py says which files there are, numbering.py what they call
                                 the layers that they have

Here layers are counted through and wrapper prefixes are dropped, so that the rest of the program sees one name per
tensor and, under it, what each member of the grid holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConversionError, naming, shown
from ..files.stamps import Stamps, stamps_of
from ..files.torch_file import TorchFileWriter, check_records, read_plain_dict, read_state_dict, write_plain_dict
from ..files.views import StoredTensor, TensorSpec
from .grid import Grid, found_grid
from .numbering import Numbering, Place, SavedName, found_numbering, parsed

MODEL_CONFIG = "model_config.pt"
HEADS = ("norm.weight", "head.weight", "output.weight", "lm_head.weight")
"""What stands behind the last layer."""
HF_OUTPUTS = ("layers.0.self_attn.o_proj.weight", "layers.0.attention.wo.weight")
"""A square weight of a Hugging Face class, which every run that cuts layers cuts."""
HF_EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight")
"""Cut over the tensor-parallel ranks where layers are whole, as with isp of weight-parallel size 1."""
WORD_EMBEDDINGS = ".word_embeddings"
"""In the name of an embedding that is split along the vocabulary."""


@dataclass(frozen=True)
class TrainingCheckpoint:
    """An InternEvo checkpoint: its settings and, by name, each tensor of every member of the grid (None: absent).

    `config` are the settings, and `config_file` says where they are from; `shards` have the stamps that they had before
    they were read.
    """

    folder: Path
    config_file: Path
    shards: Stamps
    grid: Grid
    numbering: Numbering
    config: dict[str, Any]
    tensors: dict[str, list[StoredTensor | None]]

    @property
    def num_layers(self) -> int:
        return self.numbering.num_layers

    def first(self, name: str) -> StoredTensor | None:
        """The tensor of the first member that has it."""
        return next((tensor for tensor in self.tensors.get(name, []) if tensor is not None), None)

    @property
    def is_of_hf_class(self) -> bool:
        """Whether training ran on a Hugging Face class: of such a model the layers are in `model.`, the head is not.

        The framework's own wrapper, where a name has it, holds all of the model.
        """
        heads = (self.first(name) for name in HEADS[1:])
        layers = (self.first(name) for name in self.tensors if name.startswith("layers.0."))
        return any(head is not None and not _is_prefixed(head) for head in heads) and any(
            layer is not None and _is_prefixed(layer) for layer in layers
        )

    def of_hf_class(self, config: dict[str, Any], where: Path) -> TrainingCheckpoint:
        """The same with the settings of the class. Unless its modules were replaced, each rank has it whole."""
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        found = [self.first(name) for name in (*HF_OUTPUTS, *HF_EMBEDDINGS)]
        whole = [tensor.shape for tensor in found if tensor is not None] == [(hidden, hidden), (vocab, hidden)]
        return replace(self, config=config, config_file=where, grid=replace(self.grid, of_copies=whole))


def _is_prefixed(tensor: StoredTensor) -> bool:
    name = parsed(tensor.name)
    return name is not None and name.prefixed


def read_checkpoint(folder: Path) -> TrainingCheckpoint:
    """Finds the shards and their tensors, reading headers only; ConversionError where the folder is not whole."""
    grid, files = found_grid(folder)
    config_file = folder / MODEL_CONFIG
    if not config_file.is_file():
        raise ConversionError(f"{config_file} is missing. InternEvo saves it beside the shards; copy it there too.")
    config, stamps = read_plain_dict(config_file), stamps_of(files.values())
    shards = [_Shard(stage, member, path, read_state_dict(path)) for (stage, member), path in files.items()]
    numbering = _numbering(shards)
    tensors: dict[str, list[StoredTensor | None]] = {}
    for shard in shards:
        for name, tensor in shard.parsed:
            whole_name = numbering.whole_name(name, shard.stage)
            members = tensors.setdefault(whole_name, [None] * len(grid.members))
            twin = members[shard.member]
            if twin is not None:
                raise ConversionError(
                    f"{shard.path}: tensor {shown(tensor.name)} is {shown(whole_name)} of the whole model, which "
                    f"{twin.path} holds too ({shown(twin.name)}). Shards of different runs seem to be mixed in "
                    f"{folder}."
                )
            members[shard.member] = tensor
    return TrainingCheckpoint(folder, config_file, stamps, grid, numbering, config, tensors)


@dataclass(frozen=True)
class _Shard:
    stage: int
    member: int
    path: Path
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def parsed(self) -> list[tuple[SavedName, StoredTensor]]:
        return list(self._parsed())

    def _parsed(self) -> Iterator[tuple[SavedName, StoredTensor]]:
        for name, tensor in self.tensors.items():
            found = parsed(name)
            if found is None:
                raise ConversionError(f"{self.path}: a tensor has the name {shown(name)}, which no model gives.")
            if not self._is_second_name(name):
                yield found, tensor

    def _is_second_name(self, name: str) -> bool:
        """Whether the tensor is there under `word_embeddings` too, at the same place of the file.

        ConversionError where that is another tensor: which one is the embedding cannot be told.
        """
        stem, _, kind = name.rpartition(".")
        twin = self.tensors.get(f"{stem}{WORD_EMBEDDINGS}.{kind}")
        if twin is not None and replace(twin, name=name) != self.tensors[name]:
            raise ConversionError(
                f"{self.path} holds the embedding twice, as {shown(name)} and as {shown(twin.name)}, each with bytes "
                "of its own. Keep one of them, or save both as one tensor."
            )
        return twin is not None

    def layers(self) -> dict[int, set[int]]:
        """The layer numbers that the shard has, by chunk."""
        layers: dict[int, set[int]] = {}
        for name, _ in self.parsed:
            of_chunk = layers.setdefault(name.chunk, set())
            if name.stem:
                of_chunk.add(name.layer)
        return layers


def _numbering(shards: Sequence[_Shard]) -> Numbering:
    """How the layers found are numbered; in a V where chunk 1 ends, with norm and head, in the first of the stages."""
    counts: dict[Place, int] = {}
    for shard in shards:
        for chunk, layers in shard.layers().items():
            count = len(layers)
            if layers != set(range(count)):
                absent = next(layer for layer in itertools.count() if layer not in layers)
                raise ConversionError(f"{shard.path} has layer {max(layers)} but no layer {absent}: it is incomplete.")
            if counts.setdefault((chunk, shard.stage), count) != count:
                raise ConversionError(
                    f"{shard.path} has {count} layers, another rank of pipeline stage {shard.stage} has "
                    f"{counts[chunk, shard.stage]}. Shards of different runs seem to be mixed."
                )
    ends = {(name.chunk, shard.stage) for shard in shards for name, _ in shard.parsed if name.rest in HEADS}
    v_shaped = (1, 0) in ends and max(stage for _, stage in counts) > 0
    return found_numbering(counts, v_shaped=v_shaped)


def verify_files(checkpoint: TrainingCheckpoint) -> None:
    """Reads every shard whole: its records' checksums, and its .md5 file where there is one."""
    for path in checkpoint.shards:
        check_records(path)
        for beside in (path.with_name(path.name + ".md5"), path.with_suffix(".md5")):
            if beside.is_file():
                _check_md5(path, beside)


def _check_md5(path: Path, beside: Path) -> None:
    import hashlib  # only here: it takes long to import

    with naming(beside):
        words = beside.read_text(encoding="utf-8", errors="replace").split()
    with naming(path), path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found not in (word.lower() for word in words):
        raise ConversionError(
            f"{path} has MD5 {found}, but {beside} says {shown(' '.join(words)[:80])}. Copy it again."
        )


# ---------------------------------------------------------------------------------------------------------- writing


def shard_writers(
    folder: Path,
    grid: Grid,
    specs: Mapping[tuple[int, int], Sequence[TensorSpec]],
    second_names: Mapping[str, str],
) -> dict[tuple[int, int], TorchFileWriter]:
    """The files of the grid, by (stage, number of the member), that are to hold `specs`.

    `second_names` gives further names of some of them, for the same bytes.
    """
    return {
        (stage, member): TorchFileWriter(
            folder / grid.name(grid.members[member], stage), specs[stage, member], second_names=second_names
        )
        for stage, member in grid.places()
    }


def write_model_config(folder: Path, config: Mapping[str, Any]) -> None:
    write_plain_dict(folder / MODEL_CONFIG, config)
