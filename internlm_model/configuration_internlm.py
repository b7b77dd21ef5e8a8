"""Configuration of the InternLM models."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

from transformers.configuration_utils import PretrainedConfig

# That of the project that these modules come from.
__version__ = "1.2.0"

AUTO_MAP = {
    "AutoConfig": "configuration_internlm.InternLMConfig",
    "AutoModel": "modeling_internlm.InternLMForCausalLM",
    "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_internlm.InternLMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_internlm.InternLMForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_internlm.InternLMForQuestionAnswering",
}

# What config.json may call a rotary type, and what it is called here.
ROPE_TYPES = {"default": "origin", "origin": "origin", "linear": "linear", "dynamic": "dynamic"}


# Where a spelling of the rotary setting states which part of it.
ROPE_KEYS = {"rope_theta": "theta", "type": "type", "rope_type": "type", "factor": "factor"}
ROTARY_KEYS = {"base": "theta", "type": "type", "scaling_factor": "factor"}
SPELLINGS = {
    "config": {"rope_theta": "theta"},
    "rotary": ROTARY_KEYS,
    "rope_scaling": ROPE_KEYS,
    "rope_parameters": ROPE_KEYS,
}


class Rope(NamedTuple):
    """Rotary settings: base frequency, scaling type ("origin", "linear" or "dynamic") and scaling factor."""

    theta: float
    type: str
    factor: Any


# What the published configs say, most of them without a factor.
DEFAULT_ROPE = Rope(10000, "dynamic", 1.0)

# Parts of the setting that change nothing where they have this value; any other names a formula not computed here.
NEUTRAL = {"partial_rotary_factor": 1.0}


def _positive_number(source: str, value: Any) -> float:
    """`value`; ValueError, by the name of its `source`, unless it is a finite positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{source} is {value!r}; expected a finite positive number, written as a number.")
    return value


def _checked(source: str, field: str, value: Any) -> Any:
    """What `source` states of one field of Rope, in the form it is kept in.

    Raises:
        ValueError: an unknown type, a base that is not positive and finite, a factor below 1.
    """
    if field == "type":
        if not isinstance(value, str) or value not in ROPE_TYPES:
            raise ValueError(f"{source} is {value!r}; InternLM knows {', '.join(ROPE_TYPES)}.")
        return ROPE_TYPES[value]
    number = _positive_number(source, value)
    if field == "theta":
        return number
    if number < 1:
        raise ValueError(f"{source} is {value!r}; rotary scaling needs a factor of at least 1.")
    return float(number)  # older readers of config.json refuse an int


def _statements(name: str, value: Any, keys: dict[str, str]) -> list[tuple[str, str, Any]]:
    """What the dict `value` called `name` states: (where it is stated, field of Rope, checked value)."""
    if value is None:
        return []
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict or None, such as {{'type': 'dynamic'}}, not {value!r}.")
    stated = {key: item for key, item in value.items() if item is not None and item != NEUTRAL.get(key)}
    for key in stated:
        if key not in keys:
            raise ValueError(
                f"{name}[{key!r}] is {stated[key]!r}, but InternLM knows {', '.join(keys)} only, and would compute "
                "something else without it. Remove it if the model was trained without."
            )
    return [
        (f"{name}[{key!r}]", field, _checked(f"{name}[{key!r}]", field, stated[key]))
        for key, field in keys.items()
        if key in stated
    ]


def _merged_rope(default: Rope, statements: list[tuple[str, str, Any]]) -> Rope:
    """The setting that all statements agree on, `default` where they are silent.

    Raises:
        ValueError: two statements contradict each other.
    """
    merged: dict[str, Any] = {}
    stated_by: dict[str, str] = {}
    for source, field, value in statements:
        if merged.setdefault(field, value) != value:
            raise ValueError(
                f"The rotary {field} is stated twice and differently: {stated_by[field]} is {merged[field]!r}, "
                f"{source} is {value!r}. Make them agree or remove one of them."
            )
        stated_by.setdefault(field, source)
    return default._replace(**merged)


class RopeSpelling(dict):
    """One spelling of a config's rotary setting. Editing it in place edits the setting, and with it all spellings."""

    def __init__(self, config: InternLMConfig, name: str, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._config = config
        self._name = name

    def __setitem__(self, key: str, value: Any) -> None:
        if value is None and key in self:
            self._refuse()
        self._config._edit_rope(self._name, {key: value})
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(f"A part of {self._name} cannot be removed. Assign all of it: config.{self._name} = {{...}}.")

    __delitem__ = popitem = clear = _refuse

    def pop(self, key: str, *default: Any) -> Any:
        return self._refuse() if key in self else super().pop(key, *default)

    def __reduce__(self) -> Any:  # a copy is a plain dict, and edits nothing
        return dict, (dict(self),)


class InternLMConfig(PretrainedConfig):
    """Shape and settings of an InternLM model.

    The rotary setting has three spellings, all read and all written: `rotary`, the published one ({"base",
    "type": "origin" | "linear" | "dynamic", "scaling_factor": at least 1}); `rope_theta` (a number) with
    `rope_scaling` (None, or {"type": "linear" | "dynamic", "factor"}; "rope_type" serves as "type"); and
    `rope_parameters` ({"rope_theta", "rope_type", "factor"}). They may be given together if they agree.
    What none of them states is base 10000, type "dynamic" and factor 1.

    Args:
        vocab_size: rows of the embedding and of the output head.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: the model's shape.
        hidden_act: activation of the feed-forward gate.
        max_position_embeddings: trained context length in tokens; dynamic NTK scaling starts beyond it.
        initializer_range: standard deviation of fresh weights.
        rms_norm_eps: epsilon of the RMS norms.
        use_cache: return the key/value cache unless told otherwise (never by itself while training).
        bias: biases in `q_proj`, `k_proj`, `v_proj` and `o_proj`.
        attn_implementation: "eager", "sdpa", "flash_attention_2" or "flex_attention"; kept in config.json. An
            `attn_implementation` passed to `from_pretrained` goes before it, for that load only.

    What the rotary spellings give may be edited in place (`config.rope_scaling["factor"] = 4.0`): all follow.

    Raises:
        ValueError: sizes that do not divide, or rotary settings that are unknown, unfit or contradict each other.
    """

    model_type = "internlm"
    _auto_class = "AutoConfig"
    # The dtype asked for through an Auto class: transformers 5.4 and 5.8 tell it to the config alone.
    _requested_dtype = None
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers reads this class attribute)
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    # Module of the model without head: (its inputs, its outputs).
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        vocab_size: int = 103168,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        bias: bool = True,
        rotary: dict[str, Any] | None = None,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_attention_heads})."
            )
        # Readers of config.json look for num_key_value_heads, but this family shares no key/value heads.
        num_key_value_heads = kwargs.pop("num_key_value_heads", num_attention_heads)
        if num_key_value_heads != num_attention_heads:
            raise ValueError(
                f"InternLM has as many key/value heads as query heads ({num_attention_heads}), but "
                f"num_key_value_heads is {num_key_value_heads}."
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.bias = bias
        self.auto_map = kwargs.pop("auto_map", None) or dict(AUTO_MAP)

        spelled = {
            "config": {"rope_theta": rope_theta},
            "rotary": rotary,
            "rope_scaling": rope_scaling,
            "rope_parameters": rope_parameters,
        }
        statements = [each for name, value in spelled.items() for each in _statements(name, value, SPELLINGS[name])]
        self._rope = _merged_rope(DEFAULT_ROPE, statements)
        self._unstated_factor = rotary is not None and "scaling_factor" not in rotary
        self.rope()
        self._stored_attn_implementation = attn_implementation or "eager"
        for name in ("dtype", "torch_dtype"):
            if isinstance(kwargs.get(name), str):
                kwargs[name] = kwargs[name].removeprefix("torch.")  # InternEvo's configurations have it
        kwargs.update(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            attn_implementation=self._stored_attn_implementation,
        )
        super().__init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_position_embeddings" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"max_position_embeddings is {value!r}; expected a positive whole number.")
        # A cache would forget by them what the models, which know them not, attend to.
        narrow = name == "layer_types" and value is not None and any(kind != "full_attention" for kind in value)
        if narrow or (name in ("sliding_window", "attention_chunk_size") and value is not None):
            raise ValueError(f"{name} is {value!r}, but InternLM attends to every earlier token. Leave it out.")
        super().__setattr__(name, value)

    def rope(self) -> Rope:
        """The rotary setting, whichever spelling it came in.

        Raises:
            ValueError: edits in place left a scaling type without a factor, or a factor without a type.
        """
        theta, type, factor = self._rope
        if type != "origin" and factor is None:
            raise ValueError(f"Rotary scaling of type {type!r} needs a factor of at least 1.")
        if type == "origin" and factor not in (None, 1):
            raise ValueError(
                f"The rotary factor is {factor}, but type 'origin' does no scaling. Name the type, 'linear' or "
                "'dynamic', or assign rope_scaling = None for none."
            )
        return Rope(theta, type, 1.0 if factor is None else factor)

    def _edit_rope(self, name: str, part: dict[str, Any]) -> None:
        """Change what the spelling `name` states in `part`, keep the rest."""
        self._rope = _merged_rope(self._rope, _statements(name, part, SPELLINGS[name]))

    def _replace_rope(self, name: str, value: dict[str, Any] | None) -> None:
        """Take the setting from the spelling `name`: no scaling unless stated, the base kept unless stated."""
        before = self._rope
        unscaled = Rope(before.theta, "origin", DEFAULT_ROPE.factor)
        self._rope = _merged_rope(unscaled, _statements(name, value, SPELLINGS[name]))
        try:
            self.rope()
        except ValueError:
            self._rope = before
            raise

    # transformers 5 makes `rope_scaling` an alias of `rope_parameters` and rewrites both; 4.57 knows the
    # former only. As properties over one setting they read the same in every version, and may be assigned.
    @property
    def rotary(self) -> dict[str, Any]:
        theta, type, factor = self._rope
        values = {"base": theta, "type": type}
        published = type == "origin" or (factor == 1 and self._unstated_factor)
        return RopeSpelling(self, "rotary", values if published else values | {"scaling_factor": factor})

    @rotary.setter
    def rotary(self, value: dict[str, Any] | None) -> None:
        self._unstated_factor = value is not None and "scaling_factor" not in value
        self._replace_rope("rotary", {"type": DEFAULT_ROPE.type, **(value or {})})

    @property
    def rope_theta(self) -> float:
        return self._rope.theta

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self._edit_rope("config", {"rope_theta": value})

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        _, type, factor = self._rope
        return None if type == "origin" else RopeSpelling(self, "rope_scaling", {"type": type, "factor": factor})

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self._replace_rope("rope_scaling", value)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        theta, type, factor = self._rope
        values = {"rope_type": "default" if type == "origin" else type, "rope_theta": theta}
        return RopeSpelling(self, "rope_parameters", values if type == "origin" else values | {"factor": factor})

    @rope_parameters.setter
    def rope_parameters(self, value: dict[str, Any] | None) -> None:
        self._replace_rope("rope_parameters", value)

    # transformers warns whoever reads its own property of this name.
    @property
    def torch_dtype(self) -> Any:
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    @property
    def attn_implementation(self) -> str | None:
        """The attention backend in use. Assigning it also changes what config.json will say."""
        return self._attn_implementation

    @attn_implementation.setter
    def attn_implementation(self, value: str) -> None:
        self._stored_attn_implementation = value
        self._attn_implementation = value

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in PretrainedConfig; config.json's "attn_implementation" holds unless the caller names one."""
        requested = kwargs.pop("attn_implementation", None)
        dtypes = [kwargs.get(name) for name in ("dtype", "torch_dtype")]
        stored = config_dict.get("attn_implementation")
        loaded = super().from_dict(dict(config_dict), attn_implementation=stored, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if requested is not None:
            config._attn_implementation = requested
        config._requested_dtype = next((dtype for dtype in dtypes if dtype not in (None, "auto")), None)
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, the same from every transformers version: all spellings of the rotary
        setting and of the dtype, so that readers of the raw file find theirs."""
        raw = super().to_dict()
        for name in ("_rope", "_requested_dtype", "_unstated_factor"):
            raw.pop(name, None)
        raw["attn_implementation"] = raw.pop("_stored_attn_implementation")
        raw["rotary"] = dict(self.rotary)
        raw["rope_theta"] = self.rope().theta
        for name in ("rope_scaling", "rope_parameters"):
            spelled = getattr(self, name)
            raw[name] = spelled and dict(spelled)
        if raw.get("dtype") is not None:
            raw["torch_dtype"] = raw["dtype"]
        return raw
