"""Log the metrics of implicit rewards while training, and for whole evaluation sets."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from bco_lightning.metrics import ImplicitRewardMetrics
from bco_lightning.module import BCOModule


class ImplicitRewardMonitor(Callback):
    """Logs :class:`~bco_lightning.metrics.ImplicitRewardMetrics`.

    Training rows are gathered over ``trainer.log_every_n_steps`` optimizer steps and logged as ``train/...``,
    evaluation rows over the whole set as ``val/...`` and ``test/...``. Processes synchronise only when a value is read.
    The reward shift that a step's losses were computed with is logged as ``train/reward_shift``.
    """

    def __init__(self) -> None:
        self._metrics = {name: ImplicitRewardMetrics() for name in ("train", "val", "test")}
        self._last_step = 0

    @override
    def setup(self, trainer: Trainer, pl_module: BCOModule, stage: str) -> None:  # type: ignore[override]
        device = trainer.strategy.root_device
        for metrics in self._metrics.values():
            metrics.to(device if device.type != "mps" else "cpu")  # MPS has no float64

    @override
    def on_train_start(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        self._metrics["train"].reset()
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: BCOModule, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        metrics = self._metrics["train"]
        metrics.update(outputs["rows"], pl_module.decision_threshold)
        step = trainer.global_step
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._last_step or not interval or (step % interval and step != 1):
            return
        self._last_step = step
        values = {f"train/{name}": float(value) for name, value in metrics.compute().items()}
        values |= {"train/reward_shift": pl_module.reward_shift.value}
        metrics.reset()
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        pl_module.log_dict(
            {
                "loss": values["train/loss"],
                "delta": values["train/reward_shift"],
                "margin": values["train/rewards/margins"],
            },
            prog_bar=True,
            logger=False,
        )

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        self._metrics["val"].reset()

    @override
    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: BCOModule,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._metrics["val"].update(outputs["rows"], pl_module.decision_threshold)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        self._log_evaluation("val", pl_module)

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        self._metrics["test"].reset()

    @override
    def on_test_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: BCOModule,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._metrics["test"].update(outputs["rows"], pl_module.decision_threshold)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        self._log_evaluation("test", pl_module)

    def _log_evaluation(self, name: str, pl_module: BCOModule) -> None:
        values = {f"{name}/{key}": value for key, value in self._metrics[name].compute().items()}
        # Already summed over processes, so Lightning must not synchronise them again.
        pl_module.log_dict({**values, f"{name}/reward_shift": pl_module.reward_shift.value})
