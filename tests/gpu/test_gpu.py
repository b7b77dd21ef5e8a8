"""On CUDA GPUs: every backend beside a float32 reference, and the documented ways to load a model, on one and on two.

The reference of a batch is each of its rows alone, in float32 with eager attention. A backend in bfloat16 or float16
may miss it by no more than 1.2 times what eager attention in the same dtype does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, StaticCache
from transformers.utils import is_flash_attn_2_available

from tests.models.test_model_parallel import assert_computed_as_by, torchrun
from tests.support.model_families import INTERNLM, INTERNLM2, Family, padded, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

HEADS, LAYERS, VOCAB = 4, 4, 320
ALLOWANCE = 1.2
LOSS_SCALE = 1024

Rows = list[torch.Tensor]
Situation = Callable[[Any, Rows], torch.Tensor]

needs_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
over_backends = pytest.mark.parametrize("backend", ["sdpa", pytest.param("flash_attention_2", marks=needs_flash)])
over_families = pytest.mark.parametrize("family", [INTERNLM, INTERNLM2], ids=str)
over_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
over_head_dims = pytest.mark.parametrize("head_dim", [64, 128])
over_shapes = pytest.mark.parametrize(
    ("family", "shape"),
    [
        (INTERNLM, {"bias": True}),
        (INTERNLM, {"bias": False}),
        (INTERNLM2, {"bias": True, "num_key_value_heads": HEADS}),
        (INTERNLM2, {"bias": False, "num_key_value_heads": HEADS}),
        (INTERNLM2, {"bias": True, "num_key_value_heads": 2}),
        (INTERNLM2, {"bias": False, "num_key_value_heads": 1}),
    ],
    ids=["internlm-bias", "internlm", "internlm2-bias", "internlm2", "internlm2-2kv-bias", "internlm2-1kv"],
)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """The reference multiplies in float32 proper, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def small(family: Family, head_dim: int, **overrides: Any) -> Any:
    """A random float32 model on the GPU whose attention is far from uniform; its biases are not zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HEADS * head_dim, "intermediate_size": 3 * HEADS * head_dim}
    heads = {"num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    config = family.config(**sizes, **heads, max_position_embeddings=512, initializer_range=0.06, **overrides)
    model = family.cls("ForCausalLM")(config).cuda().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def in_dtype(model: Any, backend: str, dtype: torch.dtype) -> Any:
    """The same weights, rounded, with another backend."""
    config = type(model.config)(**model.config.to_dict())
    config._attn_implementation = backend
    copy = type(model)(config).to("cuda", dtype).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def some_rows(*lengths: int) -> Rows:
    return [tokens(1, length, seed=length).cuda() for length in lengths]


def on_gpu(rows: Rows, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one padded batch: ids and mask, each [B, longest]."""
    ids, mask = padded(rows, side)
    return ids.cuda(), mask.cuda()


def alone(model: Any, rows: Rows) -> torch.Tensor:
    return torch.cat([model(row).logits[0] for row in rows])


def left_padded(model: Any, rows: Rows) -> torch.Tensor:
    ids, mask = on_gpu(rows, "left")
    return model(ids, attention_mask=mask).logits[mask == 1]


def right_padded(model: Any, rows: Rows) -> torch.Tensor:
    ids, mask = on_gpu(rows, "right")
    return model(ids, attention_mask=mask).logits[mask == 1]


def packed(model: Any, rows: Rows) -> torch.Tensor:
    positions = torch.cat([torch.arange(row.shape[1], device="cuda") for row in rows])[None]
    return model(torch.cat(rows, 1), position_ids=positions).logits[0]


def prefilled_and_decoded(model: Any, rows: Rows, steps: int = 6) -> torch.Tensor:
    ids, mask = on_gpu(rows, "left")
    cache, logits = None, []
    for chunk in ids.split([ids.shape[1] - steps, *[1] * steps], dim=1):
        end = chunk.shape[1] + (0 if cache is None else cache.get_seq_length())
        outputs = model(chunk, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, 1)[mask == 1]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@over_shapes
@over_head_dims
@over_dtypes
@over_backends
@pytest.mark.parametrize("situation", [alone, left_padded, right_padded, packed, prefilled_and_decoded])
@torch.no_grad()
def test_logits(
    family: Family, shape: dict[str, Any], head_dim: int, dtype: torch.dtype, backend: str, situation: Situation
) -> None:
    model = small(family, head_dim, **shape)
    rows = some_rows(70, 129, 200, 33)
    expected = alone(model, rows)
    eager = error(situation(in_dtype(model, "eager", dtype), rows), expected)
    assert 0 < eager < (0.05 if dtype is torch.bfloat16 else 0.01)
    assert error(situation(in_dtype(model, backend, dtype), rows), expected) <= ALLOWANCE * eager


Gradients = list[dict[str, torch.Tensor]]


def gradients(model: Any, batches: list[Rows]) -> Gradients:
    """Every parameter's gradient for every batch, right-padded.

    The loss is scaled up meanwhile, as training in float16 does: without, the gradients of attention scores are too
    small for a float16 and what is compared is how a kernel loses them.
    """
    found = []
    for rows in batches:
        ids, mask = on_gpu(rows, "right")
        model.train().zero_grad(set_to_none=True)
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        (LOSS_SCALE * loss).backward()
        found.append({name: parameter.grad.double() / LOSS_SCALE for name, parameter in model.named_parameters()})
    return found


def pooled_error(actual: Gradients, expected: Gradients, name: str) -> float:
    return error(torch.stack([each[name] for each in actual]), torch.stack([each[name] for each in expected]))


@over_shapes
@over_head_dims
@over_dtypes
@over_backends
def test_gradients_of_every_parameter(
    family: Family, shape: dict[str, Any], head_dim: int, dtype: torch.dtype, backend: str
) -> None:
    """Over several batches: from one alone, the errors of two backends differ by a quarter through chance, even
    between kernels on a CPU, in the biases above all."""
    model = small(family, head_dim, **shape)
    batches = [[tokens(1, length, seed=100 * batch + length) for length in (70, 129, 33)] for batch in range(8)]
    expected = gradients(model, batches)
    eager = gradients(in_dtype(model, "eager", dtype), batches)
    errors = {name: pooled_error(eager, expected, name) for name in expected[0]}
    assert all(map(math.isfinite, errors.values()))
    actual = gradients(in_dtype(model, backend, dtype), batches)
    beyond = {
        name: (found, limit)
        for name in expected[0]
        if not (found := pooled_error(actual, expected, name)) <= (limit := ALLOWANCE * errors[name])  # NaN, too
    }
    assert not beyond


@over_families
@over_dtypes
@over_backends
@torch.no_grad()
def test_greedy_tokens(family: Family, dtype: torch.dtype, backend: str) -> None:
    """Where the tokens are not the reference's own, the reference puts them behind its own by rounding only."""
    model = small(family, 64)
    ids, mask = on_gpu(some_rows(40, 23, 31), "left")
    generated = in_dtype(model, backend, dtype).generate(
        ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False
    )
    mask = torch.nn.functional.pad(mask, (0, 24), value=1)
    logits = model(generated, attention_mask=mask).logits[:, ids.shape[1] - 1 : -1]
    logits[..., model.config.eos_token_id] = -math.inf  # min_new_tokens forbids the end
    chosen = logits.gather(-1, generated[:, ids.shape[1] :, None]).squeeze(-1)
    behind = (logits.amax(-1) - chosen) / model(generated, attention_mask=mask).logits.std()
    assert behind.max() < (0.1 if dtype is torch.bfloat16 else 0.02)
    assert (behind == 0).float().mean() > 0.9


@over_families
@torch.no_grad()
def test_compiled_decoding_with_a_static_cache(family: Family) -> None:
    model = small(family, 64, attn_implementation="sdpa").bfloat16()
    ids = tokens(1, 30).cuda()
    step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
    static = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :20], past_key_values=static, use_cache=True)
    dynamic = model(ids[:, :20], use_cache=True).past_key_values
    for position in range(20, 30):
        token = ids[:, position : position + 1]
        with torch.compiler.set_stance("fail_on_recompile" if position > 21 else "default"):
            actual = step(token, past_key_values=static, use_cache=True).logits
        expected = model(token, past_key_values=dynamic, use_cache=True).logits
        assert error(actual, expected) < 0.02


@over_families
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [True, False])
def test_generate_compiles_as_one_graph(family: Family, backend: str, masked: bool) -> None:
    model, ids = small(family, 64, attn_implementation=backend), tokens(1, 20).cuda()
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **mask}
    torch.compiler.reset()
    whole = CompileConfig(fullgraph=True)
    compiled = model.generate(ids, cache_implementation="static", compile_config=whole, **settings)
    assert torch.equal(compiled, model.generate(ids, use_cache=False, **settings))


@over_families
@pytest.mark.parametrize("rope", ["origin", "dynamic"])
def test_generate_compiles_for_lengths_and_batches_as_they_come(family: Family, rope: str) -> None:
    """As it does by itself, with nothing but a static cache asked for."""
    model = small(family, 64, rope=rope, attn_implementation="sdpa")
    torch.compiler.reset()
    for batch, length in ((1, 20), (1, 20), (1, 40), (1, 64), (3, 30)):
        ids = tokens(batch, length, seed=length).cuda()
        mask = (torch.arange(length) >= 2 * torch.arange(batch)[:, None]).long().cuda()
        settings = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        compiled = model.generate(ids, cache_implementation="static", **settings)
        assert torch.equal(compiled, model.generate(ids, use_cache=False, **settings)), (batch, length)


def continued(model: Any, prompts: Rows) -> torch.Tensor:
    """16 greedy tokens after each prompt, by continuous batching, [n, 16]."""
    greedy = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)
    outcomes = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts], generation_config=greedy, continuous_batching_config=sizes
    )
    assert [outcome.error for outcome in outcomes.values()] == [None] * len(prompts)
    order = sorted(outcomes, key=lambda name: int(name.rpartition("_")[2]))
    return torch.tensor([outcomes[request].generated_tokens for request in order], device="cuda")


@over_families
@pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"), reason="this transformers cannot size the paged cache"
)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("sdpa", torch.float32), pytest.param("flash_attention_2", torch.bfloat16, marks=needs_flash)],
)
@torch.no_grad()
def test_continuous_batching_of_64_requests(family: Family, backend: str, dtype: torch.dtype) -> None:
    """Tokens that the reference, each request alone, puts behind its own by rounding only: in float32, its own."""
    reference = small(family, 64)
    prompts = [tokens(1, 3 + 7 * number % 97, seed=number).cuda() for number in range(64)]
    model = in_dtype(reference, backend, dtype)
    model.set_attn_implementation(f"paged|{backend}")  # where flash-attn is installed, generate_batch would take it
    found = continued(model, prompts)
    behind = []
    for prompt, new in zip(prompts, found, strict=True):
        logits = reference(torch.cat((prompt, new[None]), 1)).logits[0, prompt.shape[1] - 1 : -1]
        behind.append((logits.amax(-1) - logits.gather(-1, new[:, None]).squeeze(-1)) / logits.std())
    furthest = torch.stack(behind).max().item()
    assert furthest < (1e-4 if dtype is torch.float32 else 0.1)


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(family: Family, tmp_path: Path) -> Path:
    small(family, 64).bfloat16().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)


@over_families
@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.float32),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": torch.float16}, torch.float16),
        pytest.param(
            {"torch_dtype": torch.float16, "attn_implementation": "flash_attention_2"}, torch.float16, marks=needs_flash
        ),
        ({"torch_dtype": torch.float16, "device_map": "auto"}, torch.float16),
        pytest.param(
            {"torch_dtype": torch.float16, "device_map": "auto", "attn_implementation": "flash_attention_2"},
            torch.float16,
            marks=needs_flash,
        ),
    ],
    ids=["float32", "auto", "float16", "flash", "device_map", "device_map-flash"],
)
@torch.no_grad()
def test_documented_loads(family: Family, folder: Path, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    model = load(folder, **arguments)
    if "device_map" not in arguments:
        model = model.cuda()
    assert model.dtype == dtype
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    ids = tokens(2, 50).cuda()
    reference = small(family, 64).bfloat16().float()
    limit = 1e-5 if dtype is torch.float32 else 0.05
    assert error(model(ids).logits, reference(ids).logits) < limit
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (2, 54)


def assert_spread_by_layers(folder: Path, backend: str, second: int | str) -> None:
    """With room for 0.6 of the model on the first GPU, whole layers go to the second device; nothing else changes."""
    arguments = {"torch_dtype": torch.float16, "attn_implementation": backend}
    whole = load(folder, **arguments).cuda()
    size = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
    model = load(folder, device_map="auto", max_memory={0: int(0.6 * size), second: "4GiB"}, **arguments)
    assert {str(device) for device in model.hf_device_map.values()} == {"0", str(second)}
    assert not [name for name in model.hf_device_map if name.startswith("model.layers.") and name.count(".") > 2]
    for layer in model.model.layers:
        assert len({parameter.device for parameter in layer.parameters()}) == 1
    ids, mask = on_gpu(some_rows(50, 33), "left")
    assert torch.equal(model(ids, attention_mask=mask).logits, whole(ids, attention_mask=mask).logits)
    continued = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **continued), whole.generate(ids, **continued))


@over_families
@over_backends
@torch.no_grad()
def test_a_gpu_with_too_little_memory_offloads_whole_layers(family: Family, folder: Path, backend: str) -> None:
    assert_spread_by_layers(folder, backend, "cpu")


# -- two GPUs --------------------------------------------------------------------------------------------------------


@needs_two
@over_families
@over_backends
@torch.no_grad()
def test_device_map_spreads_whole_layers_over_two_gpus(family: Family, folder: Path, backend: str) -> None:
    assert_spread_by_layers(folder, backend, 1)


@needs_two
@over_families
@torch.no_grad()
def test_tensor_parallelism_over_two_gpus(family: Family, tmp_path: Path) -> None:
    """Two processes, NCCL: what one GPU computes, in float32."""
    model = family.model("dynamic")
    model.save_pretrained(tmp_path / "folder")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    run = torchrun(family, tmp_path / "folder", tmp_path / "out.pt", gpus=",".join(visible[:2]))
    assert run.returncode == 0, run.stderr
    result = torch.load(tmp_path / "out.pt", map_location="cuda")
    assert result["backend"] == "nccl"
    assert_computed_as_by(model.cuda(), result)


@over_families
@needs_flash
def test_flash_attention_in_float32_is_refused(family: Family, folder: Path) -> None:
    with pytest.raises(ValueError, match="float16 or bfloat16 only"):
        load(folder, attn_implementation="flash_attention_2")
