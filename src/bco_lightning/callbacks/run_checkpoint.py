"""Save a run at optimizer-step boundaries: the newest steps, and the last one always."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from bco_lightning.module import BCOModule


class RunCheckpoint(ModelCheckpoint):
    """Keeps the newest checkpoints of a run in its ``checkpoints`` folder, and ``last.ckpt``.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        keep: How many of them to keep, besides ``last.ckpt``.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 1) -> None:
        super().__init__(
            filename="step-{step}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            every_n_train_steps=every_n_steps,
            save_top_k=keep,
            save_last=True,
        )

        # A run that goes on from another folder must not write last-v1.ckpt beside an old last.ckpt.
        self._enable_version_counter = False

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: BCOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # Lightning leaves last.ckpt at the last multiple of every_n_steps.
        if trainer.global_step == pl_module.num_steps() != self._last_global_step_saved:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
