"""A rival: TRL's BCOTrainer (1.13.0) or KTOTrainer, whose ``train`` is stopped after each optimizer step."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from workers.turn_taking import Turns


class TakeTurns(TrainerCallback):
    """Waits for its turn after each optimizer step."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.trainer, self.loss = turns, None, 0.0

    def watch(self, trainer: Any) -> None:
        """Notes the loss of each step, which transformers gives to no callback."""
        self.trainer, training_step = trainer, trainer.training_step

        def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = training_step(*args, **kwargs)
            self.loss = loss.item()
            return loss

        trainer.training_step = noted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is there, and with ``precompute_ref_log_probs`` the reference."""
        control.should_training_stop = not self.turns.ready(
            lengths=_lengths(self.trainer.train_dataset),
            versions={name: version(name) for name in ("trl", "torch", "transformers", "peft", "accelerate")},
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is done."""
        control.should_training_stop = not self.turns.done(loss=self.loss)


def _lengths(rows: Dataset) -> list[list[int]]:
    """Tokens and completion tokens of each row, as the trainer made them."""
    if "completion_ids" in rows.column_names:  # KTO
        pairs = zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
        return [[len(prompt) + len(completion), len(completion)] for prompt, completion in pairs]
    pairs = zip(rows["prompt_input_ids"], rows["completion_input_ids"], strict=True)
    return [[len(whole), len(whole) - len(prompt)] for prompt, whole in pairs]


def _trainer_classes(rival: str) -> tuple[Any, Any, dict[str, Any]]:
    if rival == "trl_bco":
        from trl.experimental.bco import BCOConfig, BCOTrainer

        # The collator takes columns that no model has as argument.
        return BCOTrainer, BCOConfig, {"remove_unused_columns": False}
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer, KTOConfig, {"loss_type": "apo_zero_unpaired"}


def main() -> None:
    """Trains as the case on the command line says, on the rows in file order."""
    turns = Turns()
    task = json.loads(sys.argv[1])
    case = task["case"]
    torch.set_num_threads(task["threads"])
    trainer_class, config_class, own_options = _trainer_classes(case["rival"])
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    tokenizer.bos_token = None  # TRL would put one before the prompt, which this model was not trained with
    rows = [json.loads(line) for line in Path(task["rows"]).read_text(encoding="utf-8").splitlines()]
    options = config_class(
        output_dir=str(Path(task["rows"]).parent / "trl"),
        per_device_train_batch_size=case["batch_size"],
        num_train_epochs=1,
        learning_rate=task["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_length=1024,
        bf16=case["bf16"],
        gradient_checkpointing=False,
        precompute_ref_log_probs=case["rival_precompute"],
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **own_options,
    )
    callback = TakeTurns(turns)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32),
        args=options,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=task["lora_r"], lora_alpha=task["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
        if case["lora"]
        else None,
        callbacks=[callback],
    )
    callback.watch(trainer)
    trainer.train()
    turns.stopped()


if __name__ == "__main__":
    main()
