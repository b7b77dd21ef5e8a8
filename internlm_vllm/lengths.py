"""What dynamic NTK scaling needs to know of the requests that vLLM runs. Imports no vLLM."""

from __future__ import annotations

from typing import Any

import torch


def refuse_longer(trained: int, vllm_config: Any) -> None:
    """Raise ValueError where a request may be longer than `trained` tokens.

    InternLM rotates the keys of all tokens anew with each token beyond them; vLLM caches them rotated.
    """
    longest = vllm_config.model_config.max_model_len
    if longest > trained:
        raise ValueError(
            f"Beyond {trained} tokens InternLM with dynamic NTK scaling rotates all keys anew with every token, which "
            f"vLLM's cache cannot do, and vLLM may serve requests of {longest} tokens. Start it with "
            f"--max-model-len {trained}."
        )


def refuse_cut_prompts(trained: int, vllm_config: Any) -> None:
    """Raise ValueError where a prompt beyond `trained` tokens may come in pieces, or with a beginning of another's.

    Keys are rotated by the length of the whole prompt, which the model does not know of a piece.
    """
    longest = vllm_config.model_config.max_model_len
    if longest <= trained:
        return
    flags = []
    if vllm_config.scheduler_config.enable_chunked_prefill:
        flags.append("--no-enable-chunked-prefill")
    if vllm_config.cache_config.enable_prefix_caching:
        flags.append("--no-enable-prefix-caching")
    if flags:
        raise ValueError(
            f"The model has dynamic NTK scaling beyond {trained} tokens, which goes by the length of the whole prompt, "
            f"and vLLM may serve requests of {longest} tokens with prompts in pieces or with cached beginnings. Start "
            f"it with {' '.join(flags)}, or with --max-model-len {trained}."
        )


def request_lengths(metadata: Any, tokens: int) -> torch.Tensor | None:
    """Length, with these tokens, of the request that each token of a step belongs to, [1, tokens].

    None where there are no requests: vLLM measures memory and warms up with passes that have none.

    Args:
        metadata: what vLLM's attention is told: of each layer by its name, or of all; None or empty without requests.
            Its query_start_loc [n + 1] says where the tokens of the n requests start, its seq_lens [n] how long they
            are.

    Raises:
        ValueError: the attention backend is not told these.
    """
    one = next(iter(metadata.values()), None) if isinstance(metadata, dict) else metadata
    if one is None:
        return None
    starts, lengths = (getattr(one, name, None) for name in ("query_start_loc", "seq_lens"))
    if starts is None or lengths is None:
        raise ValueError(
            "Dynamic NTK scaling goes by the length of each request, which vLLM does not tell in "
            f"{type(one).__name__}. Choose another attention backend (--attention-backend FLASH_ATTN or TRITON_ATTN)."
        )
    if not len(lengths):
        return None
    places = torch.arange(tokens, device=starts.device)
    request = torch.searchsorted(starts[1:].contiguous(), places, right=True).clamp(max=len(lengths) - 1)
    return lengths[request].unsqueeze(0)  # tokens beyond the last request are padding
