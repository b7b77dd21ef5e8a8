"""sentence-transformers with mean pooling: a folder whose AutoModel is the model without head."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer


class Embeddings:
    def __init__(self, folder: str, way: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            if "auto_map" in way:
                folder = without_head(folder, Path(scratch, "folder"))
            settings = {"trust_remote_code": True}
            transformer = Transformer(
                folder, model_args={**settings, "dtype": "float32"}, config_args=settings, tokenizer_args=settings
            )
            transformer.tokenizer.pad_token = transformer.tokenizer.pad_token or transformer.tokenizer.eos_token
            pooling = Pooling(transformer.get_word_embedding_dimension(), pooling_mode="mean")
            self.model = SentenceTransformer(modules=[transformer, pooling], device="cpu")

    def embeddings(self, texts: list[str]) -> Any:
        return self.model.encode(texts, batch_size=4)


def without_head(folder: str, copy: Path) -> str:
    """A copy of the folder whose auto_map names the model without head as AutoModel."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["auto_map"]["AutoModel"] = config["auto_map"]["AutoModel"].replace("ForCausalLM", "Model")
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(copy)


def open_folder(folder: str, way: str) -> Embeddings:
    return Embeddings(folder, way)
