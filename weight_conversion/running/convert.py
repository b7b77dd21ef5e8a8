"""From an InternEvo checkpoint to a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import PROJECT, __version__
from ..errors import ConversionError, naming, shown
from ..files.casting import Array, Loss, narrows
from ..files.copying import Copier
from ..files.dtypes import BFLOAT16, FLOAT16, DType
from ..files.moves import Task
from ..files.safetensors_file import read_header
from ..files.stamps import check_unchanged
from ..files.views import TensorSpec
from ..folders.hf_folder import (
    CONFIG,
    GENERATION_CONFIG,
    WeightFiles,
    code_files,
    copy_code,
    plan_weights,
    read_json,
    write_index,
    write_json,
)
from ..folders.internevo_folder import MODEL_CONFIG, TrainingCheckpoint, read_checkpoint, verify_files
from ..folders.model_folder import HUGGING_FACE
from ..folders.sources import check_checkpoint
from ..mapping.family import Family
from ..mapping.form import Form, Rope, hold_biases
from ..mapping.hf_settings import hf_rope, training_settings
from ..mapping.matching import Match
from ..mapping.rules import ModelShape
from ..mapping.sizes import hf_shape, positive_number
from ..mapping.training_settings import DEFAULT_NORM_EPSILON, DEFAULT_ROPE_BASE
from ..tokenizer.prepared import TokenizerFacts, TokenizerFiles
from .meanwhile import Meanwhile
from .publishing import Publication
from .reporting import Reporter
from .understanding import Understood, check_replicas, understood

NORMALIZED, RAW = "normalized", "raw"


@dataclass(frozen=True)
class ConvertRequest:
    """What the user asked for; `dynamic_factor` is None without dynamic NTK scaling.

    `format` is the model_type of one of the family's forms, `config` the configuration of the Hugging Face class that
    training ran on, `norm_head` is NORMALIZED or RAW.
    """

    source: Path
    target: Path
    tokenizer: Path
    format: str
    dtype: DType
    max_shard: int
    max_position_embeddings: int
    dynamic_factor: float | None
    version: int | None = None
    config: Path | None = None
    norm_head: str | None = None
    chat: bool = False
    force: bool = False
    verify: bool = False


PADDED_TO = 1024
"""The largest number to a multiple of which a vocabulary is padded for its sake: 128 rows for each of 8 ranks."""


@dataclass(frozen=True)
class _Source(Understood):
    normalized: str | None
    """The head, where it is to be written with its rows normalised."""


def convert(
    family: Family,
    request: ConvertRequest,
    tokenizer: Meanwhile[TokenizerFacts, TokenizerFiles],
    reporter: Reporter,
) -> None:
    """Writes `request.target`; ConversionError, before anything is written, where the source cannot be converted."""
    publication = Publication(
        request.target, HUGGING_FACE, force=request.force, sources=(request.source,), warn=reporter.warn
    )
    form = family.forms[request.format]
    modules = [] if form.code is None else code_files(form.code, form.model_type)
    source = _understand(family, form, request, reporter)
    pieces = _checked_pieces(tokenizer, request, source.shape)
    if request.verify:
        verify_files(source.checkpoint)
    check_replicas(source)
    weights = plan_weights(publication.folder, _hf_specs(source, request.dtype), request.max_shard)
    publication.check_space(sum(writer.size for writer in weights.writers))
    config = _config(form, request, source)
    for warning in _warnings(form, request, source, pieces):
        reporter.warn(warning)
    with publication as folder, naming(folder):
        _write_weights(source, weights, request, reporter)
        copy_code(modules, folder)
        for warning in tokenizer.late().write(folder):
            reporter.warn(warning)
        write_json(folder / GENERATION_CONFIG, _generation_config(form, request.chat))
        if weights.index is not None:
            write_index(folder, weights.index)
        write_json(folder / CONFIG, config)
        check_unchanged(source.checkpoint.shards)
    reporter.summary(
        len(weights.tensors),
        sum(tensor.nbytes for tensor in weights.tensors.values()),
        request.target,
        verified=request.verify,
        rounded=_rounded(source, request.dtype),
    )


def _rounded(source: _Source, dtype: DType) -> str:
    """In words, from which types numbers were rounded; nothing where all are as they were."""
    found = {tensor.dtype for _, copies in source.parts for tensors in copies[0] for tensor in tensors}
    names = sorted(one.name for one in found if narrows(one, dtype))
    return f"rounded from {' and '.join(names)} to {dtype.name} (--dtype)" if names else ""


def _understand(family: Family, form: Form, request: ConvertRequest, reporter: Reporter) -> _Source:
    check_checkpoint(request.source)
    checkpoint = _with_true_settings(family, read_checkpoint(request.source), request, reporter)
    found = understood(family, form.table, checkpoint, request.version, reporter.warn)
    return _Source(**vars(found), normalized=form.head if _normalizes_head(checkpoint, request) else None)


def _with_true_settings(
    family: Family, checkpoint: TrainingCheckpoint, request: ConvertRequest, reporter: Reporter
) -> TrainingCheckpoint:
    """Of training on a Hugging Face class, whose settings model_config.pt does not hold, those of `request.config`."""
    if checkpoint.is_of_hf_class and request.config is None:
        raise ConversionError(
            f"{checkpoint.folder} was saved by training on a Hugging Face class, whose heads, epsilon and rotary base "
            f"{MODEL_CONFIG} does not hold. Pass --config with the config.json of the class as it was trained; a class "
            "that was built without arguments had its defaults, which its save_pretrained writes."
        )
    if request.config is None:
        return checkpoint
    if not checkpoint.is_of_hf_class:
        raise ConversionError(
            f"--config {request.config}: {checkpoint.folder} is of the framework's own model, whose settings are in "
            f"{MODEL_CONFIG}. Leave --config out."
        )
    where = request.config / CONFIG if request.config.is_dir() else request.config
    advice = "--config takes the config.json of the class that training ran on, or a folder with one."
    config = read_json(where, advice)
    has_bias = hold_biases(checkpoint.tensors)
    family.form_of(config, where).check(config, hf_shape(config, where), has_bias, where)
    settings = training_settings(config, where, reporter.warn)
    return checkpoint.of_hf_class(settings, where)


def _normalizes_head(checkpoint: TrainingCheckpoint, request: ConvertRequest) -> bool:
    """Whether the output weight is to be written with its rows normalised."""
    is_set = bool(checkpoint.config.get("norm_head", False))
    if request.norm_head is not None and not is_set:
        raise ConversionError(
            f"--norm_head {request.norm_head}: {checkpoint.config_file} does not set norm_head. Leave --norm_head out."
        )
    return is_set and request.norm_head != RAW


def _checked_pieces(
    tokenizer: Meanwhile[TokenizerFacts, TokenizerFiles], request: ConvertRequest, shape: ModelShape
) -> int:
    """The number of the tokenizer's pieces."""
    with naming(request.tokenizer):
        facts = tokenizer.early()
    if facts.vocab_size > shape.vocab_size:
        raise ConversionError(
            f"{request.tokenizer} has {facts.vocab_size} pieces, the model's vocabulary only {shape.vocab_size}. "
            "Pass the tokenizer that the model was trained with."
        )
    if facts.refusal is not None:
        raise ConversionError(facts.refusal)
    return facts.vocab_size


def _hf_specs(source: _Source, dtype: DType) -> list[TensorSpec]:
    named = [pair for entry, _ in source.parts for pair in zip(entry.hf, entry.hf_shapes, strict=True)]
    return [TensorSpec(name, shape, dtype) for name, shape in named]


def _warnings(form: Form, request: ConvertRequest, source: _Source, pieces: int) -> Iterator[str]:
    """What to say of a conversion that is right but may not be the one that was wanted."""
    training = source.checkpoint.config
    if source.shape.vocab_size - pieces >= PADDED_TO:
        yield (
            f"{request.tokenizer} has {pieces} pieces, the model's vocabulary {source.shape.vocab_size}: "
            "more rows are without a piece than padding adds. See that it is the tokenizer that the model was trained "
            "with."
        )
    if source.has_bias and form.bias_warning is not None:
        yield form.bias_warning
    if form.code is None and request.dynamic_factor is not None:
        yield (
            f"beyond {request.max_position_embeddings} tokens, dynamic NTK scaling of a Llama is that of this model "
            "for one sequence at a time in transformers, not while an InternLM model generates; vLLM's own classes and "
            "llama.cpp compute something else without an error."
        )
    if source.normalized is not None and request.norm_head is None:
        yield (
            "norm_head is set: the output weight is written with its rows normalised, as training uses it. InternEvo "
            "0.5.1 and 0.5.2 use it as it is: for a model that they trained, pass --norm_head raw."
        )
    if training.get("use_dynamic_ntk_rope") and request.dynamic_factor is None:
        yield "the model was trained with use_dynamic_ntk_rope; --rotary_type origin writes no scaling."
    trained_positions = training.get("max_position_embeddings", request.max_position_embeddings)
    if trained_positions != request.max_position_embeddings:
        yield (
            f"{source.checkpoint.config_file.name} says max_position_embeddings = {shown(trained_positions)}, the "
            f"folder gets {request.max_position_embeddings} from --max_pos."
        )
    if "." in request.target.name and form.code is not None:
        yield (
            f"the folder name {request.target.name!r} has a dot, with which some transformers versions cannot load "
            "remote code from a folder."
        )


def _write_weights(source: _Source, weights: WeightFiles, request: ConvertRequest, reporter: Reporter) -> None:
    tensors = weights.tensors
    tasks: list[Task] = [
        [
            replace(move, transform=_normalize_rows) if move.full.name == source.normalized else move
            for move in Match(entry, [tensors[name] for name in entry.hf], copies[:1]).moves(source.shape)
        ]
        for entry, copies in source.parts
    ]
    total = sum(tensor.nbytes for tensor in tensors.values())
    for writer in weights.writers:
        writer.create()
    with reporter.progress("converting", total) as progress:
        losses = Copier(progress).gather(tasks)
    _judge(losses, request, reporter)
    if request.verify:
        for writer in weights.writers:
            if read_header(writer.path) != writer.tensors:
                raise ConversionError(f"{writer.path} was not written as it was meant: the disk or memory failed.")
        with reporter.progress("verifying", total) as progress:
            for move in Copier(progress).differences(tasks):
                raise ConversionError(
                    f"{move.full.path}: tensor {shown(move.full.name)} was not written as it was read: the disk or "
                    "memory failed."
                )


def _judge(losses: Mapping[str, Loss], request: ConvertRequest, reporter: Reporter) -> None:
    """ConversionError where finite numbers became infinite; a warning where numbers became zero."""
    overflowed = {name: loss.overflowed for name, loss in losses.items() if loss.overflowed}
    if overflowed:
        named = [f"{shown(name)} ({count})" for name, count in sorted(overflowed.items())[:5]]
        more = f" and {len(overflowed) - 5} more" if len(overflowed) > 5 else ""
        raise ConversionError(
            f"{request.source}: {sum(overflowed.values())} numbers are too large for {request.dtype.name} and would "
            f"become infinite, in {len(overflowed)} tensors: {', '.join(named)}{more}. "
            f"{LARGER_TYPES.get(request.dtype, 'No type that can be written holds them.')}"
        )
    vanished = [loss.vanished for loss in losses.values() if loss.vanished]
    if vanished:
        reporter.warn(
            f"{sum(vanished)} numbers in {len(vanished)} tensors are too small for {request.dtype.name}: they are "
            "written as zero."
        )


LARGER_TYPES = {FLOAT16: "Choose --dtype bfloat16 or float32.", BFLOAT16: "Choose --dtype float32."}


def _normalize_rows(rows: Array) -> None:
    """Makes rows [n, H] of length 1, or leaves them zero: what a model trained with norm_head multiplies by."""
    lengths = np.sqrt(np.einsum("nh,nh->n", rows, rows, dtype=np.float64))
    np.divide(rows, np.maximum(lengths, 1e-12)[:, None], out=rows, casting="same_kind")


def _config(form: Form, request: ConvertRequest, source: _Source) -> dict[str, Any]:
    """config.json in the spelling that every consumer reads: legacy and current keys, nothing left to defaults."""
    shape, training = source.shape, source.checkpoint.config
    where = source.checkpoint.config_file
    rope = Rope(positive_number(training, "rope_base", where, DEFAULT_ROPE_BASE), request.dynamic_factor)
    dtype = request.dtype.name
    return {
        "architectures": [f"{form.name}ForCausalLM"],
        "bos_token_id": 1,
        "converted_by": f"{PROJECT} {__version__}",
        "dtype": dtype,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": request.max_position_embeddings,
        "model_type": form.model_type,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": 2,
        "rms_norm_eps": positive_number(training, "layer_norm_epsilon", where, DEFAULT_NORM_EPSILON),
        **hf_rope(rope),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        **form.config(shape, source.has_bias, rope),
    }


def _generation_config(form: Form, chat: bool) -> dict[str, Any]:
    return {"bos_token_id": 1, "eos_token_id": form.tokenizer.eos_token_ids(chat), "pad_token_id": 2}
