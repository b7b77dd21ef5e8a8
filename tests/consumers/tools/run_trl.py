"""TRL's SFTTrainer: the loss over the assistant's tokens alone, of one conversation."""

from __future__ import annotations

import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


class Sft:
    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def assistant_loss(self, conversation: list[dict[str, str]]) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            settings = SFTConfig(
                scratch,
                assistant_only_loss=True,
                per_device_train_batch_size=1,
                learning_rate=0.0,
                max_steps=1,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            )
            trainer = SFTTrainer(
                self.model,
                args=settings,
                train_dataset=Dataset.from_list([{"messages": conversation}]),
                processing_class=self.tokenizer,
            )
            trainer.train()
            return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def open_folder(folder: str, way: str) -> Sft:
    return Sft(folder)
