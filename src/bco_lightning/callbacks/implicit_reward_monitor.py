"""Log the metrics of implicit rewards while training, and for whole evaluation sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from bco_lightning.batch import StepSummary
from bco_lightning.callbacks.step_callback import StepCallback, is_time_to_log, log_step
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.metrics import ImplicitRewardMetrics

if TYPE_CHECKING:
    from bco_lightning.module import BCOModule

# A mean reward of 20 is a probability within 2e-9 of 0 or 1: such rows teach nothing, and the policy is far away.
_EXPLODED = 20.0
_MOVED = 0.1  # all rewards are 0 at first, which is on neither side
_PATIENCE = 3


class ImplicitRewardMonitor(StepCallback):
    """Logs :class:`~bco_lightning.metrics.ImplicitRewardMetrics`.

    Training rows are gathered over ``trainer.log_every_n_steps`` optimizer steps and logged as ``train/...``,
    evaluation rows over the whole set as ``val/...`` and ``test/...``; where there are several sources, those of each
    too, as ``train/by_source/NAME/...``. Processes synchronise only when a value is read, and when a checkpoint is
    written, which holds what was gathered so far. The reward shift that a step's losses were computed with is logged as
    ``train/reward_shift``. Callbacks of Lightning can monitor each of these names.

    Warns when a class's mean reward explodes, and when the classifier gives every row the same thumb.
    """

    def __init__(self) -> None:
        self._metrics = {name: ImplicitRewardMetrics() for name in ("train", "val", "test")}
        self._trainer: Trainer | None = None
        self._resumed: dict[str, Tensor] = {}
        self._collapsed = 0
        self._warned: set[str] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._trainer = trainer
        data, device = getattr(trainer, "datamodule", None), trainer.strategy.root_device
        for name in self._metrics:
            sources = data.source_names(name) if isinstance(data, FeedbackDataModule) else ()
            metrics = ImplicitRewardMetrics(sources)
            self._metrics[name] = metrics.to(device if device.type != "mps" else "cpu")  # MPS has no float64

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._metrics["train"].reset()
        if self._resumed and trainer.is_global_zero:
            self._metrics["train"].take_over(self._resumed)
        self._resumed = {}

    @override
    def state_dict(self) -> dict[str, Tensor]:
        is_fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        return self._metrics["train"].gathered() if is_fitting else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self._resumed = state_dict

    @override
    def on_step_end(self, trainer: Trainer, module: BCOModule, summary: StepSummary) -> None:
        metrics = self._metrics["train"]
        for rows in summary.rows:
            metrics.update(rows)
        if not is_time_to_log(trainer, summary.step, first_too=True):
            return
        values = {f"train/{name}": float(value) for name, value in metrics.compute().items()}
        values["train/reward_shift"] = summary.reward_shift
        metrics.reset()
        log_step(trainer, module, values, summary.step)
        shown = {"loss": "train/loss", "delta": "train/reward_shift", "margin": "train/rewards/margins"}
        module.log_dict({short: values[name] for short, name in shown.items()}, prog_bar=True, logger=False)
        self._warn(values, module.beta)

    def _warn(self, values: dict[str, float], beta: float) -> None:
        """Of each kind of problem once."""
        problems = {}
        for name, thumb in (("chosen", "thumbs-up"), ("rejected", "thumbs-down")):
            reward = values[f"train/rewards/{name}"]
            if abs(reward) > _EXPLODED:
                problems[f"{name} exploded"] = (
                    f"the mean implicit reward of {thumb} rows is {reward:.1f}: the policy is {abs(reward) / beta:.0f} "
                    "nats per answer away from the reference. Lower model.learning_rate or train for fewer steps."
                )
        chosen, rejected = values["train/accuracy/chosen"], values["train/accuracy/rejected"]
        moved = max(abs(values["train/rewards/chosen"]), abs(values["train/rewards/rejected"])) > _MOVED
        lopsided = moved and min(chosen, rejected) < 0.05 and max(chosen, rejected) > 0.95
        self._collapsed = self._collapsed + 1 if lopsided else 0
        if self._collapsed >= _PATIENCE:
            same = "up" if chosen > rejected else "down"
            problems["collapsed"] = (
                f"the classifier says thumbs-{same} to nearly every row, {_PATIENCE} intervals in a row: one class has "
                "collapsed. Check the labels, and see model.class_weights and data.balanced_sampling."
            )
        for kind in [kind for kind in problems if kind not in self._warned]:
            self._warned.add(kind)
            rank_zero_warn(problems[kind])

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._metrics[_stage(trainer)].reset()

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._metrics[_stage(trainer)].update(outputs["rows"])

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        name = _stage(trainer)
        values = {f"{name}/{key}": value for key, value in self._metrics[name].compute().items()}
        # Already summed over processes, so Lightning must not synchronise them again.
        pl_module.log_dict({**values, f"{name}/reward_shift": pl_module.reward_shift.value})

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def _stage(trainer: Trainer) -> str:
    return "test" if trainer.testing else "val"
