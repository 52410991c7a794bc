"""One progress bar over all optimizer steps of a run, so that the time left is that of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from bco_lightning.batch import StepSummary
from bco_lightning.callbacks.step_callback import StepCallback

if TYPE_CHECKING:
    from bco_lightning.module import BCOModule


class StepProgressBar(StepCallback, TQDMProgressBar):
    """Shows step, time left, loss, reward shift (delta), margin and tokens per second."""

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        values = {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        return {name: _shown(value) if isinstance(value, float) else value for name, value in values.items()}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.train_progress_bar = self.init_train_tqdm()
        self.train_progress_bar.set_description("Steps")
        self.train_progress_bar.reset(total=pl_module.num_steps())
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step

    @override
    def on_train_epoch_start(self, *_: Any) -> None:
        """Keeps the bar: the parent starts a new one for every epoch."""

    @override
    def on_step_end(self, trainer: Trainer, module: BCOModule, summary: StepSummary) -> None:
        bar = self.train_progress_bar
        if self._should_update(summary.step, bar.total):
            bar.set_postfix(self.get_metrics(trainer, module), refresh=False)
            bar.update(summary.step - bar.n)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
