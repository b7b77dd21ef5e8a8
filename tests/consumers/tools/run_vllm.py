"""vLLM on a CPU, in float32: in this process, or as a server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

from http_server import Server
from protocol import NEW_TOKENS

LENGTH = 150


def settings(folder: str, way: str) -> dict[str, Any]:
    """What LLM(...) is called with."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    chosen: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": LENGTH,
        "enforce_eager": True,
        "trust_remote_code": "auto_map" in config,
    }
    if (config["rope_scaling"] or {}).get("type", (config["rope_scaling"] or {}).get("rope_type")) == "dynamic":
        chosen |= {"enable_chunked_prefill": False, "enable_prefix_caching": False}
    if way == "hf_overrides":
        without_head = {
            **config["auto_map"],
            "AutoModel": config["auto_map"]["AutoModel"].replace("ForCausalLM", "Model"),
        }
        chosen |= {"model_impl": "transformers", "hf_overrides": {"auto_map": without_head}}
    return chosen


def open_folder(folder: str, way: str) -> Any:
    return served(folder, way) if "server" in way else InProcess(folder, way)


class InProcess:
    def __init__(self, folder: str, way: str) -> None:
        from vllm import LLM

        self.llm = LLM(folder, max_num_seqs=4, **settings(folder, way))

    def _generate(self, prompts: list[Any], **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        return self.llm.generate(prompts, SamplingParams(temperature=0, ignore_eos=True, **sampling), use_tqdm=False)

    def scores(self, ids: list[int]) -> list[float]:
        (output,) = self._generate([{"prompt_token_ids": ids}], max_tokens=1, prompt_logprobs=0)
        return [found[token].logprob for found, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        outputs = self._generate([{"prompt_token_ids": ids} for ids in prompts], max_tokens=NEW_TOKENS)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def tokens(self, text: str) -> list[int]:
        return list(self._generate([text], max_tokens=1)[0].prompt_token_ids)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return list(self.llm.chat(messages, use_tqdm=False)[0].prompt_token_ids)

    def ends(self) -> list[int]:
        named = self.llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id", [])
        named = [named] if isinstance(named, int) else named
        return sorted({*named, self.llm.get_tokenizer().eos_token_id})


def served(folder: str, way: str) -> Server:
    chosen = settings(folder, way)
    flags = ["--dtype", "float32", "--max-model-len", str(LENGTH), "--enforce-eager"]
    if chosen["trust_remote_code"]:
        flags.append("--trust-remote-code")
    return Server([sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder], flags, model=folder)
