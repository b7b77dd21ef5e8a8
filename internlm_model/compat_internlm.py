"""Every difference between transformers 4.57.6 and 5.23 that the InternLM model has to know."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.distributed import DistributedConfig
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.masking_utils import create_causal_mask

# Tensor-parallel style "columns, gathered again": renamed during 5.x; 4.57 and 5.0 know the second name only.
GATHERED_COLUMNS = "colwise_gather_output" if "colwise_gather_output" in ALL_PARALLEL_STYLES else "colwise_rep"

_UPDATE_PARAMETERS = inspect.signature(Cache.update).parameters
_MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters
_DISTRIBUTED_PARAMETERS = inspect.signature(DistributedConfig).parameters

# Embedding tables shared by rows of the vocabulary: from 5.17 on. Before, each process holds the whole table.
SHARED_EMBEDDING = "embedding_rowwise" if "tp_plan" in _DISTRIBUTED_PARAMETERS else None


def causal_mask(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
) -> Any:
    """What the attention backend of `config` takes as a mask, or None where it needs none.

    Args:
        inputs_embeds: [B, T, H].
        attention_mask: [B, past + T], 1 = real token; a 4-D mask is returned as it is.
        position_ids: [B, T] where they may describe packed sequences, else None.
    """
    arguments = {
        "config": config,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        # 4.57 and the first 5.x say input_embeds, later ones inputs_embeds.
        "inputs_embeds" if "inputs_embeds" in _MASK_PARAMETERS else "input_embeds": inputs_embeds,
    }
    if "cache_position" in _MASK_PARAMETERS:  # 4.57 and the first 5.x
        arguments["cache_position"] = _new_slots(past_key_values, inputs_embeds)
    return create_causal_mask(**arguments)


def cache_slots(past_key_values: Cache | None, inputs_embeds: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """What `Cache.update` wants to know besides the new keys and values, None if nothing.

    A cache of fixed size is told which slots to fill by 4.57 and 5.0; later versions count them themselves.
    """
    if "cache_kwargs" in _UPDATE_PARAMETERS and getattr(past_key_values, "is_compileable", False):
        return {"cache_position": _new_slots(past_key_values, inputs_embeds)}
    return None


def _new_slots(past_key_values: Cache | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Slots [T] of the new tokens, counted from the first token in the cache."""
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen


def attended_length(past_key_values: Cache, length: int) -> int:
    """Number S of slots that attention reads after `length` new tokens entered the cache."""
    # 4.57 and the first 5.x take the new slots, later ones their number.
    counts = "query_length" in inspect.signature(past_key_values.get_mask_sizes).parameters
    new: Any = length if counts else torch.arange(length)
    return past_key_values.get_mask_sizes(new, 0)[0]


def with_tensor_parallelism(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained`, with tensor parallelism asked for in the way of this version.

    5.17 and later want `tp_plan` and `tp_size` in a DistributedConfig, and are to stop taking them as they are.
    """
    wanted = {name: arguments[name] for name in ("tp_plan", "tp_size") if arguments.get(name) is not None}
    if not wanted or "tp_plan" not in _DISTRIBUTED_PARAMETERS or arguments.get("distributed_config") is not None:
        return arguments
    others = {name: value for name, value in arguments.items() if name not in ("tp_plan", "tp_size")}
    return {**others, "distributed_config": DistributedConfig(**wanted)}
