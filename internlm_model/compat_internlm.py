"""Every difference between transformers 4.57.6 and 5.24 that the InternLM model has to know."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.distributed import DistributedConfig
from transformers.generation.utils import GenerationMixin
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

VERSIONS = "This model code was tried on transformers 4.57.6 to 5.24.0; install one of these."

# Tensor-parallel style "columns, gathered again": renamed during 5.x; 4.57 and 5.0 know the second name only.
GATHERED_COLUMNS = "colwise_gather_output" if "colwise_gather_output" in ALL_PARALLEL_STYLES else "colwise_rep"

# Looked up here once: torch 2.6 to 2.11 cannot trace a look into a signature.
_MASK_PARAMETERS = frozenset(inspect.signature(create_causal_mask).parameters)
_UPDATE_TAKES_SLOTS = "cache_kwargs" in inspect.signature(Cache.update).parameters
# 4.57 and the first 5.x take the new slots, later ones their number.
_MASK_SIZES_TAKE_COUNT = "query_length" in inspect.signature(Cache.get_mask_sizes).parameters
_DISTRIBUTED_TAKES_PLAN = "tp_plan" in inspect.signature(DistributedConfig).parameters

# Embedding tables shared by rows of the vocabulary: from 5.17 on. Before, each process holds the whole table.
SHARED_EMBEDDING = "embedding_rowwise" if _DISTRIBUTED_TAKES_PLAN else None


def _cache_name() -> str:
    """What outputs call the cache: the name of their one field that holds one."""
    names = [field.name for field in dataclasses.fields(BaseModelOutputWithPast) if "Cache" in str(field.type)]
    if len(names) != 1:
        raise ImportError(
            f"transformers {transformers.__version__} has outputs with {len(names)} fields for a cache, not one. "
            f"{VERSIONS}"
        )
    return names[0]


# What this version calls the cache in outputs and in what generate() passes: past_key_values, from 5.24 on cache.
CACHE_NAME = _cache_name()


def in_our_words(forward: Callable) -> Callable:
    """A model's `forward`, called in the words of any transformers version.

    The cache is the argument that is one, whatever its name; `forward` gets it as `past_key_values`, and the output
    has it under the name that it came by, too. With `return_dict=False`, here or in the config, the output is a tuple.
    """

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        names = [name for name in kwargs if _is_cache(name, kwargs[name])]
        arguments = with_our_cache_name(kwargs)
        output = forward(self, *args, **arguments)
        for name in names:
            if name not in ("past_key_values", CACHE_NAME):
                output[name] = arguments["past_key_values"]
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    return wrapper


# generate() looks at this method's parameters.
prepares_inputs: Any = functools.wraps(GenerationMixin.prepare_inputs_for_generation)


def with_our_cache_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass with their cache as `past_key_values`.

    Raises:
        ValueError: there are two caches.
    """
    caches = {name: value for name, value in arguments.items() if _is_cache(name, value)}
    given = [cache for cache in caches.values() if cache is not None]
    if any(cache is not given[0] for cache in given):
        raise ValueError(f"Give one cache; {' and '.join(caches)} are different ones.")
    others = {name: value for name, value in arguments.items() if name not in caches}
    return {**others, "past_key_values": given[0]} if given else others


def _is_cache(name: str, value: Any) -> bool:
    """Whether an argument is the cache of a model's forward pass.

    That of continuous batching is no Cache: up to 5.23 it is for the attention backend, and called differently.
    """
    return isinstance(value, Cache) or name in ("past_key_values", CACHE_NAME)


def is_paged(cache: Any) -> bool:
    """Whether the cache is that of continuous batching, which holds many sequences and counts none of them."""
    return cache is not None and not isinstance(cache, Cache)


def backend_keeps_cache(backend_arguments: dict[str, Any]) -> bool:
    """Whether the attention backend puts keys and values into a cache: up to 5.23 that of continuous batching."""
    return is_paged(backend_arguments.get("cache"))


def update_cache(
    cache: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    layer_idx: int,
    slots: dict[str, torch.Tensor] | None,
    backend_arguments: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put new keys and values [B, k, T, d] into the cache, and get all [B, k, S, d].

    Args:
        slots: what `cache_slots` gave.
        backend_arguments: what the attention backend is called with; a paged cache reads and changes it.
    """
    return cache.update(key, value, layer_idx, backend_arguments if is_paged(cache) else slots)


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
        attention_mask: [B, past + T], 1 = real token; a prepared mask is returned as it is.
        position_ids: [B, T] where they may describe packed sequences, else None.
    """
    if is_prepared(attention_mask) or is_paged(past_key_values):
        return attention_mask
    arguments = {
        "config": config,
        "attention_mask": attention_mask,
        "cache" if "cache" in _MASK_PARAMETERS else "past_key_values": past_key_values,
        "position_ids": position_ids,
        # 4.57 and the first 5.x say input_embeds, later ones inputs_embeds.
        "inputs_embeds" if "inputs_embeds" in _MASK_PARAMETERS else "input_embeds": inputs_embeds,
    }
    if "cache_position" in _MASK_PARAMETERS:  # 4.57 and the first 5.x
        arguments["cache_position"] = _new_slots(past_key_values, inputs_embeds)
    return create_causal_mask(**arguments)


def is_prepared(attention_mask: Any) -> bool:
    """Whether a mask is what an attention backend takes, [B, 1, T, S] or a BlockMask, and not [B, past + T]."""
    return attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2)


def cache_slots(past_key_values: Cache | None, inputs_embeds: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """What `Cache.update` wants to know besides the new keys and values, None if nothing.

    A cache of fixed size is told which slots to fill by 4.57 and 5.0; later versions count them themselves.
    """
    if _UPDATE_TAKES_SLOTS and getattr(past_key_values, "is_compileable", False):
        return {"cache_position": _new_slots(past_key_values, inputs_embeds)}
    return None


def _new_slots(past_key_values: Cache | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Slots [T] of the new tokens, counted from the first token in the cache."""
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen


def attended_length(past_key_values: Cache, length: int) -> int:
    """Number S of slots that attention reads after `length` new tokens entered the cache."""
    new: Any = length if _MASK_SIZES_TAKE_COUNT else torch.arange(length)
    return past_key_values.get_mask_sizes(new, 0)[0]


def with_tensor_parallelism(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained`, with tensor parallelism asked for in the way of this version.

    5.17 and later want `tp_plan` and `tp_size` in a DistributedConfig, and are to stop taking them as they are.
    """
    wanted = {name: arguments[name] for name in ("tp_plan", "tp_size") if arguments.get(name) is not None}
    if not wanted or not _DISTRIBUTED_TAKES_PLAN or arguments.get("distributed_config") is not None:
        return arguments
    others = {name: value for name, value in arguments.items() if name not in ("tp_plan", "tp_size")}
    return {**others, "distributed_config": DistributedConfig(**wanted)}
