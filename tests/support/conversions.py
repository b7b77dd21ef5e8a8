"""Runs of the scripts in this process, what they wrote, and the checkpoints that they are tried on."""

from __future__ import annotations

import filecmp
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support.checkpoints import SHAPES, Shape
from weight_conversion.command_line import convert_parser, revert_parser, run_convert, run_revert

REPOSITORY = Path(__file__).resolve().parents[2]
CARRIED = REPOSITORY / "tests" / "support" / "data" / "internevo"
SHARED = REPOSITORY.parent / "shared" / "internevo_checkpoints"
NO_SHARED = "needs the training framework's own checkpoints beside the repository (../shared)"
FAMILIES = ("internlm", "internlm2")
EIGHT_HEADS = {
    "internlm": Shape(hidden=64, layers=2, heads=8, kv_heads=8, intermediate=1024),
    "internlm2": Shape(hidden=128, layers=2, heads=16, kv_heads=8),
}

SIZES_OF_ISP = [(1, 1), (1, 4), (2, 2), (2, 4), (4, 2), (4, 1)]
DIVISIBLE_BY_THREE = Shape(hidden=48, layers=2, heads=6, kv_heads=6, intermediate=768)
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    *[(family, {"tp": 2, "pp": 2}) for family in FAMILIES],
    *[(family, {"tp": 2, "pp": 3}) for family in FAMILIES],
    *[(family, {"pp": 2, "chunks": 2}) for family in FAMILIES],
    *[(family, {"tp": 2, "pp": 2, "prefix": "model.", "inv_freq": True}) for family in FAMILIES],
    *[(family, {"tp": 2, "embedding": "unnamed vocabulary"}) for family in FAMILIES],
    *[(family, {"tp": 2, "interleaved": True, "bias": True}) for family in FAMILIES],
    ("internlm2", {"tp": 2, "fused": False, "bias": True}),
    ("internlm2", {"tp": 2, "fused": False, "interleaved": True}),
    ("internlm2", {"omit": ("adapt_hf", "norm_head", "layer_norm_epsilon", "no_bias", "embed_split_hidden")}),
    *[(family, {"tp": tp, "wp": wp, "bias": True}) for family in FAMILIES for tp, wp in SIZES_OF_ISP],
    *[(family, {"tp": 2, "wp": 3, "shape": DIVISIBLE_BY_THREE}) for family in FAMILIES],
    *[(family, {"tp": 4, "wp": 2, "pp": 2, "chunks": 2}) for family in FAMILIES],
    *[(family, {"wp": wp, "fused_mlp": True}) for family in FAMILIES for wp in (1, 2, 4)],
    *[(family, {"wp": 8, "isp_2025": True, "bias": True, "interleaved": True, "pp": 3}) for family in FAMILIES],
    *[(family, {"wp": 4, "isp_2025": True, "embedding": "unnamed vocabulary"}) for family in FAMILIES],
    *[(family, {"wp": 16, "interleaved": True, "bias": True}) for family in FAMILIES],
    *[(family, {"pp": 2, "chunks": 2, "v_shaped": True}) for family in FAMILIES],
    *[
        (family, {"pp": 2, "chunks": 2, "v_shaped": True, "shape": replace(SHAPES[family], layers=6)})
        for family in FAMILIES
    ],
    ("internlm", {"tp": 2, "wp": 4, "mlp_version": 1}),
    ("internlm", {"tp": 2, "wp": 4, "llama_like": True}),
    ("internlm2", {"tp": 2, "wp": 4, "fused": False, "interleaved": True, "bias": True}),
    *[
        ("internlm2", {"pieces": True, "bias": bias, **sizes})
        for bias, sizes in (
            (False, {}),
            (True, {"tp": 2, "interleaved": True}),
            (False, {"tp": 2, "wp": 4, "pp": 2, "interleaved": True}),
            (True, {"wp": 4, "isp_2025": True}),
            (False, {"wp": 3, "shape": DIVISIBLE_BY_THREE, "omit": ("enable_qkv_fusion",)}),
        )
    ],
    ("internlm", {"tp": 2, "mlp_version": 1}),
    ("internlm", {"tp": 2, "llama_like": True, "mlp_version": 1}),
    ("internlm", {"tp": 2, "llama_like": True, "mlp_version": 2}),
]


def convert_status(family: str, source: Path, target: Path, tokenizer: Path, *flags: str) -> int:
    parser = convert_parser("convert", family, 1.0, versions=family == "internlm")
    words = ["--src", str(source), "--tgt", str(target), "--tokenizer", str(tokenizer), *flags]
    return run_convert(family, parser.parse_args(words))


def revert_status(family: str, source: Path, target: Path, tp: int, *flags: str) -> int:
    parser = revert_parser("revert", family, versions=family == "internlm")
    words = ["--src", str(source), "--tgt", str(target), "--tp_size", str(tp), *flags]
    return run_revert(family, parser.parse_args(words))


def convert(family: str, source: Path, target: Path, tokenizer: Path, *flags: str) -> None:
    assert convert_status(family, source, target, tokenizer, *flags) == 0


def revert(family: str, source: Path, target: Path, tp: int, *flags: str) -> None:
    assert revert_status(family, source, target, tp, *flags) == 0


def convert_refusal(family: str, source: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The sentence with which converting is refused; nothing is written."""
    capsys.readouterr()
    target = source.with_name("refused")
    assert convert_status(family, source, target, tokenizer, *flags) == 1
    assert not target.exists()
    return capsys.readouterr().err


def revert_refusal(family: str, source: Path, capsys: pytest.CaptureFixture[str], *flags: str, tp: int = 1) -> str:
    """The sentence with which reverting is refused; nothing is written."""
    capsys.readouterr()
    target = source.with_name("refused")
    assert revert_status(family, source, target, tp, *flags) == 1
    assert not target.exists()
    return capsys.readouterr().err


def assert_revert_refused(
    family: str, source: Path, words: list[str], capsys: pytest.CaptureFixture[str], *flags: str, tp: int = 1
) -> None:
    """Reverting is refused in a sentence with all `words`."""
    sentence = revert_refusal(family, source, capsys, *flags, tp=tp)
    assert all(word in sentence for word in words), sentence


def run_flags(choices: dict[str, Any]) -> list[str]:
    """Revert's flags, beside --tp_size, for the run that these choices of checkpoints.Recipe describe."""
    flags = ["--embed_split"] if choices.get("embedding", "hidden") == "hidden" else []
    named = {"pp": "--pp_size", "wp": "--wp_size", "chunks": "--num_chunks", "mlp_version": "--version"}
    flags += [word for key, flag in named.items() if choices.get(key) for word in (flag, str(choices[key]))]
    flags += ["--mlp_layer_fusion"] if choices.get("fused_mlp") else []
    return flags + (["--isp", "2025"] if choices.get("isp_2025") else [])


def settings(folder: Path) -> dict[str, Any]:
    """What config.json of a Hugging Face folder says."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def change_settings(folder: Path, change: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(settings(folder) | change))


def shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("model_*p*_pp*.pt"))}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_files_are_those_of(saved: Path, ours: Path) -> None:
    """The weight files and index of `save_pretrained`, byte by byte; of transformers 4, which orders the tensors in
    another way, only the tensors."""
    if int(transformers.__version__.split(".")[0]) < 5:
        assert_same(weights(ours), weights(saved))
        return
    names = {path.name for path in saved.glob("model[.-]*")}
    assert names == {path.name for path in ours.glob("model[.-]*")}
    assert len(names) > 3
    for name in names:
        assert filecmp.cmp(saved / name, ours / name, shallow=False), name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def save_as_bin(folder: Path) -> None:
    """The weights of a folder as .bin files too, in two of them without an index."""
    tensors = weights(folder)
    names = sorted(tensors)
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        torch.save({name: tensors[name] for name in half}, folder / f"pytorch_model-0000{number}-of-00002.bin")


def names_of(folder: Path) -> tuple[str, int, list[str]]:
    """Family, tensor-parallel size and revert's other flags for a folder named as in ../shared."""
    family, *rest = folder.name.replace("_isp_", "_").split("_")
    flags = ["--embed_split"] if "split" in rest else []
    for word in rest:
        for size in ("wp", "pp"):
            flags += [f"--{size}_size", word.removeprefix(size)] if word.startswith(size) else []
    old = family == "internlm" and bool({"legacymlp", "2023"} & set(rest))
    flags += ["--mlp_layer_fusion"] if "fusion" in rest else []
    return family, int(rest[0].removeprefix("tp")), flags + (["--version", "1"] if old else [])


def real_checkpoints() -> list[Any]:
    carried = [pytest.param(CARRIED / "internlm2_tp2", id="carried internlm2_tp2")]
    found = sorted(SHARED.glob("*"))
    missing = [] if found else [pytest.param(None, id="shared", marks=pytest.mark.skip(reason=NO_SHARED))]
    return carried + missing + [pytest.param(path, id=path.name) for path in found]
