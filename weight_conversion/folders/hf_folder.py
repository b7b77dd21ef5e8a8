"""A Hugging Face folder: weights in one or several files, an index, config.json and the code of the model.

    config.json, generation_config.json      settings
    model.safetensors                        all tensors, or
    model-0000i-of-0000n.safetensors         some of them, and
    model.safetensors.index.json             {"metadata": {...}, "weight_map": {tensor: file}}
    configuration_*.py, modeling_*.py, ...   the model's code, which transformers loads with trust_remote_code

pytorch_model.bin, pytorch_model-*.bin and pytorch_model.bin.index.json are the same in the format of torch.save.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import LONGEST, ConversionError, listed, naming, shown
from ..files.safetensors_file import SafetensorsWriter, read_header
from ..files.stamps import Stamps, stamps_of
from ..files.torch_file import check_records, read_state_dict
from ..files.views import StoredTensor, TensorSpec

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class WeightFormat:
    """How the weight files of a folder are named and read."""

    single: str
    sharded: str
    read: Callable[[Path], dict[str, StoredTensor]]


SAFETENSORS = WeightFormat("model.safetensors", "model-*.safetensors", read_header)
TORCH = WeightFormat("pytorch_model.bin", "pytorch_model-*.bin", read_state_dict)
FORMATS = (SAFETENSORS, TORCH)
EXPLICIT_FILE = "transformers_weights"
"""The key of config.json by which transformers loads one named file instead of looking for one."""


@dataclass(frozen=True)
class HFFolder:
    """What a Hugging Face folder holds: raw config.json and, by name, where each tensor lies."""

    folder: Path
    format: WeightFormat
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    stamps: Stamps
    """Of the weight files, before they were read."""
    passed_over: tuple[str, ...] = ()
    """Weight files and indices that were not read, because others come first."""


def read_folder(folder: Path, weights: WeightFormat) -> HFFolder:
    """Finds the tensors, reading headers only; ConversionError where the folder is not whole."""
    config = read_json(folder / CONFIG)
    if config.get(EXPLICIT_FILE) is not None:
        raise ConversionError(
            f"{folder / CONFIG} has {EXPLICIT_FILE} = {shown(config[EXPLICIT_FILE])}, which makes transformers load "
            "that file: not supported. Save the model again with save_pretrained, or take the setting out."
        )
    weight_map, files = _weight_files(folder, weights)
    stamps = stamps_of(files)
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in weights.read(path).items():
            if name in tensors:
                raise ConversionError(
                    f"tensor {shown(name)} is in {tensors[name].path} and in {path}. Remove one of them."
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise ConversionError(
                f"{folder / file} lacks tensor {shown(name)}, which {weights.single}{INDEX_SUFFIX} puts there."
            )
    return HFFolder(folder, weights, config, tensors, stamps, _passed_over(folder, weights, weight_map, files))


def verify_files(folder: HFFolder) -> None:
    """Reads files that carry checksums whole (.bin) and checks them; safetensors carry none."""
    if folder.format is TORCH:
        for path in sorted({tensor.path for tensor in folder.tensors.values()}):
            check_records(path)


def has_weights(folder: Path, weights: WeightFormat) -> bool:
    """Whether the folder holds weight files of this format."""
    return os.path.lexists(folder / weights.single) or any(folder.glob(weights.sharded))


def _weight_files(folder: Path, weights: WeightFormat) -> tuple[dict[str, str], list[Path]]:
    """The index, empty where it is not used, and the files to read.

    In the order of transformers (`_get_resolved_checkpoint_files` in modeling_utils.py): the single file comes before
    an index that lies beside it, as after saving twice into one folder. Shards without an index are read as well.
    """
    single, index_file = folder / weights.single, folder / (weights.single + INDEX_SUFFIX)
    if os.path.lexists(single):
        return {}, [single]
    if os.path.lexists(index_file):
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ConversionError(f"{index_file} has no 'weight_map' of tensor names to file names.")
        files = [_inside(folder, name, index_file) for name in sorted(set(weight_map.values()))]
        return weight_map, files
    files = sorted(folder.glob(weights.sharded))
    if not files:
        raise ConversionError(
            f"{folder} holds neither {weights.single} nor {weights.sharded}. {_advice(folder, weights)}"
        )
    by_total = {found[0]: path.name for path in files if (found := re.search(r"-of-\d+", path.name))}
    if len(by_total) > 1:
        raise ConversionError(
            f"{folder} holds {listed(sorted(by_total.values()))} without an index: files of several saves. Remove "
            "those of all but one, or copy the index too."
        )
    return {}, files


def _advice(folder: Path, weights: WeightFormat) -> str:
    if weights is SAFETENSORS and has_weights(folder, TORCH):
        return f"It holds .bin files ({TORCH.single}): leave --safetensors out."
    return (
        f"It holds no .bin files ({TORCH.single}) either: copy the weights to its {CONFIG}, or fetch the folder again."
    )


def _passed_over(
    folder: Path, weights: WeightFormat, weight_map: Mapping[str, str], files: Sequence[Path]
) -> tuple[str, ...]:
    read = {path.name for path in files} | ({weights.single + INDEX_SUFFIX} if weight_map else set())
    kinds = [kind for pair in FORMATS for kind in (pair.single, pair.single + INDEX_SUFFIX, pair.sharded)]
    return tuple(sorted({path.name for kind in kinds for path in folder.glob(kind)} - read))


def _inside(folder: Path, name: str, index_file: Path) -> Path:
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise ConversionError(
            f"{index_file} names the file {shown(name)}, which is not a plain file name in its folder."
        )
    if not path.is_file():
        raise ConversionError(
            f"{index_file} names the file {shown(name)}, which is missing in its folder. Copy it, or fetch the folder "
            "again; if the index is left from an older save, remove it."
        )
    return path


def read_json(path: Path, advice: str = "Copy it there, or fetch the folder again.") -> dict[str, Any]:
    """A JSON object; ConversionError, with `advice` where the file is missing, or where it holds something else."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing. {advice}")
    try:
        with naming(path):
            content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON: {error!s:.{LONGEST}}.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class WeightFiles:
    """Safetensors files to be, and the index that goes with several of them."""

    writers: list[SafetensorsWriter]
    index: dict[str, Any] | None

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {name: tensor for writer in self.writers for name, tensor in writer.tensors.items()}


def plan_weights(folder: Path, specs: Sequence[TensorSpec], max_shard_size: int) -> WeightFiles:
    """Distributes the tensors over files as `save_pretrained(max_shard_size=...)` of transformers 5 does."""
    by_name = {spec.name: spec for spec in sorted(specs, key=lambda spec: natural_order(spec.name))}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    writers = [
        SafetensorsWriter(folder / file, [by_name[name] for name in names])
        for file, names in split.filename_to_tensors.items()
    ]
    if not split.is_sharded:
        return WeightFiles(writers, None)
    metadata = {"total_parameters": sum(spec.numel for spec in specs), **split.metadata}
    return WeightFiles(writers, {"metadata": metadata, "weight_map": split.tensor_to_filename})


def natural_order(name: str) -> list[tuple[str, int]]:
    """Sort key of tensor names: part by part between dots, numbers by value (transformers saves in this order)."""
    parts = [(part.rstrip("0123456789"), part) for part in name.split(".")]
    return [(text, int(part[len(text) :] or -1)) for text, part in parts]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with naming(path):
        path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    write_json(folder / (SAFETENSORS.single + INDEX_SUFFIX), index)


def code_files(package: Path, model_type: str) -> list[Path]:
    """The modules that a folder needs beside its weights; ConversionError where the installation lacks one."""
    needed = {f"{kind}_{model_type}.py" for kind in ("configuration", "modeling", "tokenization", "chat", "compat")}
    needed.add(f"tokenization_{model_type}_fast.py")
    modules = sorted(path for path in package.glob("*.py") if path.name != "__init__.py")
    missing = sorted(needed - {path.name for path in modules if path.is_file()})
    if missing:
        raise ConversionError(
            f"{package} lacks {', '.join(missing)}, which every converted folder needs. Install these scripts again, "
            "with the model's code."
        )
    return modules


def copy_code(modules: Iterable[Path], folder: Path) -> None:
    """Copies modules beside the weights, where transformers looks for them."""
    for module in modules:
        shutil.copyfile(module, folder / module.name)
