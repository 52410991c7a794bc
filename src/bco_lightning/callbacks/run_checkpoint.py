"""Save a run at optimizer-step boundaries: the newest steps, and the last one always."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


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

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning writes last.ckpt here only if nothing was saved before, which leaves it behind the final step.
        if trainer.global_step != self._last_global_step_saved:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
