"""InternLM2 in plain PyTorch, for transformers 4.57 to 5.x.

Shapes: B batch, T new tokens, S tokens attended to (cached and new), H hidden size, h query heads,
k key/value heads, g = h / k query heads per key/value head, d = H / h head dimension, I intermediate size,
V vocabulary.

One product gives queries, keys and values. The rows of `wqkv` are grouped by key/value head, each group
holding its g query heads, then its key, then its value:

    wqkv rows   [q q .. q k v] [q q .. q k v] ... k times, each letter d rows

so its output is viewed as [B, T, k, g + 2, d], and the first g + 1 of every group are rotated together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel

from .chat_internlm2 import ChatMixin
from .compat_internlm2 import (
    ALL_ATTENTION_FUNCTIONS,
    CACHE_NAME,
    GATHERED_COLUMNS,
    SHARED_EMBEDDING,
    GradientCheckpointingLayer,
    activation,
    backend_keeps_cache,
    cache_slots,
    causal_mask,
    config_of_pass,
    given_slots,
    in_our_words,
    is_paged,
    is_prepared,
    mark_for_internevo,
    mask_for_generate,
    prepares_inputs,
    refuse_unknown,
    slots_of,
    update_cache,
    with_our_cache_name,
    with_tensor_parallelism,
)
from .configuration_internlm2 import InternLM2Config

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor]

SUMMED_AT_ONCE = 1024  # terms of a sum that Inductor's kernels read at once


class InternLM2RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps  # the published name, which those who replace norms read

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class InternLM2RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., 2021), computed from the positions at every forward pass.

    It holds no tables: a pass depends on its own input alone. Of the scaling types, "origin" is none,
    "linear" divides positions by the factor, and "dynamic" (NTK-aware) raises the base with the length L of
    a sequence beyond max_position_embeddings M:

        base' = base * (factor * L / M - (factor - 1)) ** (d / (d - 2))

    Up to M the bracket is at most 1 and clamped there, which keeps the base without a branch on data.
    """

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.config = config  # read at every pass: the setting may be edited
        self.head_dim = config.hidden_size // config.num_attention_heads

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype) -> PositionEmbeddings:
        """
        Args:
            position_ids: [B, T].
            lengths: length of the sequence a token belongs to, [B, T], or [B, 1] with one sequence a row.
            dtype: of the result; the computation is in float32.

        Returns:
            cos and sin, [B, T, 1, 1, d]; the first half of sin is negative, as `rotate` wants it.
        """
        theta, scaling, factor = self.config.rope()
        positions = position_ids.float()
        base: float | torch.Tensor = theta
        if scaling == "linear":
            positions = positions / factor
        elif scaling == "dynamic":
            stretch = factor * lengths.float() / self.config.max_position_embeddings - (factor - 1)
            base = theta * stretch.clamp(min=1).unsqueeze(-1) ** (self.head_dim / (self.head_dim - 2))  # [B, T | 1, 1]
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        angles = positions.unsqueeze(-1) * (1.0 / base**exponents)  # [B, T, d / 2]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1)[:, :, None, None], torch.cat((-sin, sin), -1)[:, :, None, None]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x1[i], x2[i]) of the two halves of every head: (x1 cos - x2 sin, x2 cos + x1 sin).

    Three kernels: the halves swapped, one product, one fused multiply-add with the sign kept in `sin`.
    """
    first, second = states.chunk(2, dim=-1)
    return torch.addcmul(states * cos, torch.cat((second, first), dim=-1), sin)


def weigh_by_slot(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weights @ value of one token, [B, k, g, S] @ [B, k, S, d], for torch.compile on a GPU.

    Its library is fast where rows begin at multiples of 16 bytes, which S weights seldom are: generate() makes a static
    cache one slot shorter than the text. So a small kernel writes them in rows of g, with zeros up to a multiple of 8.
    """
    groups = weights.shape[2]
    zeros = (8 - groups % 8) % 8  # torch 2.9 compiles -groups % 8 wrongly where groups is a symbol
    by_slot = F.pad(weights.transpose(2, 3), (0, zeros))  # [B, k, S, g + zeros]
    return (by_slot.transpose(2, 3) @ value)[:, :, :groups]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scaling + mask) v; keys and values are not repeated for their g query heads.

    Args:
        query: [B, h, T, d]; key and value: [B, k, S, d].
        attention_mask: None, or boolean (True = attend) or additive, broadcast to [B, h, T, S].

    Returns:
        The output [B, T, h, d] and the attention weights [B, h, T, S].
    """
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    rows = (query * scaling).reshape(batch, kv_heads, -1, head_dim)  # [B, k, g T, d]
    scores = (rows @ key.transpose(2, 3)).view(batch, heads, length, -1)  # [B, h, T, S]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = torch.where(attention_mask, scores, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    # The softmax kernels add up in float32 whatever dtype they read and write.
    weights = F.softmax(scores, dim=-1)
    rows = weights.view(batch, kv_heads, -1, weights.shape[-1])  # [B, k, g T, S]
    by_slot = length == 1 and value.is_cuda and torch.compiler.is_compiling()
    output = weigh_by_slot(rows, value) if by_slot else rows @ value  # [B, k, g T, d]
    return output.reshape(batch, heads, length, head_dim).transpose(1, 2), weights


def is_plain(linear: nn.Module) -> bool:
    """Whether the module is nn.Linear and no more: not by its type (LoRA, quantized) or that of its weight (quantized,
    shared by processes), its hooks (offloading, tensor parallelism, gradients) or a method in its own place."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    replaced = any(hooks) or "forward" in linear.__dict__
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not replaced


def sum_of_products(states: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """linear(states) of a single token, [1, 1, H] -> [1, 1, n], summed in float32 or better.

    In parts of 1024 terms where H has up to seven of them: Inductor's kernels hold so many at once, in place of a loop,
    and it writes out the sum of so few parts where that is used.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    size = states.shape[-1]
    parts = size // SUMMED_AT_ONCE if size % SUMMED_AT_ONCE == 0 and size < 8 * SUMMED_AT_ONCE else 1
    weight = linear.weight.unflatten(-1, (parts, -1))  # [n, parts, H / parts]
    product = (weight.to(dtype) * states.view(parts, -1).to(dtype)).sum(-1).sum(-1)  # [n]
    if linear.bias is not None:
        product = product + linear.bias
    return product.to(states.dtype).view(*states.shape[:-1], -1)


def project(states: torch.Tensor, *linears: nn.Module) -> list[torch.Tensor]:
    """linear(states) of each, in a form from which torch.compile makes few and fast kernels for a single token.

    Several products of one token on a GPU are written as sums. Inductor makes one kernel of them, biases included,
    which reads the token once; the library has two for each, the second adding up the parts of the first. One product
    alone stays the library's, which is as fast, and gets its bias afterwards: given it, Inductor calls the library
    even where it was asked to tune a kernel of its own.
    """
    if not torch.compiler.is_compiling() or not all(is_plain(linear) for linear in linears):
        return [linear(states) for linear in linears]
    plain = cast(tuple[nn.Linear, ...], linears)
    single = all(type(size) is int and size == 1 for size in states.shape[:-1])  # an exported size is a symbol
    if len(plain) > 1 and states.is_cuda and single and not torch.is_autocast_enabled():
        return [sum_of_products(states, linear) for linear in plain]
    products = [F.linear(states, linear.weight) for linear in plain]
    return [
        product if linear.bias is None else product + linear.bias.to(product.dtype)  # autocast: the bias is float32
        for product, linear in zip(products, plain, strict=True)
    ]


class InternLM2Attention(nn.Module):
    """Causal attention with grouped key/value heads; the backend is a function named by the config."""

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        kv_rows = config.num_key_value_heads * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, (self.num_key_value_groups + 2) * kv_rows, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_kwargs: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, H] -> ([B, T, H], attention weights [B, h, T, S] where the backend gives them)."""
        # k is this process's share under tensor parallelism
        qkv = project(hidden_states, self.wqkv)[0].unflatten(-1, (-1, self.num_key_value_groups + 2, self.head_dim))
        query_key, value = qkv.split((self.num_key_value_groups + 1, 1), dim=-2)  # [B, T, k, g + 1 and 1, d]
        query, key = rotate(query_key, *position_embeddings).split((self.num_key_value_groups, 1), dim=-2)
        query = query.flatten(2, 3).transpose(1, 2)  # [B, T, k, g, d] -> [B, h, T, d]
        key, value = key.squeeze(3).transpose(1, 2), value.squeeze(3).transpose(1, 2)  # [B, k, T, d]
        if past_key_values is not None:
            key, value = update_cache(past_key_values, key, value, self.layer_idx, cache_kwargs, kwargs)  # [B, k, S, d]

        backend = config_of_pass(self.config, past_key_values, kwargs)._attn_implementation
        # One query reads keys and values once either way, and sdpa may plan its kernel anew for every length.
        single = query.shape[2] == 1 and not backend_keeps_cache(kwargs)
        if backend == "eager" or (backend == "sdpa" and single):
            attend: Callable = eager_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS[backend]
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        output = output.reshape(*hidden_states.shape[:-1], -1)  # some backends give [B T, h d]
        return project(output, self.wo)[0], weights


class InternLM2MLP(nn.Module):
    """Gated feed-forward network: w2(act(w1 x) * w3 x)."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = activation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = project(hidden_states, self.w1, self.w3)  # [B, T, I]
        return self.w2(self.act_fn(gate) * up)


class InternLM2DecoderLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward, each on the normed input and added to it."""

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, H] -> ([B, T, H], attention weights or None); `kwargs` go to the attention."""
        attended, weights = self.attention(self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states)), weights


class InternLM2PreTrainedModel(PreTrainedModel):
    """What all InternLM2 models share: fresh weights, supported features, and how a folder is loaded."""

    config_class = InternLM2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "tok_embeddings"
    _no_split_modules = ["InternLM2DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", CACHE_NAME]  # noqa: RUF012
    # Rotary tables, which files of 2023 hold.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    is_in_internevo = False  # whether InternEvo's trainer was there when the model was built

    def __init__(self, config: InternLM2Config, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: FlashAttention is asked for in float32.
        """
        if config._attn_implementation is None:
            config._attn_implementation = "eager"
        if "flash" in config._attn_implementation and config.dtype == torch.float32:
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} computes in float16 or bfloat16 only, "
                "but the model is to be in float32, the default. Pass dtype=torch.bfloat16, dtype=torch.float16 or "
                'dtype="auto", or choose attn_implementation="sdpa".'
            )
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        super().post_init()
        self.is_in_internevo = mark_for_internevo(self)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in PreTrainedModel, with one rule for the dtype in every transformers version: `dtype` (or
        `torch_dtype`) absent or None is float32, "auto" is that of config.json or else of the weights.

        Raises:
            ValueError: tensor parallelism that would cut a key/value head apart.
        """
        through_auto = getattr(kwargs.get("config"), "_requested_dtype", None)
        given = (kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None), through_auto)
        kwargs["dtype"] = next((dtype for dtype in given if dtype is not None), torch.float32)
        loaded = super().from_pretrained(*args, **with_tensor_parallelism(kwargs))
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config._requested_dtype = None
        mark_for_internevo(model)  # loading put other parameters in the place of the marked ones
        if model.config.num_key_value_heads % (model.tp_size or 1):
            raise ValueError(
                f"Tensor parallelism over {model.tp_size} processes would cut key/value heads apart. Their number, "
                f"num_key_value_heads = {model.config.num_key_value_heads}, must be a multiple of the processes'."
            )
        return loaded

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers would look for its own wording in this file to find out.
        return True

    def _init_weights(self, module: nn.Module) -> None:
        # nn.init functions leave loaded weights alone; writing to `.data` would not, in transformers 5.0.
        if isinstance(module, InternLM2RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def packed_row(
    position_ids: torch.Tensor | None,
    indexes: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Positions [B, T] and offsets of packed sequences, None where not given, in whichever words a caller has for them.

    Args:
        indexes, cu_seqlens: InternEvo's: positions [T] or [1, T], offsets [n + 1] or [1, n + 1].
        cu_seq_lens_q: the offsets in transformers' data collators.
    """
    if position_ids is None and indexes is not None:
        position_ids = torch.atleast_2d(indexes)
    return position_ids, cu_seq_lens_q if cu_seqlens is None else cu_seqlens


def packed_position_ids(cu_seqlens: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Positions [B, T] that restart at 0 with every sequence of a packed row.

    Args:
        cu_seqlens: offsets of the sequences' first tokens and the end of the last, [n + 1] or [1, n + 1]. Up to T they
            are those of every row; beyond it they count on through the rows, as FlashAttention has them.

    Raises:
        ValueError: several rows of offsets.
    """
    if cu_seqlens.dim() > 1 and cu_seqlens.shape[0] != 1:
        raise ValueError(
            "cu_seqlens must hold the offsets of one packed row, [n + 1] or [1, n + 1], "
            f"but its shape is {list(cu_seqlens.shape)}."
        )
    offsets = cu_seqlens.flatten().long()
    tokens = torch.arange(rows * length, device=offsets.device)
    tokens = torch.where(offsets[-1] > length, tokens, tokens % length)
    sequence = torch.searchsorted(offsets, tokens, right=True) - 1
    return (tokens - offsets[sequence]).view(rows, length)


def padded_position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, S] that count the real tokens of [B, S] only, those not 0; padding before the first has 0."""
    return ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)


class TokenLayout(NamedTuple):
    """Where T new tokens stand: what the mask and the rotary angles are made from.

    position_ids: [B or 1, T].
    attention_mask: as given to the model, or None.
    past_key_values: what is cached before them, or None.
    packed: [B or 1, T], restarting with every sequence packed into a row; None where rows are one sequence.
    slots: [T], those of the cache that the new tokens fill, where the caller counts them.
    """

    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    past_key_values: Cache | None
    packed: torch.Tensor | None
    slots: torch.Tensor | None


def padding_mask(layout: TokenLayout) -> torch.Tensor | None:
    """The attention_mask where it is [B, past + T]. No property: torch up to 2.9 does not trace a named tuple's."""
    return None if is_prepared(layout.attention_mask) else layout.attention_mask


def check_mask_length(attention_mask: torch.Tensor, length: int, past_key_values: Cache | None) -> None:
    """ValueError unless a padding mask [B, S] covers the cached tokens and the `length` new ones.

    A static cache counts its tokens on the device, where looking would make every step wait: its mask is believed, if
    it covers the new tokens and no more than the cache's slots.
    """
    width, slots = attention_mask.shape[-1], slots_of(past_key_values)
    seen = 0 if past_key_values is None or is_paged(past_key_values) else past_key_values.get_seq_length()
    if isinstance(seen, int) and width != seen + length:
        raise ValueError(
            f"attention_mask covers {width} tokens, but there are {seen} cached and {length} new ones. Pass one column "
            "for each of them."
        )
    if slots is not None and not length <= width <= slots:
        raise ValueError(
            f"attention_mask covers {width} tokens, but there are {length} new ones, and the cache has {slots} slots. "
            "Pass one column for each cached and each new token."
        )


def token_layout(
    hidden_states: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    cu_seqlens: torch.Tensor | None,
    slots: torch.Tensor | None = None,
) -> TokenLayout:
    """The layout of the tokens of hidden_states [B, T, H]; positions that are not given are counted."""
    length = hidden_states.shape[1]
    packed = None
    if attention_mask is not None and not is_prepared(attention_mask):
        check_mask_length(attention_mask, length, past_key_values)
    if cu_seqlens is not None and past_key_values is not None and not is_paged(past_key_values):
        raise ValueError(
            "cu_seqlens keeps the sequences of a row apart, but past_key_values joins them. Pass one of the two."
        )
    if cu_seqlens is not None:
        packed = packed_position_ids(cu_seqlens, len(hidden_states), length)
        # A prepared mask keeps the sequences apart and the cached tokens in sight; one of padding cannot.
        attention_mask = attention_mask if is_prepared(attention_mask) else None
    elif past_key_values is None and attention_mask is None:
        packed = position_ids
    if position_ids is None and packed is not None:
        position_ids = packed
    elif position_ids is None and attention_mask is not None and not is_prepared(attention_mask):
        position_ids = padded_position_ids(attention_mask)[:, -length:]
    elif position_ids is None and slots is not None:
        position_ids = slots.unsqueeze(0)
    elif position_ids is None:
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = (torch.arange(length, device=hidden_states.device) + seen).unsqueeze(0)
    return TokenLayout(position_ids, attention_mask, past_key_values, packed, slots)


def sequence_lengths(layout: TokenLayout) -> torch.Tensor:
    """Largest position + 1 of the sequence that a token belongs to: [B, 1], or [B, T] for packed rows."""
    position_ids, packed, padding = layout.position_ids, layout.packed, padding_mask(layout)
    if packed is not None:
        starts = F.pad(packed.diff(dim=-1) != 1, (1, 0))
        number = starts.cumsum(-1).expand_as(position_ids)  # of the token's sequence within its row
        largest = torch.zeros_like(position_ids).scatter_reduce(-1, number, position_ids, "amax")
        return largest.gather(-1, number) + 1
    if padding is not None:
        position_ids = position_ids.masked_fill(padding[:, -position_ids.shape[-1] :] == 0, 0)
    return position_ids.amax(-1, keepdim=True) + 1


def varlen_arguments(packed: torch.Tensor, max_seqlen: int | None) -> dict[str, Any]:
    """The packed sequences of [B, T] as FlashAttention takes them, found once for all layers."""
    starts = F.pad(packed.diff(dim=-1) != 1, (1, 0), value=True).flatten()
    end = torch.tensor([starts.numel()], device=starts.device)
    offsets = torch.cat((starts.nonzero().flatten(), end)).int()
    longest = int(offsets.diff().max()) if max_seqlen is None else int(max_seqlen)
    return {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _gives_attentions(config: Any, output_attentions: bool | None) -> bool:
    """Whether to return attention weights; ValueError where the backend has none."""
    wanted = config.output_attentions if output_attentions is None else output_attentions
    if wanted and config._attn_implementation != "eager":
        raise ValueError(
            'output_attentions needs the weights that only attn_implementation="eager" gives; '
            f"this model runs {config._attn_implementation!r}."
        )
    return wanted


def _backend_mask(config: Any, hidden_states: torch.Tensor, layout: TokenLayout) -> Any:
    """The mask as the attention backend takes it."""
    # A single token sees everything before it, unless the cache has slots that are not filled yet.
    preallocated = getattr(layout.past_key_values, "is_compileable", False)
    if hidden_states.shape[1] == 1 and layout.attention_mask is None and not preallocated:
        return None
    mask, cache = layout.attention_mask, layout.past_key_values
    return causal_mask(config, hidden_states, mask, cache, layout.packed, layout.slots)


class InternLM2Model(InternLM2PreTrainedModel):
    """The decoder without a head."""

    _auto_class = "AutoModel"
    _tp_plan = {"tok_embeddings": SHARED_EMBEDDING} if SHARED_EMBEDDING else {}

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(InternLM2DecoderLayer(config, idx) for idx in range(config.num_hidden_layers))
        self.norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = InternLM2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @in_our_words
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        indexes: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of T new tokens.

        With dynamic NTK scaling and a sequence beyond max_position_embeddings, cached decoding is not equal
        to one pass over the whole sequence: what the cache holds was computed under the smaller base of a
        shorter sequence. Up to that length, and always with "origin" and "linear", the two are equal.

        Args:
            input_ids: [B, T], or else inputs_embeds: [B, T, H].
            attention_mask: [B, past + T], 1 = real token, padding on either side; or additive [B, 1, T, S].
            position_ids: [B, T]. Left out, real tokens are counted. Without a mask and a cache they may
                restart at 0 within a row: the sequences packed into it do not see each other.
            past_key_values: what an earlier pass returned.
            use_cache: default is the config's, but False while training.
            output_attentions: with attn_implementation="eager" only.
            indexes, cu_seqlens, max_seqlen: how InternEvo describes a packed row: positions [T] or [1, T],
                offsets of its sequences [n + 1] or [1, n + 1] (they replace a [B, T] attention_mask; of several
                rows they may count through all), and the length of the longest.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; attention weights wanted from another
                backend than eager; a filled cache while activation checkpointing trains.
            TypeError: an argument that nobody reads.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if not is_paged(past_key_values):
            refuse_unknown(kwargs, self.config._attn_implementation)
        config = config_of_pass(self.config, past_key_values, kwargs)
        output_attentions = _gives_attentions(config, output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        past_key_values, use_cache = self._cache_of_pass(past_key_values, use_cache)
        hidden_states = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, H]
        position_ids, cu_seqlens = packed_row(position_ids, indexes, cu_seqlens, **kwargs)
        slots = given_slots(kwargs)
        layout = token_layout(hidden_states, position_ids, attention_mask, past_key_values, cu_seqlens, slots)
        # transformers looks for packed sequences only where there is no cache: the mask comes before it.
        mask = _backend_mask(config, hidden_states, layout)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        paged = is_paged(past_key_values) or backend_keeps_cache(kwargs)
        kwargs = {
            **({} if paged else self._packed_arguments(hidden_states, layout, max_seqlen)),
            **kwargs,
            "position_embeddings": self._position_embeddings(hidden_states, layout, paged),
            "attention_mask": mask,
            "past_key_values": past_key_values,
            "cache_kwargs": cache_slots(past_key_values, hidden_states, slots),
        }
        all_hidden_states: list[torch.Tensor] = []
        all_weights: list[torch.Tensor] = []
        # Early-exit drafting asks for the first layers alone by lowering the number.
        for layer in self.layers[: self.config.num_hidden_layers]:
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            output = layer(hidden_states, **kwargs)
            # A pipeline stage puts the identity, without weights, in the place of the layers of others.
            hidden_states, weights = output if isinstance(output, tuple) else (output, None)
            if output_attentions:
                all_weights.append(weights)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            **{CACHE_NAME: past_key_values},
        )

    def _cache_of_pass(self, past_key_values: Any, use_cache: bool | None) -> tuple[Any, bool]:
        """The cache that was given, and whether one is to be made; none while activation checkpointing trains."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not self.is_in_internevo
        if isinstance(past_key_values, (tuple, list)):
            past_key_values = DynamicCache(past_key_values)
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return past_key_values, use_cache
        if past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError("Activation checkpointing runs layers twice; what is cached cannot be attended to.")
        return None, False

    def _packed_arguments(
        self, hidden_states: torch.Tensor, layout: TokenLayout, max_seqlen: int | None
    ) -> dict[str, Any]:
        """How FlashAttention, which takes no mask, is told of packed sequences; continuous batching tells it itself."""
        if layout.packed is None or "flash" not in self.config._attn_implementation:
            return {}
        return varlen_arguments(layout.packed.expand(len(hidden_states), -1), max_seqlen)

    def _position_embeddings(self, hidden_states: torch.Tensor, layout: TokenLayout, paged: bool) -> PositionEmbeddings:
        """cos and sin for all layers, in the dtype of their queries and keys."""
        device = hidden_states.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)  # the meta device knows no autocast
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
        lengths = sequence_lengths(layout)
        if paged and self.config.rope().type == "dynamic":
            self._check_paged(lengths)
        return self.rotary_emb(layout.position_ids, lengths, dtype)

    def _check_paged(self, lengths: torch.Tensor) -> None:
        """Raise ValueError where dynamic NTK scaling would need to know the length of a prompt that comes in pieces."""
        trained = self.config.max_position_embeddings
        # Nothing may be read while a CUDA graph is captured.
        if lengths.is_cuda and torch.cuda.is_current_stream_capturing():
            torch._assert_async((lengths <= trained).all(), "A sequence is longer than max_position_embeddings.")
        elif (longest := int(lengths.max())) > trained:
            raise ValueError(
                f"A sequence of {longest} tokens is longer than max_position_embeddings = {trained}. Beyond it, "
                "dynamic NTK scaling goes by the length of the whole prompt, which continuous batching may feed in "
                "pieces and share the beginnings of several. Use generate."
            )


class InternLM2ForCausalLM(InternLM2PreTrainedModel, GenerationMixin, ChatMixin):
    """The decoder with the output head over the vocabulary."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}  # noqa: RUF012
    _tp_plan = {"output": GATHERED_COLUMNS}  # noqa: RUF012
    _pp_plan = {"output": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # noqa: RUF012

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.vocab_size = config.vocab_size
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.output = new_embeddings

    @prepares_inputs
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # PEFT looks for the cache under the name of earlier versions.
        return with_our_cache_name(cast(Any, super()).prepare_inputs_for_generation(*args, **kwargs))

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        # generate() asks the model first.
        return mask_for_generate(kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
        # generate() from 5.4 on asks for the first positions, and counts on from the last. Its own have 0 for padding
        # on the right, after which the new tokens would be 1, 2, ..., as if the prompt were not there.
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            return padded_position_ids(mask)
        return cast(Any, super())._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    @in_our_words
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits in the model's dtype, and the loss in float32.

        Args:
            labels: [B, T] token ids, -100 where there is no loss; shifted here, so they equal input_ids.
            logits_to_keep: logits of the last n tokens only (0: of all), or of the given token indices.
            Others: see InternLM2Model.forward.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(outputs.last_hidden_state[:, kept, :])  # [B, T or n, V]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


class InternLM2ForSequenceClassification(InternLM2PreTrainedModel):
    """The decoder with a linear head on the last real token of each row, or of each sequence packed into rows."""

    _auto_class = "AutoModelForSequenceClassification"
    # Trainer divides the loss by the parts of a batch itself: losses of regression know no num_items_in_batch.
    accepts_loss_kwargs = False

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)  # None only while a config is being built
        self.model = InternLM2Model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @in_our_words
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits [B, num_labels] of each row's last real token; of packed rows [n, num_labels], one for each sequence.

        The attention_mask tells which that is; without one it is the last that is not pad_token_id, or the
        last at all where there are no input_ids or no pad_token_id.

        Args:
            labels: [B] (packed: [n]) classes, or [B] or [B, num_labels] values for regression and multi-label problems.
            Others: see InternLM2Model.forward.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # [B, T, H]
        position_ids, offsets = packed_row(position_ids, **kwargs)
        packed = token_layout(hidden_states, position_ids, attention_mask, past_key_values, offsets).packed
        if packed is not None and bool((packed.diff(dim=-1) != 1).any()):
            last = hidden_states.flatten(0, 1)[self._last_of_packed(hidden_states, input_ids, packed)]  # [n, H]
        else:
            last = last_states(self.config.pad_token_id, hidden_states, input_ids, attention_mask)  # [B, H]
        logits = self.score(last)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _last_of_packed(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, packed: torch.Tensor
    ) -> torch.Tensor:
        """Where the sequences packed into [B, T] rows end, [n] of the B T tokens; sequences of padding are none."""
        rows = len(hidden_states)
        starts = F.pad(packed.diff(dim=-1) != 1, (1, 0), value=True).expand(rows, -1).flatten()
        ends = torch.cat((starts[1:], starts.new_ones(1)))
        if input_ids is None or self.config.pad_token_id is None:
            return ends.nonzero().flatten()
        number = starts.cumsum(0) - 1  # of the token's sequence
        real = (input_ids.flatten() != self.config.pad_token_id).long()
        tokens = torch.zeros_like(number).index_add(0, number, real)  # real ones, by sequence
        return (ends & (tokens[number] > 0)).nonzero().flatten()


def last_states(
    pad_token_id: int | None,
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Of each row's last real token, [B, T, H] -> [B, H]: by the mask, or else by what is not padding in input_ids."""
    length = hidden_states.shape[1]
    if attention_mask is not None and not is_prepared(attention_mask):
        real = attention_mask[:, -length:] != 0
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    else:
        return hidden_states[:, -1]
    rows = torch.arange(len(hidden_states), device=hidden_states.device)
    columns = torch.arange(length, device=hidden_states.device)
    return hidden_states[rows, (columns * real.to(columns.device)).argmax(-1)]


class InternLM2ForTokenClassification(InternLM2PreTrainedModel):
    """The decoder with a linear head on every token."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.model = InternLM2Model(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @in_our_words
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits [B, T, num_labels], each from the tokens up to its own.

        Args:
            labels: [B, T] classes, -100 where there is no loss.
            Others: see InternLM2Model.forward.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class InternLM2ForQuestionAnswering(InternLM2PreTrainedModel):
    """The decoder with a linear head that scores every token as the start and as the end of the answer."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @in_our_words
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Start and end logits, [B, T] each.

        Args:
            start_positions, end_positions: [B] columns of the answer's first and last token; beyond the row: no loss.
            Others: see InternLM2Model.forward.

        Raises:
            ValueError: one of start_positions and end_positions without the other.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("Give start_positions and end_positions both, or neither.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class InternLM2ForRewardModel(InternLM2PreTrainedModel):
    """The published reward model: a conversation's score is read at a token of its own, appended to its text."""

    _auto_class = "AutoModel"

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.reward_token_id = getattr(config, "reward_token_id", None)
        self.post_init()

    @in_our_words
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores [B, 1] as `logits`, read at each row's last real token. For arguments see InternLM2Model.forward.

        Raises:
            ValueError: labels, for which the reward model has no loss.
        """
        if kwargs.pop("labels", None) is not None:
            raise ValueError("InternLM2ForRewardModel has no loss for labels; compute one from the scores of pairs.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        last = last_states(self.config.pad_token_id, outputs.last_hidden_state, input_ids, attention_mask)  # [B, H]
        return SequenceClassifierOutputWithPast(
            logits=self.v_head(last),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def get_score(self, tokenizer: Any, conversation: list[dict[str, str]], **kwargs: Any) -> float:
        """Score of a conversation, a list of {"role", "content"}; `kwargs` go to the forward pass.

        Raises:
            ValueError: the config names no reward_token_id.
        """
        return self.get_scores(tokenizer, [conversation], **kwargs)[0]

    @torch.no_grad()
    def get_scores(self, tokenizer: Any, conversations: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
        """As get_score, of several conversations in one batch."""
        if self.reward_token_id is None:
            raise ValueError("config.json names no reward_token_id, the token at which the score is read.")
        texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in conversations]
        rows = [
            torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], self.reward_token_id])
            for text in texts
        ]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # padded on the right, with what the mask hides
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        outputs = self(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            use_cache=False,
            return_dict=True,
            **kwargs,
        )
        return outputs.logits[:, 0].float().tolist()

    def compare(
        self,
        tokenizer: Any,
        conversation1: list[dict[str, str]],
        conversation2: list[dict[str, str]],
        return_logits: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Whether the first conversation scores higher; with return_logits the two scores."""
        first = self.get_score(tokenizer, conversation1, **kwargs)
        second = self.get_score(tokenizer, conversation2, **kwargs)
        return (first, second) if return_logits else first > second

    def rank(
        self, tokenizer: Any, conversations: list[list[dict[str, str]]], return_logits: bool = False, **kwargs: Any
    ) -> Any:
        """Each conversation's place, 0 for the highest score; with return_logits the scores instead."""
        scores = self.get_scores(tokenizer, conversations, **kwargs)
        if return_logits:
            return scores
        places = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
        return [places.index(index) for index in range(len(scores))]
