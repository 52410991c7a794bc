"""Reads a log as TRL 1.13's BCOTrainer does, up to the first micro-batch; the model has one layer of 16 numbers."""

from __future__ import annotations

import json
import sys
import tempfile

from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.experimental.bco import BCOConfig, BCOTrainer

from workers.watched import Watched


def main() -> None:
    """Reads as the task on the command line says."""
    task = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    tokenizer.bos_token = None  # TRL would put one before the prompt, which this model was not trained with
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    with tempfile.TemporaryDirectory() as folder:
        options = BCOConfig(
            output_dir=folder, per_device_train_batch_size=8, max_length=1024, use_cpu=True, bf16=False, report_to=[],
            dataloader_pin_memory=False, remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        watched = Watched()
        watched.start()
        rows = load_dataset("json", data_files=task["rows"], split="train", cache_dir=folder)
        trainer = BCOTrainer(model=model, args=options, train_dataset=rows, processing_class=tokenizer)
        watched.mark("read")
        batch = next(iter(trainer.get_train_dataloader()))
        watched.mark("first_batch")
        watched.report(tokens=int(batch["completion_attention_mask"].sum()))


if __name__ == "__main__":
    main()
