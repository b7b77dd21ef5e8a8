"""What becomes of the models when transformers loses or renames a name that they take from it.

    python tests/versions/drill.py hidden     each internal name gone, or with its parameters renamed
    python tests/versions/drill.py renamed    the cache under a third name, in generate(), masks and outputs

Prints a JSON object: {what was changed: "right" | the sentence of an ImportError | what else happened}. The tokens are
right when they are those without a cache, computed before anything is changed; every case has a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from typing import Any

import torch

Change = Callable[[], None]

INTERNAL = (
    ("activations", "ACT2FN"),
    ("distributed", "DistributedConfig"),
    ("integrations.tensor_parallel", "ALL_PARALLEL_STYLES"),
    ("masking_utils", "create_causal_mask"),
    ("masking_utils", "create_masks_for_generate"),
    ("modeling_layers", "GradientCheckpointingLayer"),
    ("models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
)
"""Every name that the packages look up in transformers: the internal ones of docs/transformers-api.md."""

RENAMED_FILES = ("generation/utils.py", "masking_utils.py", "modeling_outputs.py", "utils/generic.py")


def outcome() -> str:
    """Load both families, generate in several ways, and tell what happened."""
    from tests.support.model_families import FAMILIES, padded, tokens

    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids, mask = padded([tokens(1, 6, seed=1), tokens(1, 11, seed=2)], "left")
    for family in FAMILIES:
        for backend in ("eager", "sdpa"):
            model = family.model("dynamic", attn_implementation=backend)
            model.generation_config.disable_compile = True
            for prompt, seen in ((ids[1:], mask[1:]), (ids, mask)):
                expected = full_passes(model, prompt, seen)
                for way in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
                    found = model.generate(prompt, attention_mask=seen, **settings, **way)[:, prompt.shape[1] :]
                    if not torch.equal(found, expected):
                        return f"WRONG TOKENS: {family}, {backend}, {way}, a batch of {len(prompt)}"
    return "right"


@torch.no_grad()
def full_passes(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Six greedy tokens from whole passes, each with the mask written out here and nothing of transformers' own."""
    start = ids.shape[1]
    for _ in range(6):
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
        # A row of padding sees itself: what it computes is read by nobody, but must be a number.
        causal = causal | torch.eye(length, dtype=torch.bool)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=causal, position_ids=positions, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids[:, start:]


def stand_in(module: str, **changed: Any) -> None:
    """What importers of a module of transformers find from now on; its own functions stay as they are.

    A name whose value is None is not there.
    """
    place = importlib.import_module(f"transformers.{module}")
    shown = types.ModuleType(place.__name__)
    shown.__dict__.update({**place.__dict__, **changed})
    for name in [name for name, value in changed.items() if value is None]:
        del shown.__dict__[name]
    sys.modules[place.__name__] = shown


def hide(module: str, name: str) -> Change:
    return lambda: stand_in(module, **{name: None})


def rename_parameters(module: str, name: str, old: tuple[str, ...]) -> Change:
    """The function takes `new_x` for each `x` of old, and knows `x` no more."""

    def change() -> None:
        place = importlib.import_module(f"transformers.{module}")
        function = getattr(place, name)
        code = function.__code__ if not hasattr(function, "__wrapped__") else function.__wrapped__.__code__
        parameters = [f"new_{each}" if each in old else each for each in code.co_varnames[: code.co_argcount]]
        scope: dict[str, Any] = {"function": function}
        signature = ", ".join(f"{each}=None" for each in parameters)
        passed = ", ".join(f"{each.removeprefix('new_')}={each}" for each in parameters)
        exec(f"def {name}({signature}):\n    return function({passed})", scope)
        stand_in(module, **{name: scope[name]})

    return change


def cases() -> dict[str, Change]:
    changes = {f"{module}.{name} is gone": hide(module, name) for module, name in INTERNAL}
    for old in (("inputs_embeds", "input_embeds"), ("cache", "past_key_values"), ("attention_mask",), ("config",)):
        title = f"masking_utils.create_causal_mask has another name for {old[0]}"
        changes[title] = rename_parameters("masking_utils", "create_causal_mask", old)
    changes["distributed.DistributedConfig takes no tp_plan"] = without_tensor_parallel_plan
    changes["the outputs hold no cache"] = without_cache_field
    return changes


def without_tensor_parallel_plan() -> None:
    stand_in("distributed", DistributedConfig=type("DistributedConfig", (), {}))


def without_cache_field() -> None:
    outputs = importlib.import_module("transformers.modeling_outputs")
    stand_in("modeling_outputs", BaseModelOutputWithPast=outputs.BaseModelOutput)


def hidden() -> dict[str, str]:
    """Every case in a fork of this process, which has transformers in memory and none of the packages."""
    import transformers.generation.utils
    import transformers.integrations.tensor_parallel
    import transformers.masking_utils
    import transformers.modeling_utils  # noqa: F401

    return {title: forked(change) for title, change in cases().items()}


def forked(change: Change) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            change()
            found = outcome()
        except ImportError as error:
            found = f"ImportError: {error}"
        except BaseException:
            found = traceback.format_exc()
        os.write(writing, found.encode()[-60000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as stream:
        found = stream.read()
    os.waitpid(child, 0)
    return found


def renamed() -> dict[str, str]:
    """transformers read from sources in which the cache is called `memory`."""
    read = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> Any:
        if not self.path.endswith(tuple(f"transformers/{name}" for name in RENAMED_FILES)):
            return read(self, fullname)
        source = self.get_source(fullname) or ""
        name = "cache" if "cache: Cache | None = None" in source_of_outputs(self.path) else "past_key_values"
        # Not in the names of modules.
        lines = [
            line if re.match(r"\s*from .* import", line) else re.sub(rf"\b{name}\b", "memory", line)
            for line in source.splitlines()
        ]
        return compile("\n".join(lines), self.path, "exec", dont_inherit=True)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    return {"the cache is called memory": outcome()}


def source_of_outputs(path: str) -> str:
    """The text of modeling_outputs.py beside a file of transformers."""
    root = path[: path.rindex("transformers/") + len("transformers/")]
    with open(f"{root}modeling_outputs.py", encoding="utf-8") as stream:
        return stream.read()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"hidden": hidden, "renamed": renamed}[sys.argv[1]](), indent=1))
