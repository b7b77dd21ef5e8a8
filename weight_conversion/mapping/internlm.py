"""InternLM: INTERNLM in the training framework, InternLMForCausalLM in Hugging Face folders.

Two generations of MLP names (the tensors are the same): version 1, before February 2024, calls the up projection w2
and the down projection w3; version 2 calls up w3 and down w2. Llama-like names (`layers.*`, wq wk wv, no biases) are
what an older reverting script wrote. Training on the Hugging Face class saves that class's own names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConversionError, UndecidedError, shown
from ..folders.internevo_folder import TrainingCheckpoint
from ..tokenizer.specs import INTERNLM_TOKENIZER
from .choices import BIAS, COMMON_CHOICES, choices_found
from .family import Family
from .form import Rope
from .llama import DOWN, EMBEDDING, GATE, HEAD, INPUT_NORM, MLP_NORM, NORM, OUT, QKV, UP
from .rows import (
    NARROW,
    RECOMPUTED,
    WIDE,
    Names,
    attention_rows,
    embedding_rows,
    gate_up_rows,
    head_rows,
    linear_rows,
    norm_row,
    output_bias_rows,
)
from .rules import ModelShape, Separate, Stacked
from .table import Layout, Row, Table

NATIVE, LLAMA_LIKE, HF_NAMES = "native names", "Llama-like names", "Hugging Face names"
VERSION_1, VERSION_2 = "up is w2, down is w3", "up is w3, down is w2"

BLOCK, LAYER = "blocks.{layer}", "layers.{layer}"
ONE = (Stacked(), [f"{BLOCK}.mixer.Wqkv"])
THREE = (Separate(), [f"{LAYER}.attention.w{x}" for x in "qkv"])
OWN_THREE = (Separate(), [f"{LAYER}.self_attn.{x}_proj" for x in "qkv"])
OUT_DIMS = "hidden_size q_rows"


def _as(name: str, hf: str) -> Names:
    """A tensor that is called `hf` in the family's own folder too: its names are Llama's."""
    return name, hf, hf


def _own(hf: str) -> Names:
    """A tensor that has its Hugging Face name in training too, without the prefix."""
    return _as(hf.removeprefix("model."), hf)


def _mlp_rows(stem: str, names: str) -> list[Row]:
    """Gate, up and down projection of `stem`, under the names of both versions; the first never fused them."""
    w1, w2, w3 = (f"{stem}.{w}.weight" for w in ("w1", "w2", "w3"))
    return [
        *linear_rows(_as(w1, GATE), WIDE, 0, names, VERSION_1),
        *linear_rows(_as(w2, UP), WIDE, 0, names, VERSION_1),
        *linear_rows(_as(w3, DOWN), NARROW, 1, names, VERSION_1),
        *gate_up_rows(_as(w1, GATE), _as(w3, UP), names, VERSION_2),
        *linear_rows(_as(w2, DOWN), NARROW, 1, names, VERSION_2),
    ]


# fmt: off
TABLE = Table(
    rows=(
        *embedding_rows("embedding", EMBEDDING, NATIVE),
        *embedding_rows("tok_embeddings", EMBEDDING, LLAMA_LIKE),
        *embedding_rows("embed_tokens", EMBEDDING, HF_NAMES),
        *attention_rows(ONE, QKV, "weight", NATIVE),
        *attention_rows(ONE, QKV, "bias", NATIVE, BIAS),
        *attention_rows(THREE, QKV, "weight", LLAMA_LIKE),
        *attention_rows(OWN_THREE, QKV, "weight", HF_NAMES),
        *attention_rows(OWN_THREE, QKV, "bias", HF_NAMES, BIAS),
        *linear_rows(_as(f"{BLOCK}.mixer.out_proj.weight", f"{OUT}.weight"), OUT_DIMS, 1, NATIVE),
        *output_bias_rows(_as(f"{BLOCK}.mixer.out_proj.bias", f"{OUT}.bias"), NATIVE),
        *linear_rows(_as(f"{LAYER}.attention.wo.weight", f"{OUT}.weight"), OUT_DIMS, 1, LLAMA_LIKE),
        *linear_rows(_own(f"{OUT}.weight"), OUT_DIMS, 1, HF_NAMES),
        *output_bias_rows(_own(f"{OUT}.bias"), HF_NAMES),
        *_mlp_rows(f"{BLOCK}.mlp", NATIVE),
        *_mlp_rows(f"{LAYER}.feed_forward", LLAMA_LIKE),
        *gate_up_rows(_own(GATE), _own(UP), HF_NAMES),
        *linear_rows(_own(DOWN), NARROW, 1, HF_NAMES),
        norm_row(_as(f"{BLOCK}.norm1.weight", INPUT_NORM), NATIVE),
        norm_row(_as(f"{LAYER}.attention_norm.weight", INPUT_NORM), LLAMA_LIKE),
        norm_row(_as(f"{BLOCK}.norm2.weight", MLP_NORM), NATIVE),
        norm_row(_as(f"{LAYER}.ffn_norm.weight", MLP_NORM), LLAMA_LIKE),
        norm_row(_own(INPUT_NORM), HF_NAMES),
        norm_row(_own(MLP_NORM), HF_NAMES),
        norm_row(_as("norm.weight", NORM)),
        *head_rows(_as("head.weight", HEAD), NATIVE),
        *head_rows(_as("output.weight", HEAD), LLAMA_LIKE),
        *head_rows(_own(HEAD), HF_NAMES),
    ),
    choices=((NATIVE, LLAMA_LIKE, HF_NAMES), (VERSION_1, VERSION_2), *COMMON_CHOICES),
    ignored=RECOMPUTED,
)
# fmt: on


@dataclass(frozen=True)
class _Names:
    """A generation of names: the stems of its embedding and of the first MLP, and what may have biases."""

    choice: str
    embedding: str
    mlp: str
    biased: tuple[str, ...] = ()


KNOWN_NAMES = (
    _Names(HF_NAMES, "embed_tokens", "layers.0.mlp", ("layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj")),
    _Names(LLAMA_LIKE, "tok_embeddings", "layers.0.feed_forward"),
    _Names(NATIVE, "embedding", "blocks.0.mlp", ("blocks.0.mixer.Wqkv", "blocks.0.mixer.out_proj")),
)


def _layout_found(checkpoint: TrainingCheckpoint, version: int | None, warn: Callable[[str], None]) -> Layout:
    def holds(names: _Names) -> bool:
        return any(tensor.startswith(f"{names.mlp}.") for tensor in checkpoint.tensors)

    names = next(filter(holds, KNOWN_NAMES), KNOWN_NAMES[-1])
    bias = any(f"{stem}.bias" in checkpoint.tensors for stem in names.biased)
    found = 2 if names.choice == HF_NAMES else _mlp_version(checkpoint, names.mlp, version)
    return choices_found(checkpoint, names.embedding, bias=bias) | {
        names.choice,
        VERSION_1 if found == 1 else VERSION_2,
    }


def _mlp_version(checkpoint: TrainingCheckpoint, mlp: str, version: int | None) -> int:
    """1 where w2 has the shape of an up projection, 2 where it has that of a down one, else what the user says."""
    w1, w2 = checkpoint.first(f"{mlp}.w1.weight"), checkpoint.first(f"{mlp}.w2.weight")
    if w1 is None or w2 is None:
        raise ConversionError(f"{checkpoint.folder} lacks {mlp}.w1.weight or w2.weight: no InternLM checkpoint.")
    if w1.shape == _down_shape(checkpoint, w1.shape):
        if version is None:
            raise UndecidedError(
                f"{w1.path}: w1, w2 and w3 are square ({shown(list(w1.shape))}), so their shapes do not tell which is "
                "the up projection. Say --version 1 (trained before February 2024: up is w2) or --version 2 (up is w3)."
            )
        return version
    found = 1 if w2.shape == w1.shape else 2
    if version not in (None, found):
        raise ConversionError(f"{w2.path}: the shapes of w1 and w2 are those of --version {found}, not {version}.")
    return found


def _down_shape(checkpoint: TrainingCheckpoint, gate: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a rank's down projection has beside a gate of this shape: [I/T, H] -> [H, I/T]; of isp [H/W, I].

    A gate of other than two dimensions is found to be wrong later.
    """
    if len(gate) != 2 or not checkpoint.grid.names.is_isp:
        return gate[::-1]
    wp_size = checkpoint.grid.wp_size
    return (gate[1] // wp_size, gate[0] * wp_size)


def _layout_written(common: Layout, version: int, source: Layout) -> Layout:
    return common | {NATIVE, VERSION_1 if version == 1 else VERSION_2}


def _hf_config(rope: Rope) -> dict[str, Any]:
    if rope.dynamic_factor is None:
        return {"rotary": {"base": rope.theta, "type": "origin"}}
    factor = {} if rope.dynamic_factor == 1 else {"scaling_factor": rope.dynamic_factor}  # published without
    return {"rotary": {"base": rope.theta, "type": "dynamic", **factor}}


def _training_config(shape: ModelShape, config: Mapping[str, Any], rope: Rope) -> dict[str, Any]:
    return {}


INTERNLM = Family(
    name="InternLM",
    model_type="internlm",
    package="internlm_model",
    table=TABLE,
    embedding=EMBEDDING,
    head=HEAD,
    tokenizer=INTERNLM_TOKENIZER,
    layout_found=_layout_found,
    layout_written=_layout_written,
    hf_config=_hf_config,
    training_config=_training_config,
    shares_kv_heads=False,
)
