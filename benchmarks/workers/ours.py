"""Ours: ``Trainer.fit(BCOModule, FeedbackDataModule)``, stopped after each optimizer step."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from bco_lightning import BCOModule, FeedbackDataModule, LoraSettings
from bco_lightning.callbacks import ImplicitRewardMonitor, MetricsFile, SpeedMonitor, StepProgressBar
from bco_lightning.identity import versions
from bco_lightning.models.layout import layout_of
from workers.turn_taking import Turns


class TakeTurns(Callback):
    """Waits for its turn after each optimizer step.

    Args:
        turns: The conversation.
        data: Gives the rows.
    """

    def __init__(self, turns: Turns, data: FeedbackDataModule) -> None:
        self.turns, self.data = turns, data
        self._began = time.perf_counter()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """The rows are there; what comes now is the model, and whatever it computes before the first step."""
        self._began = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Says which rows each step will train on, and how long they are."""
        rows = self.data.train_dataset
        trainer.should_stop = not self.turns.ready(
            plan=list(trainer.train_dataloader.batch_sampler),  # type: ignore[union-attr]
            lengths=[
                [len(ids), sum(mask)] for ids, mask in zip(rows["input_ids"], rows["completion_mask"], strict=True)
            ],
            preparation_seconds=time.perf_counter() - self._began,
            layout=layout_of(pl_module.policy),
            model=_sizes(pl_module.policy),
            versions=versions(),
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is done."""
        more = self.turns.done(loss=float(outputs["loss"]), rows=batch.row_ids_B.tolist())
        trainer.should_stop = not more


class Unwatched(ImplicitRewardMonitor):
    """Stands in the place of the monitor that every run has, and looks at nothing."""

    def on_step_end(self, trainer: Trainer, module: Any, summary: Any) -> None:
        """Gathers and logs nothing."""


def _shown(task: dict[str, Any], callbacks: list[Callback]) -> dict[str, Any]:
    """What a run of the command line logs and shows, of every step, where the task has a folder for it; or nothing."""
    folder = task.get("run_folder")
    if folder is None:
        silent = [Unwatched()] if task["case"]["rival"] == "unwatched" else []
        return {"callbacks": [*silent, *callbacks], "logger": False, "enable_progress_bar": False}
    return {
        "callbacks": [SpeedMonitor(), StepProgressBar(), *callbacks],
        "logger": [TensorBoardLogger(folder, name="", version=""), MetricsFile(folder)],
        "log_every_n_steps": 1,
    }


def _sizes(policy: Any) -> dict[str, int]:
    """What the number of useful operations depends on, without the adapters, which add little."""
    model = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    config = model.config
    body = sum(
        parameter.numel()
        for name, parameter in model.model.named_parameters()
        if "lora_" not in name and "embed_tokens" not in name
    )
    return {
        "body_parameters": body,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "attention_size": config.num_attention_heads * config.head_dim,
    }


def main() -> None:
    """Trains as the case on the command line says."""
    turns = Turns()
    task = json.loads(sys.argv[1])
    case = task["case"]
    torch.set_num_threads(task["threads"])
    lora, bf16 = case["lora"], case["bf16"]
    module = BCOModule(
        task["model"],
        learning_rate=task["learning_rate"],
        lora=LoraSettings(r=task["lora_r"], alpha=task["lora_alpha"]) if lora else None,
        dtype="bfloat16" if lora and bf16 else "float32",
        lr_schedule="constant_with_warmup",
        warmup_ratio=0.0,
        class_weights="none",  # a mean over rows, as TRL has it
        reference_log_probs=case["reference"],
        compile=case["compiled"],
    )
    data = FeedbackDataModule(
        task["rows"],
        batch_size=case["batch_size"],
        max_length=1024,
        chat_template="plain",
        validation_fraction=0.0,
        group_by_prompt=case["completions_per_prompt"] > 1,
    )
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if bf16 and not lora else "32-true",
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **_shown(task, [TakeTurns(turns, data)]),
    ).fit(module, data)
    turns.stopped()


if __name__ == "__main__":
    main()
