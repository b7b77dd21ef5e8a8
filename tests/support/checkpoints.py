"""Builds small InternEvo checkpoints with plain torch code, apart from everything that the converters know.

Each weight is drawn once in a neutral form (q, k, v, gate, up, ... of a layer), and written down twice: as the shards
that training saves and as the tensors of the Hugging Face model. Tests convert the one and compare with the other.

Shapes: H hidden size, I intermediate size, V vocabulary, hd rows of a head, g query heads per key/value head.
"""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `intermediate` as the framework can build it, a multiple of 256."""

    hidden: int = 32
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 256
    vocab: int = 320

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {"internlm": Shape(kv_heads=4), "internlm2": Shape()}


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint is to be. `family` is "internlm" or "internlm2"; the rest is how it was saved."""

    family: str
    shape: Shape
    tp: int = 1
    pp: int = 1
    chunks: int = 1
    wp: int | None = None
    """Weight-parallel size of an isp run; None: another mode."""
    isp_2025: bool = False
    """Files that name weight ranks only, over which the embedding and the head are cut too."""
    fused_mlp: bool = False
    """mlp_layer_fusion: gate and up are one weight in training."""
    v_shaped: bool = False
    """Pipeline mode ZBV, of 2 chunks: chunk 1 goes back from the last stage to the first."""
    hf_class: bool = False
    """Training ran on the Hugging Face class, so shards have its names."""
    whole: bool = False
    """With `hf_class`: every file holds all of the model."""
    dtype: torch.dtype = torch.float32
    bias: bool = False
    embedding: str = "hidden"
    """"hidden": columns [V, H/tp]; "vocabulary": rows [V/tp, H], named word_embeddings; "unnamed vocabulary": rows."""
    interleaved: bool = False
    fused: bool = True
    """internlm2: wqkv, or wq, wk and wv (enable_qkv_fusion=False)."""
    pieces: bool = False
    """internlm2: the rows of a rank's wqkv cut into three, under the names wq, wk and wv."""
    mlp_version: int = 2
    """internlm: 1 = up is w2 and down w3, 2 = up is w3 and down w2."""
    prefix: str = ""
    """"model." in old checkpoints; with several chunks every name has it anyway."""
    inv_freq: bool = False
    norm_head: bool = False
    llama_like: bool = False
    """internlm: the names that an older reverting script wrote (layers, wq wk wv, tok_embeddings, output)."""
    omit: tuple[str, ...] = ()
    """Keys that model_config.pt does not have."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys that model_config.pt has besides, or with other values."""
    seed: int = 0

    @property
    def stem(self) -> str:
        return "blocks" if self.family == "internlm" and not self.llama_like else "layers"


def build(folder: Path, family: str, **choices: Any) -> Tensors:
    """Writes the checkpoint Recipe(family, **choices) into `folder` and returns the model's Hugging Face tensors.

    The tensors are of the type saved, so that `.to(dtype)` of each is what a converter has to write; with `norm_head`
    the output weight is returned normalised, in float32.
    """
    choices.setdefault("shape", SHAPES[family])
    recipe = Recipe(family, **choices)
    model = _Model(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    for ranks in _files(recipe):
        state = OrderedDict(_shard(model, ranks))
        state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as state_dict() has it
        torch.save(state, folder / ranks.file)
    save_model_config(folder / "model_config.pt", model_config(recipe))
    return _hf_tensors(model)


@dataclass(frozen=True)
class _Ranks:
    """A file's ranks; `outer` = (rank, size) of the group over which the embedding and the head are cut."""

    file: str
    tp: int
    wp: int
    pp: int
    outer: tuple[int, int]


def _files(recipe: Recipe) -> list[_Ranks]:
    """Every file of the checkpoint: isp saves ranks r of a stage, r < max(tp, wp), as (r mod tp, r mod wp)."""
    tp, wp, stages = recipe.tp, recipe.wp, range(recipe.pp)
    if wp is None:
        return [_Ranks(f"model_tp{t}_pp{p}.pt", t, 0, p, (t, tp)) for p in stages for t in range(tp)]
    if recipe.isp_2025:
        return [_Ranks(f"model_wp{w}_pp{p}.pt", 0, w, p, (w, wp)) for p in stages for w in range(wp)]
    pairs = [(r % tp, r % wp) for r in range(max(tp, wp))]
    return [_Ranks(f"model_tp{t}_wp{w}_pp{p}.pt", t, w, p, (t, tp)) for p in stages for t, w in pairs]


class _Model:
    """Weights in neutral form: `layers[i]` by their role, and embedding, norm and head."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        shape, self._generator = recipe.shape, torch.Generator().manual_seed(recipe.seed)
        self.layers = [self._layer(shape) for _ in range(shape.layers)]
        self.embedding = self._random(shape.vocab, shape.hidden)
        self.norm = self._random(shape.hidden)
        self.head = self._random(shape.vocab, shape.hidden)

    def _random(self, *sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=self._generator).to(self.recipe.dtype)

    def _layer(self, shape: Shape) -> Tensors:
        kv_rows = shape.kv_heads * shape.head_dim
        sizes: dict[str, tuple[int, ...]] = {
            "q": (shape.hidden, shape.hidden),
            "k": (kv_rows, shape.hidden),
            "v": (kv_rows, shape.hidden),
            "o": (shape.hidden, shape.hidden),
            "gate": (shape.intermediate, shape.hidden),
            "up": (shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
            "attention_norm": (shape.hidden,),
            "mlp_norm": (shape.hidden,),
        }
        if self.recipe.bias:
            biases = {"q_bias": "q", "k_bias": "k", "v_bias": "v", "o_bias": "o"}
            sizes |= {bias: sizes[weight][:1] for bias, weight in biases.items()}
        return {role: self._random(*size) for role, size in sizes.items()}


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape) -> torch.Tensor:
    """q [kv * g * hd, ...], k and v [kv * hd, ...] as one tensor of groups: g query heads, their key, their value."""
    heads = [rows.unflatten(0, (-1, count, shape.head_dim)) for rows, count in ((q, _group(shape)), (k, 1), (v, 1))]
    return torch.cat(heads, dim=1).flatten(0, 2)  # [kv, g + 2, hd, ...] -> [kv * (g + 2) * hd, ...]


def _group(shape: Shape) -> int:
    return shape.heads // shape.kv_heads


def _interleaved(rows: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Heads whose rows stand in halves (x0 x1 .. y0 y1 ..) with their rows in pairs (x0 y0 x1 y1 ..)."""
    halves = rows.unflatten(0, (-1, 2, shape.head_dim // 2))  # [heads, 2, hd / 2, ...]
    return halves.transpose(1, 2).flatten(0, 2)


# ---------------------------------------------------------------------------------------------------- Hugging Face


def _hf_tensors(model: _Model) -> Tensors:
    internlm = model.recipe.family == "internlm"
    head = torch.nn.functional.normalize(model.head.double(), dim=-1).float() if model.recipe.norm_head else model.head
    tensors = {
        f"model.{'embed_tokens' if internlm else 'tok_embeddings'}.weight": model.embedding,
        "model.norm.weight": model.norm,
        f"{'lm_head' if internlm else 'output'}.weight": head,
    }
    for i, layer in enumerate(model.layers):
        named = _internlm_layer(layer) if internlm else _internlm2_layer(layer, model.recipe.shape)
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in named}
    return tensors


def _internlm_layer(layer: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    for x in "qkvo":
        yield f"self_attn.{x}_proj.weight", layer[x]
        if f"{x}_bias" in layer:
            yield f"self_attn.{x}_proj.bias", layer[f"{x}_bias"]
    for role in ("gate", "up", "down"):
        yield f"mlp.{role}_proj.weight", layer[role]
    yield "input_layernorm.weight", layer["attention_norm"]
    yield "post_attention_layernorm.weight", layer["mlp_norm"]


def _internlm2_layer(layer: Tensors, shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    yield "attention.wqkv.weight", _grouped(layer["q"], layer["k"], layer["v"], shape)
    yield "attention.wo.weight", layer["o"]
    if "q_bias" in layer:
        yield "attention.wqkv.bias", _grouped(layer["q_bias"], layer["k_bias"], layer["v_bias"], shape)
        yield "attention.wo.bias", layer["o_bias"]
    yield from (("feed_forward.w1.weight", layer["gate"]), ("feed_forward.w3.weight", layer["up"]))
    yield "feed_forward.w2.weight", layer["down"]
    yield from (("attention_norm.weight", layer["attention_norm"]), ("ffn_norm.weight", layer["mlp_norm"]))


# -------------------------------------------------------------------------------------------------------- training


def _shard(model: _Model, ranks: _Ranks) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and tensors of one file. Each is a copy of its own: a slice would be saved with all of its storage."""
    recipe = model.recipe
    for chunk in range(recipe.chunks):
        prefix = f"{chunk}.model." if recipe.chunks > 1 else recipe.prefix
        for name, tensor in _chunk(model, ranks, chunk):
            yield prefix + name, tensor.clone()


def _chunk(model: _Model, ranks: _Ranks, chunk: int) -> Iterator[tuple[str, torch.Tensor]]:
    recipe, (rank, size) = model.recipe, ranks.outer
    native = recipe.family == "internlm" and not recipe.llama_like
    if recipe.hf_class:
        yield from _hf_class_tensors(model, ranks)
        return
    if (chunk, ranks.pp) == (0, 0):
        stem = "embedding" if native else "tok_embeddings"
        middle = ".word_embeddings" if recipe.embedding == "vocabulary" else ""
        dim = 1 if recipe.embedding == "hidden" else 0
        yield f"{stem}{middle}.weight", model.embedding.chunk(size, dim)[rank]
    for local, layer in enumerate(_layers_of(recipe, ranks.pp, chunk)):
        for name, tensor in _rank_layer(recipe, model.layers[layer], ranks):
            yield f"{recipe.stem}.{local}.{name}", tensor
    last_stage = 0 if recipe.v_shaped else recipe.pp - 1
    if (chunk, ranks.pp) == (recipe.chunks - 1, last_stage):
        yield "norm.weight", model.norm
        yield f"{'head' if native else 'output'}.weight", model.head.chunk(size, 0)[rank]


def _hf_class_tensors(model: _Model, ranks: _Ranks) -> Iterator[tuple[str, torch.Tensor]]:
    """What training on the Hugging Face class saves; cut over weight ranks where its linear layers were replaced."""
    recipe, (rank, size) = model.recipe, ranks.outer
    for name, tensor in _hf_tensors(model).items():
        if "norm" in name or recipe.whole:
            yield name, tensor
        elif "embed" in name:
            yield name, tensor.chunk(size, 1)[rank]
        elif name in ("lm_head.weight", "output.weight"):
            yield name, tensor.chunk(size, 0)[rank]
        else:
            yield name, tensor.chunk(recipe.wp or 1, 0)[ranks.wp]


def _layers_of(recipe: Recipe, pp_rank: int, chunk: int) -> range:
    """The layers of a chunk of a stage: chunk by chunk, shared out over the stages, the last ones taking what is over.

    4 layers in 3 stages: 0 | 1 | 2 3
    """
    per_chunk = recipe.shape.layers // recipe.chunks
    size, over = divmod(per_chunk, recipe.pp)
    sizes = [size + (stage >= recipe.pp - over) for stage in range(recipe.pp)]
    place = recipe.pp - 1 - pp_rank if recipe.v_shaped and chunk == 1 else pp_rank
    start = chunk * per_chunk + sum(sizes[:place])
    return range(start, start + sizes[place])


def _rank_layer(recipe: Recipe, layer: Tensors, ranks: _Ranks) -> Iterator[tuple[str, torch.Tensor]]:
    isp, wp = recipe.wp is not None, recipe.wp or 1

    def part(role: str, dim: int = 0) -> torch.Tensor:
        """A rank's part; isp cuts the rows of every weight over the weight ranks."""
        return layer[role].chunk(wp, 0)[ranks.wp] if isp else layer[role].chunk(recipe.tp, dim)[ranks.tp]

    native = recipe.family == "internlm" and not recipe.llama_like
    attention, mlp = ("mixer", "mlp") if native else ("attention", "feed_forward")
    out = "out_proj" if native else "wo"
    up, down = ("w2", "w3") if recipe.family == "internlm" and recipe.mlp_version == 1 else ("w3", "w2")
    if recipe.inv_freq:
        yield f"{attention}.rotary_emb.inv_freq", 1e4 ** -torch.linspace(0, 1, recipe.shape.head_dim // 2)
    for kind, suffix in (("weight", ""), *([("bias", "_bias")] if recipe.bias else [])):
        q, k, v = (layer[f"{x}{suffix}"] if isp else part(f"{x}{suffix}") for x in "qkv")
        if recipe.interleaved:
            q, k = _interleaved(q, recipe.shape), _interleaved(k, recipe.shape)
        rows = [len(tensor) // wp for tensor in (q, k, v)]
        for name, tensor in _attention_inputs(recipe, q, k, v):
            own = tensor.chunk(wp, 0)[ranks.wp]
            if recipe.pieces and kind == "weight":
                yield from zip((f"{attention}.{x}.weight" for x in ("wq", "wk", "wv")), own.split(rows), strict=True)
            else:
                yield f"{attention}.{name}.{kind}", own
    yield f"{attention}.{out}.weight", part("o", 1)
    if recipe.bias and (isp or ranks.tp == 0):
        yield f"{attention}.{out}.bias", part("o_bias") if isp else layer["o_bias"]
    gate_part, up_part = part("gate"), part("up")
    if recipe.fused_mlp and isp:  # the halves of a chunk of both, whatever is in them
        gate_part, up_part = torch.cat([layer["gate"], layer["up"]]).chunk(wp, 0)[ranks.wp].chunk(2, 0)
    yield f"{mlp}.w1.weight", gate_part
    yield f"{mlp}.{up}.weight", up_part
    yield f"{mlp}.{down}.weight", part("down", 1)
    norms = ("norm1", "norm2") if native else ("attention_norm", "ffn_norm")
    yield f"{norms[0]}.weight", layer["attention_norm"]
    yield f"{norms[1]}.weight", layer["mlp_norm"]


def _attention_inputs(
    recipe: Recipe, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> list[tuple[str, torch.Tensor]]:
    """A rank's q, k and v under their names, in one tensor or three."""
    if recipe.llama_like or (recipe.family == "internlm2" and not recipe.fused):
        return [("wq", q), ("wk", k), ("wv", v)]
    if recipe.family == "internlm":
        return [("Wqkv", torch.cat([q, k, v]))]
    return [("wqkv", _grouped(q, k, v, recipe.shape))]


def model_config(recipe: Recipe) -> dict[str, Any]:
    """The settings that training saves, without `recipe.omit`."""
    shape = recipe.shape
    config: dict[str, Any] = {
        "num_chunks": recipe.chunks,
        "checkpoint": False,
        "dtype": recipe.dtype,
        "embed_split_hidden": recipe.embedding == "hidden",
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "vocab_size": shape.vocab,
        "embed_grad_scale": 1,
        "parallel_output": True,
        "num_attention_heads": shape.heads,
        "mlp_ratio": shape.intermediate / shape.hidden,
        "norm_type": "rmsnorm",
        "apply_post_layer_norm": False,
        "layer_norm_epsilon": 1e-5,
        "use_flash_attn": recipe.embedding == "vocabulary",
    }
    if recipe.family == "internlm2" or recipe.llama_like:
        config |= {
            "num_kv_attention_heads": shape.kv_heads,
            "no_bias": not recipe.bias,
            "adapt_hf": not recipe.interleaved,
            "norm_head": recipe.norm_head,
        }
    elif recipe.interleaved:
        config["qk_interleaved"] = True
    if recipe.pieces or not recipe.fused:
        config["enable_qkv_fusion"] = recipe.fused
    if recipe.fused_mlp:
        config["mlp_layer_fusion"] = True
    config |= recipe.config
    return {key: value for key, value in config.items() if key not in recipe.omit}


def save_model_config(path: Path, config: dict[str, Any]) -> None:
    """Saves settings as the training framework does: as an object of its class Config, a dict."""
    module_name = "internlm.core.context.parallel_context"
    config_class = type("Config", (dict,), {"__module__": module_name})
    parents = ["internlm", "internlm.core", "internlm.core.context", module_name]
    modules = {name: types.ModuleType(name) for name in parents}
    modules[module_name].Config = config_class  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, modules):
        torch.save(config_class(config), path)
