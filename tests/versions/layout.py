"""Names of the folders that every transformers version is tried on; folders.py makes them."""

from __future__ import annotations

from pathlib import Path

from tests.support.golden import Golden

HEADS = {
    "causal_lm": "ForCausalLM",
    "base_model": "ForCausalLM",
    "sequence_classification": "ForSequenceClassification",
}
"""The class whose weights lie in the folder for a golden case; AutoModel loads ForCausalLM, as in published folders."""

TOKENIZER = "tokenizer.model"
"""The SentencePiece model that all folders share."""

EXPECTED = "expected.safetensors"
"""input_ids and logits of a converted model, beside its weights."""

ROPE_BASE = 1000000
"""Base of the converted models' rotary embedding."""

SCALING_FACTOR = 3.0
"""Factor of those with dynamic NTK scaling."""


# Titles of the tables of what one version saved and another loaded.
MODELS, TOKENIZERS = "Models saved and loaded", "Tokenizers saved and loaded"

CONTINUOUS_BATCHING = "generate_batch = generate"
"""Title of the row that the oldest versions fail."""


def golden_folder(root: Path, family: str, name: str) -> Path:
    """Where the folder for a golden case of a family lies under `root`."""
    case = Golden(family).cases[name]
    biased = case["config_overrides"].get("bias", True)
    return root / f"{family}_{HEADS[case['cls']]}_{case['rope']}{'' if biased else '_nobias'}"
