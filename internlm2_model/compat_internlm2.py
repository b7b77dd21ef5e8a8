"""What the InternLM2 model has to know of transformers, 4.57.6 to 5.24 each in its way, and of InternEvo's trainer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

VERSIONS = "This model code was tried on transformers 4.57.6 to 5.24.0; install one of these."


def _internal(module: str, name: str) -> Any:
    """A name of transformers that is its own affair, None where it is gone: docs/transformers-api.md."""
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name, None)
    except ImportError:
        return None


class _CheckpointedLayer(nn.Module):
    """A layer that PreTrainedModel can tell to run again in the backward pass instead of keeping its values."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(super().__call__, **kwargs)
        again = self.gradient_checkpointing and self.training
        return self._gradient_checkpointing_func(run, *args) if again else run(*args)


ACT2FN = _internal("activations", "ACT2FN")
ALL_PARALLEL_STYLES = _internal("integrations.tensor_parallel", "ALL_PARALLEL_STYLES") or ()
DistributedConfig = _internal("distributed", "DistributedConfig")
GradientCheckpointingLayer: Any = _internal("modeling_layers", "GradientCheckpointingLayer") or _CheckpointedLayer
create_causal_mask = _internal("masking_utils", "create_causal_mask")
create_masks_for_generate = _internal("masking_utils", "create_masks_for_generate")
ALL_ATTENTION_FUNCTIONS = _internal("modeling_utils", "ALL_ATTENTION_FUNCTIONS")
CAUSAL_MODELS = _internal("models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
if CAUSAL_MODELS is not None:
    # Trainer's label smoothing compares a logit with the next token for the classes named here, and with the token
    # itself, which teaches to repeat it, for any other.
    CAUSAL_MODELS.setdefault("internlm2", "InternLM2ForCausalLM")
if ALL_ATTENTION_FUNCTIONS is None:
    raise ImportError(f"transformers {transformers.__version__} has no table of attention functions. {VERSIONS}")


def parameters_of(function: Any) -> frozenset[str]:
    """Names of a function's parameters; none where there is no function. For use at import only.

    torch 2.6 to 2.11 cannot trace a look into a signature.
    """
    return frozenset(inspect.signature(function).parameters) if function is not None else frozenset()


def activation(name: str) -> Any:
    """The activation that a config calls `name`."""
    return ACT2FN[name] if ACT2FN is not None else getattr(nn.functional, name)


# Tensor-parallel style "columns, gathered again": renamed during 5.x; 4.57 and 5.0 know the second name only.
GATHERED_COLUMNS = "colwise_gather_output" if "colwise_gather_output" in ALL_PARALLEL_STYLES else "colwise_rep"

_MASK_PARAMETERS = parameters_of(create_causal_mask)
# 4.57 and the first 5.x say input_embeds; up to 5.23 the cache is past_key_values.
_MASK_EMBEDS = next((name for name in ("inputs_embeds", "input_embeds") if name in _MASK_PARAMETERS), None)
_MASK_CACHE = next((name for name in ("cache", "past_key_values") if name in _MASK_PARAMETERS), None)
_MASK_TAKES_SLOTS = "cache_position" in _MASK_PARAMETERS  # 4.57 and the first 5.x
_MASK_IS_KNOWN = bool(_MASK_EMBEDS and _MASK_CACHE and {"config", "attention_mask", "position_ids"} <= _MASK_PARAMETERS)
_UPDATE_TAKES_SLOTS = "cache_kwargs" in parameters_of(Cache.update)
_DISTRIBUTED_TAKES_PLAN = "tp_plan" in parameters_of(DistributedConfig)

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
    has it under the name that it came by, too. With `return_dict=False`, here or in the config, the output is a tuple,
    and so it is under InternEvo's trainer, which passes its elements to the loss and never a cache.
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
            is_training_step = self.is_in_internevo and arguments.get("past_key_values") is None
            return_dict = self.config.return_dict and not is_training_step
        return output if return_dict else output.to_tuple()

    # generate() looks at the parameters at every step, and finds them here without searching.
    wrapper.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
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


# Further arguments of a forward pass that are known, and who reads them.
KNOWN_ARGUMENTS = frozenset(
    {
        # FlashAttention, of packed sequences; `seq_idx` says the same to layers that are not attention
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
        "kernel_options",  # flex_attention
        *("num_items_in_batch", "shift_labels", "ignore_index"),  # the loss
        # generate() lets them through to here, having read them
        *("tokenizer", "assistant_tokenizer", "assistant_model"),
        "cache_position",  # in 4.57 and 5.0: `given_slots`
        # Nobody: what they say is known without them, or is about parts that these models lack.
        *("is_first_iteration", "token_type_ids", "output_router_logits"),
    }
)
KNOWN_BACKENDS = ("eager", "sdpa", "flex_attention")


def refuse_unknown(arguments: dict[str, Any], backend: str) -> None:
    """Raise TypeError for an argument that nobody reads: what it asks for would not be done.

    An attention backend that transformers does not bring (a serving engine's) may read any, and so may continuous
    batching, whose arguments come with its cache.
    """
    foreign = backend not in KNOWN_BACKENDS and "flash" not in backend and not backend.startswith("paged|")
    if foreign or backend_keeps_cache(arguments):
        return
    unknown = [name for name, value in arguments.items() if value is not None and name not in KNOWN_ARGUMENTS]
    if unknown:
        raise TypeError(
            f"The model does not know {', '.join(unknown)}. Left out without a word, it could change the result; "
            "remove it, or set it to None."
        )


def is_paged(cache: Any) -> bool:
    """Whether the cache is that of continuous batching, which holds many sequences and counts none of them."""
    return cache is not None and not isinstance(cache, Cache)


def backend_keeps_cache(backend_arguments: dict[str, Any]) -> bool:
    """Whether the attention backend puts keys and values into a cache: up to 5.23 that of continuous batching."""
    return is_paged(backend_arguments.get("cache"))


def config_of_pass(config: Any, past_key_values: Any, backend_arguments: dict[str, Any]) -> Any:
    """The config, without the "paged|" before its backend's name unless the pass has the cache of continuous batching.

    Up to 5.8, generate_batch leaves it there, and transformers makes no causal mask for such a backend.
    """
    paged = config._attn_implementation.startswith("paged|")
    if not paged or is_paged(past_key_values) or backend_keeps_cache(backend_arguments):
        return config
    config = copy.copy(config)
    config._attn_implementation = config._attn_implementation.removeprefix("paged|")
    return config


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
    slots: torch.Tensor | None,
) -> Any:
    """What the attention backend of `config` takes as a mask, or None where it needs none.

    Args:
        inputs_embeds: [B, T, H].
        attention_mask: [B, past + T], 1 = real token; a prepared mask is returned as it is.
        position_ids: [B, T] where they may describe packed sequences, else None.
        slots: what `given_slots` gave.
    """
    if is_prepared(attention_mask) or is_paged(past_key_values):
        return attention_mask
    if not _MASK_IS_KNOWN:
        return _own_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids, slots)
    arguments: dict[Any, Any] = {
        "config": config,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        _MASK_CACHE: past_key_values,
        _MASK_EMBEDS: inputs_embeds,
    }
    if _MASK_TAKES_SLOTS:
        arguments["cache_position"] = _new_slots(past_key_values, inputs_embeds, slots)
    return create_causal_mask(**arguments)


def mask_for_generate(arguments: dict[str, Any]) -> Any:
    """What generate() hands to a forward pass as its mask, with a cache of fixed size: called before every pass.

    One new token sees all that the mask [B, past + 1] shows, so that the mask is only widened to the S slots of the
    cache, [B, 1, 1, S] with True = attend. transformers' own way, for all kinds of masks, takes half of the time that
    generate() spends between two passes.

    Args:
        arguments: those of transformers' `create_masks_for_generate`, as this version calls it.
    """
    arguments = {**arguments, "config": config_of_pass(arguments["config"], None, {})}
    mask, slots = arguments.get("attention_mask"), _slots_of_one_token(arguments)
    if slots is not None and isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] <= slots:
        wide = mask.new_zeros((len(mask), 1, 1, slots), dtype=torch.bool)
        wide[:, 0, 0, : mask.shape[1]] = mask
        return wide
    return mask if create_masks_for_generate is None else create_masks_for_generate(**arguments)


def _slots_of_one_token(arguments: dict[str, Any]) -> int | None:
    """The number of a cache's slots where "eager" or "sdpa" reads all of them for one new token, else None."""
    embeds = arguments.get("inputs_embeds", arguments.get("input_embeds"))
    cache = next((value for value in arguments.values() if isinstance(value, Cache)), None)
    if embeds is None or cache is None or embeds.shape[1] != 1 or arguments.get("block_sequence_ids") is not None:
        return None
    if arguments["config"]._attn_implementation not in ("eager", "sdpa") or any(cache.is_sliding):
        return None
    return getattr(next(iter(cache.layers), None), "max_cache_len", None)


def _own_mask(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> torch.Tensor:
    """The mask [B, 1, T, S], True = attend, for "eager" and "sdpa", where create_causal_mask is gone or was changed."""
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"transformers {transformers.__version__} makes masks in a way that is not known here, and "
            f'attn_implementation={config._attn_implementation!r} needs its own. Use "eager" or "sdpa". {VERSIONS}'
        )
    device = inputs_embeds.device
    rows = _new_slots(past_key_values, inputs_embeds, slots)  # [T]
    fixed: Any = past_key_values if getattr(past_key_values, "is_compileable", False) else None
    size = int(rows[-1]) + 1 if fixed is None else fixed.layers[0].max_cache_len
    mask = (torch.arange(size, device=device) <= rows[:, None])[None, None]  # [1, 1, T, S]
    if attention_mask is not None:
        padding = attention_mask.to(device).bool()
        mask = mask & nn.functional.pad(padding, (0, size - padding.shape[1]))[:, None, None]
    elif position_ids is not None:
        number = nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0)).cumsum(-1)  # of a token's sequence
        mask = mask & (number[:, None, :, None] == number[:, None, None])
    return mask


def is_prepared(attention_mask: Any) -> bool:
    """Whether a mask is what an attention backend takes, [B, 1, T, S] or a BlockMask, and not [B, past + T]."""
    return attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2)


def slots_of(past_key_values: Any) -> int | None:
    """Number of slots of a cache of fixed size all of whose layers keep every token, else None."""
    if not getattr(past_key_values, "is_compileable", False) or any(past_key_values.is_sliding):
        return None
    return past_key_values.layers[0].max_cache_len


def given_slots(arguments: dict[str, Any]) -> torch.Tensor | None:
    """Slots [T] of the new tokens where generate() counts them, in 4.57 and 5.0.

    A cache of fixed size there takes a key of zeros, as a padding token can have, for a slot that is not filled.
    """
    return arguments.get("cache_position") if _UPDATE_TAKES_SLOTS else None


def cache_slots(
    past_key_values: Cache | None, inputs_embeds: torch.Tensor, slots: torch.Tensor | None
) -> dict[str, torch.Tensor] | None:
    """What `Cache.update` wants to know besides the new keys and values, None if nothing.

    A cache of fixed size is told which slots to fill by 4.57 and 5.0; later versions count them themselves.
    """
    if _UPDATE_TAKES_SLOTS and getattr(past_key_values, "is_compileable", False):
        return {"cache_position": _new_slots(past_key_values, inputs_embeds, slots)}
    return None


def _new_slots(past_key_values: Cache | None, inputs_embeds: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    """Slots [T] of the new tokens, counted from the first token in the cache unless they are given."""
    if slots is not None:
        return slots
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen


def with_tensor_parallelism(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained`, with tensor parallelism asked for in the way of this version.

    5.17 and later want `tp_plan` and `tp_size` in a DistributedConfig, and are to stop taking them as they are.
    """
    wanted = {name: arguments[name] for name in ("tp_plan", "tp_size") if arguments.get(name) is not None}
    if not wanted or not _DISTRIBUTED_TAKES_PLAN or arguments.get("distributed_config") is not None:
        return arguments
    others = {name: value for name, value in arguments.items() if name not in ("tp_plan", "tp_size")}
    return {**others, "distributed_config": DistributedConfig(**wanted)}


# ------------------------------------------------------------------------------------------ InternEvo's trainer

INTERNEVO_NAMES = (
    "global_context",
    "ParallelMode",
    "IS_REPLICA_ZERO_PARALLEL",
    "IS_TENSOR_DATA_PARALLEL",
    "IS_TENSOR_ZERO_PARALLEL",
)


def internevo() -> Any:
    """InternEvo's module `internlm.core.context` where its trainer was started in this process, else None.

    It is looked up among what is imported already: these models import nothing of the framework. Another package of
    that name is none, nor is a version of the framework that knows no marks, whose trainer asks for none.
    """
    module = sys.modules.get("internlm.core.context")
    if module is None or not all(hasattr(module, name) for name in INTERNEVO_NAMES):
        return None
    context = module.global_context
    started = getattr(context, "config", None) is not None and context.is_initialized(module.ParallelMode.TENSOR)
    return module if started else None


def mark_for_internevo(model: nn.Module) -> bool:
    """Mark the parameters as the trainer asks, which refuses a model with one that has no mark; whether it is there.

    A mark says over which ranks the trainer sums gradients and their norm. These models are whole on every rank.
    """
    framework = internevo()
    if framework is None:
        return False
    tensor = framework.global_context.config.parallel.get("tensor")
    if isinstance(tensor, dict) and tensor.get("mode") == "isp":
        mark = framework.IS_TENSOR_DATA_PARALLEL
    elif framework.global_context.get_world_size(framework.ParallelMode.TENSOR) > 1:
        mark = framework.IS_REPLICA_ZERO_PARALLEL  # else each tensor-parallel rank would add to the norm
    else:
        mark = framework.IS_TENSOR_ZERO_PARALLEL
    for parameter in model.parameters():
        setattr(parameter, mark, True)
    return True
