"""Writes a converted folder as a GGUF file for llama.cpp, from its raw files: config.json, weights, tokenizer.model.

InternLM2 goes under llama.cpp's own architecture of that name; InternLM, which has none, is a llama with attention
biases. Both are run there with a rotary embedding that turns neighbouring rows of a head, where the folder's turns
the two halves of a head, so the rows of q and k change places.

Shapes: H hidden size, h query heads, k key/value heads, g = h / k, d head dimension.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

from weight_conversion.tokenizer.sentencepiece_model import SentencePieceModel

ARCHITECTURES = {"internlm2": gguf.MODEL_ARCH.INTERNLM2, "internlm": gguf.MODEL_ARCH.LLAMA}

# GGUF strings end at a NUL byte; the piece that is one needs another name, which no text has.
NUL_PIECE = "<NUL>"


def write_gguf(folder: Path, file: Path) -> Path:
    """Write `folder` as `file` in float32 and return it.

    Raises:
        ValueError: the folder's rotary scaling is one that llama.cpp does not compute.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    _add_settings(writer, config)
    _add_tokenizer(writer, folder / "tokenizer.model", config["vocab_size"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in _tensors(load_file(folder / "model.safetensors"), config):
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert written is not None, f"llama.cpp has no tensor for {name}"
        writer.add_tensor(written, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    rope = config["rope_parameters"]
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] != "default":
        raise ValueError(f"llama.cpp has no rotary scaling of type {rope['rope_type']!r}; convert with origin.")


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, vocab_size: int) -> None:
    pieces = SentencePieceModel.read(model).pieces
    filling = range(len(pieces), vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    texts = [NUL_PIECE if piece.text == "\0" else piece.text for piece in pieces]
    writer.add_token_list(texts + [f"<filling {index}>" for index in filling])
    writer.add_token_scores([piece.score for piece in pieces] + [0.0 for _ in filling])
    # The kinds of pieces have the same numbers in both formats.
    writer.add_token_types([int(piece.kind) for piece in pieces] + [int(gguf.TokenType.UNUSED) for _ in filling])
    writer.add_add_space_prefix(False)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _tensors(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, tensor in weights.items():
        if ".attention.wqkv." in name:
            for part, rows in zip("qkv", _ungrouped(tensor, heads, kv_heads), strict=True):
                own = heads if part == "q" else kv_heads
                yield name.replace("wqkv", f"w{part}"), rows if part == "v" else _in_pairs(rows, own)
        elif ".self_attn.q_proj." in name or ".self_attn.k_proj." in name:
            yield name, _in_pairs(tensor, heads)
        else:
            yield name, tensor


def _ungrouped(wqkv: torch.Tensor, heads: int, kv_heads: int) -> list[torch.Tensor]:
    """q [h d, H], k [k d, H] and v [k d, H] from rows in groups of g query heads, their key and their value."""
    group = heads // kv_heads
    grouped = wqkv.unflatten(0, (kv_heads, group + 2, -1))  # [k, g + 2, d, H]
    return [part.flatten(0, 2) for part in grouped.split([group, 1, 1], dim=1)]


def _in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows x0 x1 .. y0 y1 .. of every head as x0 y0 x1 y1 ..; [heads d, ...] stays [heads d, ...]."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
