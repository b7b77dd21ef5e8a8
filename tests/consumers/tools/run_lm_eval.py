"""lm-eval's model of transformers: the log-likelihood of the second half of a prompt, after the first."""

from __future__ import annotations

from lm_eval.models.huggingface import HFLM

LONGEST = 256  # else it keeps the last max_position_embeddings tokens


class LmEval:
    def __init__(self, folder: str) -> None:
        settings = {"trust_remote_code": True, "dtype": "float32", "device": "cpu", "max_length": LONGEST}
        self.model = HFLM(pretrained=folder, batch_size=1, **settings)

    def likelihood(self, ids: list[int]) -> float:
        half = len(ids) // 2
        ((found, _),) = self.model._loglikelihood_tokens([(("", ""), ids[:half], ids[half:])], disable_tqdm=True)
        return found

    def tokens(self, text: str) -> list[int]:
        return self.model.tok_encode(text, add_special_tokens=True)


def open_folder(folder: str, way: str) -> LmEval:
    return LmEval(folder)
