"""What is tried in the environment of one transformers version. Run by compatibility.py:

    checks.py features FOLDERS RESULTS        every check of CHECKS, on the golden folders
    checks.py save CONVERTED TARGET RESULTS   loads the converted folders and saves them into TARGET
    checks.py load SAVED RESULTS              loads every folder in SAVED and compares with what it has to give

RESULTS is the JSON file to write: the transformers version, and {what: {of which: error}} with "" for none.
Models come from folders through the Auto classes with trust_remote_code, as users load them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from layout import (
    CONTINUOUS_BATCHING,
    EXPECTED,
    MODELS,
    ROPE_BASE,
    SCALING_FACTOR,
    TOKENIZER,
    TOKENIZERS,
    golden_folder,
)
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.support.golden import Golden
from tests.support.rounding import assert_near, decided

AUTO_CLASSES = {
    "causal_lm": AutoModelForCausalLM,
    "base_model": AutoModel,
    "sequence_classification": AutoModelForSequenceClassification,
}
Results = dict[str, dict[str, str]]

TEXTS = (
    "the river runs under the old stone bridge",
    "天上有云，  地上有水。\n\n\tx = 'ß'",
    " two  spaces ",
    "🙂 <0x41>",
)


def load(folder: Path, auto: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    return auto.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [batch, length] without special tokens."""
    return torch.randint(3, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Family:
    """One family's golden cases and the folders made for them."""

    name: str
    folders: Path

    @cached_property
    def golden(self) -> Golden:
        return Golden(self.name)

    def model(self, case: str = "origin.short20", **kwargs: Any) -> Any:
        """The model of a golden case, loaded from its folder."""
        kind = self.golden.cases[case]["cls"]
        model = load(golden_folder(self.folders, self.name, case), AUTO_CLASSES[kind], **kwargs)
        return model.base_model if kind == "base_model" else model

    def folder(self) -> Path:
        return golden_folder(self.folders, self.name, "origin.short20")

    def compare(self, case: str, model: Any) -> None:
        """Runs a recorded forward pass and compares everything recorded."""
        inputs = self.golden.inputs(case)
        with torch.no_grad():
            outputs = model(**inputs)
        mask = inputs.get(self.golden.cases[case].get("compare_mask"))
        real = ... if mask is None else mask == 1
        for key, expected in self.golden.outputs(case).items():
            actual = getattr(outputs, key)
            actual = torch.stack(actual) if isinstance(actual, tuple) else actual
            close(actual[real], expected[real])


# ------------------------------------------------------------------------------------------------------- features


def auto_classes(family: Family) -> None:
    config = AutoConfig.from_pretrained(family.folder(), trust_remote_code=True)
    assert config.model_type == family.name
    prefix = type(config).__name__.removesuffix("Config")
    for auto, head in (
        (AutoModel, "ForCausalLM"),
        (AutoModelForCausalLM, "ForCausalLM"),
        (AutoModelForSequenceClassification, "ForSequenceClassification"),
    ):
        model = load(family.folder(), auto)
        assert type(model).__name__ == prefix + head, type(model)
        assert model.dtype == torch.float32
        assert auto.from_config(config, trust_remote_code=True).config.hidden_size == config.hidden_size


def tokenizer(family: Family) -> None:
    check_tokenizer(AutoTokenizer.from_pretrained(family.folder(), trust_remote_code=True), family.folder())


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder.parent / TOKENIZER))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        expected = [1, *model.encode(text)]
        assert ids == expected, f"{text!r} became {ids}, expected {expected}"
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded == text, f"{text!r} came back as {decoded!r}"


def golden_forward(family: Family) -> None:
    for case in family.golden.names("forward"):
        if "bf16" not in case:
            family.compare(case, family.model(case))


@torch.no_grad()
def golden_decoding(family: Family) -> None:
    for case in family.golden.names("incremental"):
        model, ids = family.model(case), family.golden.inputs(case)["input_ids"]
        expected, prefill = family.golden.outputs(case)["step_logits"], family.golden.cases[case]["prefill"]
        outputs = model(ids[:, :prefill], use_cache=True)
        steps = [outputs.logits[:, -1]]
        for position in range(prefill, prefill + expected.shape[1] - 1):
            outputs = model(ids[:, position : position + 1], past_key_values=outputs.past_key_values)
            steps.append(outputs.logits[:, -1])
        close(torch.stack(steps, 1), expected)


def golden_generation(family: Family) -> None:
    for case in family.golden.names("generate"):
        sequences = decided(family.model(case), **family.golden.inputs(case))
        assert torch.equal(sequences, family.golden.outputs(case)["sequences"]), case


def greedy(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The 12 greedy tokens after `ids`, whatever they are; none of them by a near tie."""
    return decided(model, ids, max_new_tokens=12, min_new_tokens=12, **kwargs)[:, -12:]


def every_cache(family: Family) -> None:
    for case in ("origin.short20", "dynamic.short20"):
        check_every_cache(lambda backend, case=case: family.model(case, attn_implementation=backend))


def check_every_cache(load_with: Callable[[str], Any]) -> None:
    """One prompt and a padded batch; dynamic, static and beams; eager and sdpa: the tokens of use_cache=False."""
    rows = [tokens(1, 6, seed=1), tokens(1, 11, seed=2)]
    one = (rows[1], torch.ones_like(rows[1]))
    for backend in ("eager", "sdpa"):
        model = load_with(backend)
        for ids, mask in (one, left_padded(*rows)):
            for caching, search in (
                ({}, {}),
                ({"cache_implementation": "static", "disable_compile": True}, {}),
                ({}, {"num_beams": 3}),
            ):
                settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **search}
                found = model.generate(ids, attention_mask=mask, **settings, **caching)
                expected = model.generate(ids, attention_mask=mask, **settings, use_cache=False)
                assert torch.equal(found, expected), (backend, len(ids), caching, search)


def beam_search(family: Family) -> None:
    model, ids = family.model("dynamic.short20"), tokens(2, 8)
    settings = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def left_padded(short: torch.Tensor, long: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows [1, n] in a batch where even the longer one has padding: ids and mask."""
    width = long.shape[1] + 3
    ids = torch.cat([F.pad(row, (width - row.shape[1], 0)) for row in (short, long)])
    mask = torch.cat([F.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in (short, long)])
    return ids, mask


def left_padding(family: Family) -> None:
    check_padded_generation(family.model("dynamic.short20"))


def static_cache(family: Family) -> None:
    """Also where the keys of the padding are zero, which 4.57 and 5.0 take for slots that are not filled."""
    model = family.model("dynamic.short20")
    check_padded_generation(model, cache_implementation="static", disable_compile=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
        for name, parameter in model.named_parameters():
            parameter.mul_(not name.endswith("bias"))
    check_padded_generation(model, cache_implementation="static", disable_compile=True)


def check_padded_generation(model: Any, **kwargs: Any) -> None:
    rows = [tokens(1, 6, seed=1), tokens(1, 11, seed=2)]
    ids, mask = left_padded(*rows)
    batch = greedy(model, ids, attention_mask=mask, **kwargs)
    assert torch.equal(batch, torch.cat([greedy(model, row) for row in rows]))


def chat(family: Family) -> None:
    """Greedy answers, whole and streamed, are the tokens of generate without a cache."""
    model = family.model()
    tokenizer = AutoTokenizer.from_pretrained(family.folder(), trust_remote_code=True)
    settings = {"max_new_tokens": 12, "do_sample": False}
    inputs = model.build_inputs(tokenizer, "the river", [("one", "two")])
    ids = model.generate(**inputs, **settings, use_cache=False)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    response, history = model.chat(tokenizer, "the river", history=[("one", "two")], **settings)
    assert expected.startswith(response), f"{response!r} is not how {expected!r} begins"
    assert response or not expected, "no answer"
    assert history == [("one", "two"), ("the river", response)]
    *_, streamed = model.stream_chat(tokenizer, "the river", history=[("one", "two")], **settings)
    assert streamed == (response, history)


def continuous_batching(family: Family) -> None:
    """generate_batch gives each prompt the tokens of generate."""
    sizes_of = getattr(transformers, "ContinuousBatchingConfig", None)
    assert sizes_of is not None, "the paged cache cannot be sized: it takes all the memory that there is"
    page = "page_size" if hasattr(sizes_of, "page_size") else "block_size"  # renamed in 5.17
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    prompts = [tokens(1, length, seed=length) for length in (3, 21, 11, 24)]
    for backend in ("eager", "sdpa"):
        model = family.model("dynamic.short20", attn_implementation=backend)
        alone = [model.generate(prompt, **settings)[0, prompt.shape[1] :].tolist() for prompt in prompts]
        outcomes = model.generate_batch(
            [prompt[0].tolist() for prompt in prompts],
            generation_config=transformers.GenerationConfig(**settings),
            continuous_batching_config=sizes_of(num_blocks=16, max_batch_tokens=64, **{page: 16}),
        )
        in_order = sorted(outcomes, key=lambda name: int(name.rpartition("_")[2]))
        assert [outcomes[name].generated_tokens for name in in_order] == alone, backend
        # Up to 5.8, generate_batch leaves a backend in the config that has no causal mask.
        again = [model.generate(prompt, **settings)[0, prompt.shape[1] :].tolist() for prompt in prompts]
        assert again == alone, backend


@torch.no_grad()
def other_heads(family: Family) -> None:
    """Token classification and question answering on the golden body: packed rows, saved and loaded again."""
    body = family.model("dynamic.short20")
    rows = [tokens(1, length, seed=length) for length in (7, 40, 1)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    for head in ("ForTokenClassification", "ForQuestionAnswering"):
        cls = getattr(sys.modules[type(body).__module__], type(body).__name__.replace("ForCausalLM", head))
        model = cls(body.config).eval()
        model.model.load_state_dict(body.model.state_dict())
        for packed, *alone in zip(
            scores(model(torch.cat(rows, 1), position_ids=positions)),
            *(scores(model(row)) for row in rows),
            strict=True,
        ):
            close(packed, torch.cat(alone, 1))
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            reloaded = cls.from_pretrained(scratch)
            for name, weight in model.state_dict().items():
                assert torch.equal(reloaded.state_dict()[name], weight), name


def scores(outputs: Any) -> tuple[torch.Tensor, ...]:
    """What a head says of each token."""
    return (outputs.logits,) if "logits" in outputs else (outputs.start_logits, outputs.end_logits)


def attention_weights(family: Family) -> None:
    family.compare("origin.hidden_attn", family.model("origin.hidden_attn"))


def sdpa(family: Family) -> None:
    for case in ("origin.short20", "dynamic.long48", "dynamic.leftpad3", "origin.loss"):
        family.compare(case, family.model(case, attn_implementation="sdpa"))


@torch.no_grad()
def packed_sequences(family: Family) -> None:
    model, rows = family.model("dynamic.short20"), [tokens(1, length, seed=length) for length in (7, 40, 1)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    close(model(torch.cat(rows, 1), position_ids=positions).logits, torch.cat([model(row).logits for row in rows], 1))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    ids = tokens(2, 16)
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def loss_and_backward(family: Family) -> None:
    family.compare("origin.loss", family.model("origin.loss"))
    for name, gradient in gradients(family.model()).items():
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
        assert gradient.any(), f"the gradient of {name} is zero"


def gradient_checkpointing(family: Family) -> None:
    model, checkpointed = family.model(), family.model()
    getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)()
    assert all(layer.gradient_checkpointing for layer in checkpointed.model.layers)
    recomputed = gradients(checkpointed)
    for name, gradient in gradients(model).items():
        close(recomputed[name], gradient)


@torch.no_grad()
def save_and_reload(family: Family) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        first, second = Path(scratch, "first"), Path(scratch, "second")
        model, ids = family.model("dynamic.long48"), tokens(1, 48)
        model.save_pretrained(first)
        reloaded = load(first)
        for name, weight in model.state_dict().items():
            assert torch.equal(reloaded.state_dict()[name], weight), name
        assert_near(reloaded(ids).logits, model(ids).logits)
        reloaded.save_pretrained(second)
        assert (first / "config.json").read_text() == (second / "config.json").read_text()


def lora(family: Family) -> None:
    from peft import LoraConfig, get_peft_model

    names = {"internlm": ["q_proj", "v_proj", "down_proj"], "internlm2": ["wqkv", "wo", "w2"]}
    model = get_peft_model(family.model(), LoraConfig(target_modules=names[family.name], r=2))
    adapted = {name for name, gradient in gradients(model).items() if gradient is not None}
    assert adapted
    assert all("lora_" in name for name in adapted), adapted


def trainer(family: Family) -> None:
    examples = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(8, 16)]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch, max_steps=3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        )
        result = transformers.Trainer(model=family.model(), args=arguments, train_dataset=examples).train()
    assert 0 < result.training_loss < 20


@torch.no_grad()
def offload(family: Family) -> None:
    model, ids = family.model("dynamic.long48"), tokens(1, 48)
    with tempfile.TemporaryDirectory() as scratch:
        places = {name: "disk" for name, _ in model.named_children()} | {"model": "cpu"}
        offloaded = family.model("dynamic.long48", device_map=places, offload_folder=scratch)
        assert_near(offloaded(ids).logits, model(ids).logits)


@torch.no_grad()
def compiled(family: Family) -> None:
    model, ids = family.model("dynamic.long48", attn_implementation="sdpa"), tokens(1, 48)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits, model(ids).logits)


CHECKS: dict[str, Callable[[Family], None]] = {
    "AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification": auto_classes,
    "AutoTokenizer: the ids of SentencePiece, exact round trip": tokenizer,
    "golden forward passes": golden_forward,
    "golden decoding, token by token": golden_decoding,
    "golden greedy generation, cached and uncached": golden_generation,
    "every kind of cache, one prompt and a padded batch = no cache": every_cache,
    "beam search, cached = uncached": beam_search,
    "left-padded generation = each row alone": left_padding,
    "the same with a static cache": static_cache,
    CONTINUOUS_BATCHING: continuous_batching,
    "chat, stream_chat": chat,
    "output_attentions, output_hidden_states": attention_weights,
    'attn_implementation="sdpa"': sdpa,
    "packed sequences = each alone": packed_sequences,
    "token classification, question answering": other_heads,
    "loss and backward": loss_and_backward,
    "gradient checkpointing: the same gradients": gradient_checkpointing,
    "save_pretrained and reload: the same bits": save_and_reload,
    "device_map with cpu and disk": offload,
    "torch.compile(fullgraph=True)": compiled,
    "Trainer": trainer,
    "PEFT LoRA": lora,
}


# -------------------------------------------------------------------------------------------------- saved and loaded


def save_model(source: Path, target: Path) -> None:
    """Saves, and looks that the JSON files say all that they said before: other tools read them raw."""
    load(source).save_pretrained(target)
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in (source, target))
        changed = {key: after.get(key) for key, value in before.items() if after.get(key, ...) != value}
        assert not changed, f"{name} changed: {changed}"


def save_tokenizer(source: Path, target: Path) -> None:
    AutoTokenizer.from_pretrained(source, trust_remote_code=True).save_pretrained(target)


@torch.no_grad()
def load_model(folder: Path) -> None:
    """The rotary setting is the one converted, and the logits are those of the converted model on another version."""
    model, expected = load(folder), load_file(folder / EXPECTED)
    scaling = ("dynamic", SCALING_FACTOR) if "_dynamic_" in folder.name else ("origin", 1.0)
    assert tuple(model.config.rope()) == (ROPE_BASE, *scaling), model.config.rope()
    assert_near(model(expected["input_ids"]).logits, expected["logits"])
    if folder.name.endswith("_by_converter"):
        check_every_cache(lambda backend: load(folder, attn_implementation=backend))


def load_tokenizer(folder: Path) -> None:
    check_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=True), folder)


# ------------------------------------------------------------------------------------------------------- command


def error_of(action: Callable[..., None], *arguments: Any) -> str:
    """What went wrong in one line, "" if nothing did; the whole of it on the error stream."""
    try:
        action(*arguments)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def features(folders: str) -> Results:
    families = [Family(name, Path(folders)) for name in ("internlm", "internlm2")]
    return {title: {f.name: error_of(check, f) for f in families} for title, check in CHECKS.items()}


def save_all(converted: str, target: str) -> Results:
    results: Results = {MODELS: {}, TOKENIZERS: {}}
    for source in sorted(Path(converted).glob("*_by_converter")):
        saved = Path(target, source.name.replace("converter", transformers.__version__.replace(".", "_")))
        saved.mkdir()
        shutil.copyfile(source / EXPECTED, saved / EXPECTED)
        results[MODELS][saved.name] = error_of(save_model, source, saved)
        results[TOKENIZERS][saved.name] = error_of(save_tokenizer, source, saved)
    return results


def load_all(saved: str) -> Results:
    folders = sorted(Path(saved).glob("*_by_*"))
    return {
        MODELS: {folder.name: error_of(load_model, folder) for folder in folders},
        TOKENIZERS: {folder.name: error_of(load_tokenizer, folder) for folder in folders},
    }


def main(arguments: Sequence[str]) -> None:
    command, *rest, results = arguments
    found = {"features": features, "save": save_all, "load": load_all}[command](*rest)
    Path(results).write_text(json.dumps({"transformers": transformers.__version__, **found}), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Old versions warn about themselves; the newest must have nothing to say about our calls.
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24):
        warnings.filterwarnings("error", category=FutureWarning, message=".*(cache|past_key_values)")
    main(sys.argv[1:])
