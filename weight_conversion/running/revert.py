"""From a Hugging Face folder, or from shards of another layout, to the shards that the InternEvo framework loads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConversionError, UndecidedError, listed, naming, shown
from ..files.copying import Copier
from ..files.moves import Move, Task
from ..files.plain_pickle import dumps
from ..files.stamps import Stamps, check_unchanged
from ..files.torch_file import TorchFileWriter, check_records, read_state_dict
from ..files.views import StoredTensor, TensorSpec, contiguous_strides
from ..folders.grid import ISP_2025_FILES, ISP_FILES, TENSOR_PARALLEL_FILES, Grid, grid_of
from ..folders.hf_folder import CONFIG, SAFETENSORS, TORCH, HFFolder, has_weights, read_folder, verify_files
from ..folders.internevo_folder import (
    MODEL_CONFIG,
    TrainingCheckpoint,
    read_checkpoint,
    shard_writers,
    write_model_config,
)
from ..folders.internevo_folder import verify_files as verify_checkpoint
from ..folders.model_folder import CHECKPOINT
from ..folders.numbering import Numbering, shared_out
from ..folders.sources import is_checkpoint
from ..mapping.choices import HALVES, HIDDEN_SPLIT, VOCABULARY_SPLIT, common_choices
from ..mapping.family import Family
from ..mapping.form import Form, hold_biases
from ..mapping.hf_settings import HF_NORM_EPSILON, hf_settings, rope_of
from ..mapping.matching import Match, copies_of, match_hf, part_shapes, part_specs
from ..mapping.rows import whole_embedding_name
from ..mapping.rules import ModelShape, divisors
from ..mapping.sizes import (
    INTERMEDIATE_MULTIPLE,
    builds_intermediate_size,
    hf_shape,
    mlp_ratio,
    positive_integer,
    positive_number,
)
from ..mapping.table import Entry, Layout
from .publishing import Publication
from .reporting import Reporter
from .understanding import Understood, check_replicas, understood


@dataclass(frozen=True)
class RevertRequest:
    """What the user asked for: above all, the run that is to load the shards. `wp_size` None: not an isp run."""

    source: Path
    target: Path
    tp_size: int
    pp_size: int = 1
    num_chunks: int = 1
    wp_size: int | None = None
    isp: int = 2024
    mlp_layer_fusion: bool = False
    version: int = 2
    embed_split: bool = False
    use_flash: bool = False
    safetensors: bool = False
    force: bool = False
    verify: bool = False

    @property
    def grid(self) -> Grid:
        """The files that the run loads; those of isp since 2025 do not depend on the tensor-parallel size."""
        if self.wp_size is None:
            return grid_of(TENSOR_PARALLEL_FILES, self.tp_size, 1, self.pp_size)
        if self.isp == 2025:
            return grid_of(ISP_2025_FILES, 1, self.wp_size, self.pp_size)
        return grid_of(ISP_FILES, self.tp_size, self.wp_size, self.pp_size)

    @property
    def hidden_split(self) -> bool:
        """Whether ranks share the columns of the embedding, as isp always does."""
        return self.embed_split or self.wp_size is not None


@dataclass(frozen=True)
class Run:
    """The training run that is to load the shards: which files, and which layers are in them."""

    grid: Grid
    numbering: Numbering


@dataclass(frozen=True)
class _Source:
    """What is to be reverted: its sizes, its settings, and the full tensors of every entry of the table.

    `config` has the settings in the words of config.json, `training` those of model_config.pt where there is one.
    Full tensors that lie in no file are in `gathered`, by name.
    """

    config: Mapping[str, Any]
    where: Path
    shape: ModelShape
    has_bias: bool
    fulls: Sequence[tuple[Entry, list[StoredTensor]]]
    stamps: Stamps
    verify_files: Callable[[], None]
    training: Mapping[str, Any] = field(default_factory=dict)
    gathered: Mapping[str, Move] = field(default_factory=dict)


def revert(family: Family, request: RevertRequest, reporter: Reporter) -> None:
    """Writes `request.target`; ConversionError, before anything is written, where the source cannot be reverted."""
    publication = Publication(
        request.target, CHECKPOINT, force=request.force, sources=(request.source,), warn=reporter.warn
    )
    source = _understand(family, request, reporter)
    run = _run(request, source.shape)
    if request.verify:
        source.verify_files()
    specs = _shard_specs(source, run)
    config = _training_config(family, request, source, reporter)
    by_place = shard_writers(publication.folder, run.grid, specs, _second_names(source, run))
    writers = list(by_place.values())
    publication.check_space(sum(writer.size for writer in writers))
    with publication as folder, naming(folder):
        _write_shards(_tasks(source, run, by_place), writers, request, reporter)
        write_model_config(folder, config)
        check_unchanged(source.stamps)
    tensors = [tensor for writer in writers for tensor in writer.tensors.values()]
    reporter.summary(len(tensors), sum(tensor.nbytes for tensor in tensors), request.target, verified=request.verify)


def _understand(family: Family, request: RevertRequest, reporter: Reporter) -> _Source:
    if is_checkpoint(request.source):
        return _understand_checkpoint(family, request, reporter)
    return _understand_folder(family, request, reporter)


def _understand_folder(family: Family, request: RevertRequest, reporter: Reporter) -> _Source:
    folder = _folder_of_weights(request, reporter)
    where = request.source / CONFIG
    form = family.form_of(folder.config, where)
    shape = hf_shape(folder.config, where)
    family.check_heads(shape, where)
    _check_sizes(request, shape, where)
    tensors = dict(folder.tensors)
    if folder.config.get("tie_word_embeddings") and form.embedding in tensors:
        tensors.setdefault(form.head, tensors[form.embedding])
    has_bias = hold_biases(tensors)
    form.check(folder.config, shape, has_bias, where)
    layout = _layout(family, request, has_bias, frozenset())
    fulls = match_hf(tensors, form.table, layout, shape, str(request.source))
    if folder.config.get("tie_word_embeddings"):
        _check_tied(form, tensors, where)
    return _Source(
        config=folder.config,
        where=where,
        shape=shape,
        has_bias=has_bias,
        fulls=fulls,
        stamps=folder.stamps,
        verify_files=lambda: verify_files(folder),
    )


def _folder_of_weights(request: RevertRequest, reporter: Reporter) -> HFFolder:
    """The folder with the weights of one format: .bin where there are such, unless safetensors are asked for."""
    weights = SAFETENSORS
    if not request.safetensors:
        weights = TORCH if has_weights(request.source, TORCH) else SAFETENSORS
    folder = read_folder(request.source, weights)
    if not request.safetensors:
        reporter.note(f"reading {weights.single.rpartition('.')[2]} weights of {request.source}")
    if folder.passed_over:
        reporter.warn(
            f"{request.source} also holds {listed(folder.passed_over)}, not read: a single file comes before an index, "
            "files of an index before others, and .bin before safetensors unless --safetensors is given (transformers "
            "takes safetensors first)."
        )
    return folder


def _check_tied(form: Form, tensors: Mapping[str, StoredTensor], where: Path) -> None:
    """ConversionError where the head is not the embedding to which config.json ties it."""
    head, embedding = tensors[form.head], tensors[form.embedding]
    if head is embedding:  # the folder has no head of its own
        return
    moves = [Move(head, ((head.view(), embedding.view()),))]
    if head.dtype != embedding.dtype or any(Copier(lambda _: None).differences([moves])):
        raise ConversionError(
            f"{where}: tie_word_embeddings is true, but tensor {shown(form.head)} in {head.path} is not "
            f"{shown(form.embedding)}. transformers 4 computes with the embedding in its place, 5 with the tensor: set "
            "tie_word_embeddings to false to keep the tensor, or take the tensor out."
        )


def _understand_checkpoint(family: Family, request: RevertRequest, reporter: Reporter) -> _Source:
    """A training checkpoint, by way of the tensors that converting it would give: they are gathered block by block."""
    if request.safetensors:
        raise ConversionError(
            f"--safetensors: {request.source} holds shards of training, no Hugging Face weights. Leave it out."
        )
    checkpoint = read_checkpoint(request.source)
    if checkpoint.is_of_hf_class:
        raise ConversionError(
            f"{request.source} was saved by training on a Hugging Face class. Convert it, with --config, and revert "
            "what that writes."
        )
    try:
        found = understood(family, family.table, checkpoint, None, reporter.warn)
    except UndecidedError as error:  # --version says what is to be written
        raise ConversionError(
            f"{request.source}: w1, w2 and w3 are square, so their shapes do not tell which is the up projection. "
            "Convert it with --version, and revert what that writes."
        ) from error
    _check_sizes(request, found.shape, checkpoint.config_file)
    check_replicas(found)
    gathered = _gathering_moves(found)
    tensors = {name: move.full for name, move in gathered.items()}
    layout = _layout(family, request, found.has_bias, found.layout)
    fulls = match_hf(tensors, family.table, layout, found.shape, str(request.source))
    return _Source(
        config=hf_settings(checkpoint.config, checkpoint.config_file),
        where=checkpoint.config_file,
        shape=found.shape,
        has_bias=found.has_bias,
        fulls=fulls,
        stamps=checkpoint.shards,
        verify_files=lambda: verify_checkpoint(checkpoint),
        training=_writable_settings(checkpoint),
        gathered=gathered,
    )


def _gathering_moves(found: Understood) -> dict[str, Move]:
    """By the name of each full tensor, which lies in no file, the move that gathers it."""
    moves: dict[str, Move] = {}
    for entry, copies in found.parts:
        named = zip(entry.hf, entry.hf_shapes, strict=True)
        dtype, folder = copies[0][0][0].dtype, found.checkpoint.folder
        fulls = [StoredTensor(name, folder, 0, dtype, sizes, contiguous_strides(sizes)) for name, sizes in named]
        moves |= {move.full.name: move for move in Match(entry, fulls, copies[:1]).moves(found.shape)}
    return moves


def _writable_settings(checkpoint: TrainingCheckpoint) -> dict[str, Any]:
    """The settings of model_config.pt; ConversionError where one cannot be written."""
    for key, value in checkpoint.config.items():
        try:
            dumps(value)
        except (TypeError, OverflowError) as error:
            raise ConversionError(
                f"{checkpoint.config_file}: {shown(key)} is {shown(value)}, which is no plain setting and cannot be "
                "written again."
            ) from error
    return checkpoint.config


def _check_sizes(request: RevertRequest, shape: ModelShape, where: Path) -> None:
    for flag, size in (("--tp_size", request.tp_size), ("--wp_size", request.wp_size or 1)):
        if size > shape.hidden_size:  # before as many ranks are counted
            raise ConversionError(
                f"{flag} {shown(size)} is larger than the hidden size of {where}, {shape.hidden_size}: so many ranks "
                f"can share neither its rows nor its {shape.num_kv_heads} key/value heads."
            )


def _layout(family: Family, request: RevertRequest, has_bias: bool, source: Layout) -> Layout:
    """The choices that the run makes, where `source` is the layout that training saved."""
    embedding = HIDDEN_SPLIT if request.hidden_split else VOCABULARY_SPLIT
    joined = request.mlp_layer_fusion
    common = common_choices(request.grid.names, embedding, HALVES, joined=joined, bias=has_bias)
    return family.layout_written(common, request.version, source)


def _run(request: RevertRequest, shape: ModelShape) -> Run:
    """The run of the sizes asked for; ConversionError where the framework would not build it."""
    if request.num_chunks > 1 and request.pp_size == 1:
        raise ConversionError(
            f"--num_chunks {request.num_chunks} is for a pipeline: with one stage InternEvo builds one chunk. Give "
            "--pp_size too, or leave --num_chunks out."
        )
    if request.mlp_layer_fusion and request.version == 1:
        raise ConversionError(
            "--mlp_layer_fusion is of InternEvo versions whose up projection is w3. Revert with --version 2."
        )
    if request.wp_size is not None and shape.num_kv_heads % request.tp_size:
        raise ConversionError(
            f"--tp_size {request.tp_size} does not divide the {shape.num_kv_heads} key/value heads, which isp deals "
            f"out over the tensor-parallel ranks. Choose one that does: {divisors(shape.num_kv_heads)}."
        )
    try:
        return Run(request.grid, shared_out(shape.num_layers, request.pp_size, request.num_chunks))
    except ValueError as error:
        chunks = f" in --num_chunks {request.num_chunks} chunks" if request.num_chunks > 1 else ""
        raise ConversionError(
            f"the model cannot be shared out over --pp_size {request.pp_size} stages{chunks}: {error}. Choose sizes "
            "that InternEvo can build."
        ) from error


def _second_names(source: _Source, run: Run) -> dict[str, str]:
    """Names as saved under which the same bytes are to be found once more: see whole_embedding_name."""
    names = {}
    for entry, _ in source.fulls:
        place = run.numbering.place_of(entry.layer)
        second = whole_embedding_name(entry, run.grid)
        if second is not None:
            (first,) = entry.training
            names[run.numbering.saved_name(first, place)] = run.numbering.saved_name(second, place)
    return names


def _shard_specs(source: _Source, run: Run) -> dict[tuple[int, int], list[TensorSpec]]:
    """The tensors of each file, by (stage, number of the member); ConversionError where the ranks cannot share them."""
    rows_of_vocabulary = (source.shape.vocab_size, source.shape.hidden_size)
    for entry, _ in source.fulls:
        if entry.layer == 0 and entry.hf_shapes[0] != rows_of_vocabulary:  # which is last, as it alone can be enlarged
            part_shapes(entry, run.grid, source.shape)
    specs: dict[tuple[int, int], list[TensorSpec]] = {place: [] for place in run.grid.places()}
    for entry, fulls in source.fulls:
        place = run.numbering.place_of(entry.layer)
        named = [
            replace(spec, name=run.numbering.saved_name(spec.name, place))
            for spec in part_specs(entry, fulls, run.grid, source.shape)
        ]
        for member in {member for copy in copies_of(entry.rule, run.grid) for member in copy}:
            specs[place[1], member] += named
    return specs


def _tasks(source: _Source, run: Run, writers: Mapping[tuple[int, int], TorchFileWriter]) -> list[Task]:
    tasks: list[Task] = []
    for entry, fulls in source.fulls:
        place = run.numbering.place_of(entry.layer)
        names = [run.numbering.saved_name(name, place) for name in entry.training]
        copies = [
            [[writers[place[1], member].tensors[name] for name in names] for member in copy]
            for copy in copies_of(entry.rule, run.grid)
        ]
        match = Match(entry, fulls, copies)
        if source.gathered:
            moves = match.moves(source.shape)
            tasks.append([replace(move, source=source.gathered[move.full.name]) for move in moves])
        else:
            tasks.append(match.moves_back(source.shape))
    return tasks


def _write_shards(
    tasks: Sequence[Task], writers: Sequence[TorchFileWriter], request: RevertRequest, reporter: Reporter
) -> None:
    total = sum(move.full.nbytes for task in tasks for move in task)
    for writer in writers:
        writer.create()
    with reporter.progress("reverting", total) as progress:
        checksums = Copier(progress).scatter(tasks)
    for writer in writers:
        writer.seal(checksums[writer.path])
    if request.verify:
        for writer in writers:
            check_records(writer.path)
            if read_state_dict(writer.path) != writer.content:
                raise ConversionError(f"{writer.path} was not written as it was meant: the disk or memory failed.")
        with reporter.progress("verifying", total) as progress:
            for move in Copier(progress).differences(tasks):
                part = move.full if move.back else move.pairs[0][1].tensor
                raise ConversionError(
                    f"{part.path}: tensor {shown(part.name)}, or that of another rank, was not written as it was read: "
                    "the disk or memory failed."
                )


def _training_config(family: Family, request: RevertRequest, source: _Source, reporter: Reporter) -> dict[str, Any]:
    """model_config.pt: the keys that the framework's builder of this family takes."""
    shape, config, where = source.shape, source.config, source.where
    rope = rope_of(config, where, reporter.warn)
    positions = positive_integer(config, "max_position_embeddings", where)
    _warn(request, source, reporter)
    multiple = _multiple(source, reporter)
    ratio = _mlp_ratio(source, multiple, reporter)
    built = {
        "num_chunks": request.num_chunks,
        "checkpoint": False,
        "dtype": source.fulls[0][1][0].dtype,
        "embed_split_hidden": request.hidden_split,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "embed_grad_scale": 1,
        "parallel_output": True,
        "num_attention_heads": shape.num_heads,
        "mlp_ratio": ratio,
        "norm_type": "rmsnorm",
        "apply_post_layer_norm": False,
        "layer_norm_epsilon": positive_number(config, "rms_norm_eps", where, HF_NORM_EPSILON),
        "rope_base": rope.theta,
        "use_flash_attn": request.use_flash,
        "qk_interleaved": False,
        "mlp_layer_fusion": request.mlp_layer_fusion,
        "multiple_of": multiple,
        **family.training_config(
            shape, {**config, "bias": source.has_bias, "max_position_embeddings": positions}, rope
        ),
    }
    if rope.dynamic_factor is not None and (rope.dynamic_factor != 1 or "use_dynamic_ntk_rope" not in built):
        reporter.warn(
            f"{MODEL_CONFIG} does not hold the factor {shown(rope.dynamic_factor)} of dynamic NTK, with which {where} "
            f"scales beyond {positions} tokens. Training up to there is not concerned; when you convert again, pass "
            f"--rotary_type dynamic --scaling_factor {shown(rope.dynamic_factor)}."
        )
    return {
        **built,
        **source.training,
        **{key: built[key] for key in DECIDED},
        **{key: value for key, value in _decided_if_said(source).items() if key in source.training},
        **({"use_flash_attn": True} if request.use_flash else {}),
    }


def _warn(request: RevertRequest, source: _Source, reporter: Reporter) -> None:
    if not request.hidden_split and request.tp_size > 1:
        reporter.warn(
            "the embedding is split along the vocabulary, which InternEvo of early 2024 builds with use_flash_attn "
            "only (--use_flash says so in model_config.pt). InternEvo 0.3.13, 0.4.9, 0.5.x and later split it along "
            "the hidden size always, and start from a RANDOM embedding: for them revert with --embed_split."
        )
    dtypes = {fulls[0].dtype for _, fulls in source.fulls}
    if len(dtypes) > 1:
        reporter.warn(f"the weights are of several types {sorted(map(str, dtypes))}; each is kept as it is.")


DECIDED = ("num_chunks", "embed_split_hidden", "qk_interleaved", "mlp_layer_fusion", "mlp_ratio", "multiple_of")
"""Settings that the run to load the shards decides, or that were corrected; the others stay as training had them."""


def _decided_if_said(source: _Source) -> dict[str, Any]:
    """What the shards written are, in settings that not every version has."""
    written = [name for entry, _ in source.fulls for name in entry.training]
    return {
        "adapt_hf": True,
        "enable_qkv_fusion": all(not name.endswith(".wq.weight") for name in written),
        "no_bias": not source.has_bias,
        "num_kv_attention_heads": source.shape.num_kv_heads,
        "vocab_parallel": False,
    }


def _multiple(source: _Source, reporter: Reporter) -> int:
    """What the framework is to round the intermediate size up to: as training had it, where that divides the size."""
    given = positive_integer(source.training, "multiple_of", source.where, INTERMEDIATE_MULTIPLE)
    size = source.shape.intermediate_size
    multiple = math.gcd(size, given)
    if multiple != given:
        reporter.warn(
            f"the intermediate size {size} is not a multiple of {given}, to which InternEvo rounds up: the training "
            f"configuration needs multiple_of = {multiple}, as model_config.pt has it. InternEvo of early 2024 and "
            f"before knows no such setting and builds {-(-size // INTERMEDIATE_MULTIPLE) * INTERMEDIATE_MULTIPLE}: it "
            "cannot load this model."
        )
    return multiple


def _mlp_ratio(source: _Source, multiple: int, reporter: Reporter) -> Any:
    """The ratio of the source where the framework builds its intermediate size from it, else one that does."""
    given = source.training.get("mlp_ratio")
    if builds_intermediate_size(source.shape, given, multiple):
        return given
    ratio = mlp_ratio(source.shape)
    if given is not None:
        reporter.warn(
            f"{source.where} says mlp_ratio = {shown(given)}, from which InternEvo would not build the intermediate "
            f"size {source.shape.intermediate_size} of the weights: {ratio} is written."
        )
    return ratio
