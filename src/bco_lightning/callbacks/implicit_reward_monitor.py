"""Log the metrics of implicit rewards while training, and for whole evaluation sets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from bco_lightning.batch import StepSummary
from bco_lightning.callbacks.step_callback import StepCallback, is_time_to_log, log_step
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.metrics import ImplicitRewardMetrics
from bco_lightning.models.experts import balance

if TYPE_CHECKING:
    from bco_lightning.module import BCOModule

# A mean reward of 20 is a probability within 2e-9 of 0 or 1: such rows teach nothing, and the policy is far away.
_EXPLODED = 20.0
_MOVED = 0.1  # all rewards are 0 at first, which is on neither side
_MANY_ROWS = 48


class ImplicitRewardMonitor(StepCallback):
    """Logs :class:`~bco_lightning.metrics.ImplicitRewardMetrics`.

    Training rows are gathered over ``trainer.log_every_n_steps`` optimizer steps and logged as ``train/...``,
    evaluation rows over the whole set as ``val/...`` and ``test/...``; where there are several sources, those of each
    too, as ``train/by_source/NAME/...``. Of the newest step ``train/learning_rate`` and ``train/gradient_norm``, before
    clipping, are logged. Processes synchronise only when a value is read, and when a checkpoint is
    written, which holds what was gathered so far. The reward shift that a step's losses were computed with is logged as
    ``train/reward_shift``. Callbacks of Lightning can monitor each of these names.

    Warns when a class's mean reward explodes, and when the classifier gives every row the same thumb.
    """

    def __init__(self) -> None:
        self._metrics = {name: ImplicitRewardMetrics() for name in ("train", "val", "test")}
        self._trainer: Trainer | None = None
        self._resumed: dict[str, Tensor] = {}
        self._collapsed = self._seen = 0  # rows
        self._learning_rate = math.nan
        self._warned: set[str] = set()
        self._within: tuple[int, float] | None = None  # the newest step within the budget, and its KL
        self.stopping_reason_message: str | None = None  # as Lightning's EarlyStopping has it

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._trainer = trainer
        data, device = getattr(trainer, "datamodule", None), trainer.strategy.root_device
        for name in self._metrics:
            sources = data.source_names(name) if isinstance(data, FeedbackDataModule) else ()
            metrics = ImplicitRewardMetrics(sources, one_class_will_do=name != "train")
            self._metrics[name] = metrics.to(device if device.type != "mps" else "cpu")  # MPS has no float64

    @override
    def names_logged(self, trainer: Trainer) -> list[str]:
        data, is_fit = getattr(trainer, "datamodule", None), trainer.state.fn == TrainerFn.FITTING
        has_rows = not isinstance(data, FeedbackDataModule) or data.validation_dataset is not None
        stages = ["train", *["val"] * (trainer.enable_validation and has_rows)] if is_fit else [_stage(trainer)]
        names = []
        for stage in stages:
            first, *others = self._metrics[stage].names
            names += [f"{stage}/{name}" for name in (first, "reward_shift", *others)]
        return [*names, "train/learning_rate", "train/gradient_norm"] if is_fit else names

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._metrics["train"].reset()
        self._within = self.stopping_reason_message = None
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
    def on_before_step(self, trainer: Trainer, module: BCOModule, optimizer: Any, summary: StepSummary) -> None:
        self._learning_rate = float(optimizer.param_groups[0]["lr"])

    @override
    def on_step_end(self, trainer: Any, module: BCOModule, summary: StepSummary) -> None:
        metrics = self._metrics["train"]
        for rows in summary.rows if trainer.log_every_n_steps else ():  # which nobody would ask for
            metrics.update(rows)
        self._seen += int(summary.num_up + summary.num_down)
        if not is_time_to_log(trainer, summary.step, first_too=True):
            return
        values = {f"train/{name}": float(value) for name, value in metrics.compute().items()}
        values["train/reward_shift"] = summary.reward_shift
        evenness = balance(summary.totals, summary.num_up + summary.num_down)
        values |= {f"train/{name}": value for name, value in evenness.items()}
        values |= {f"train/{name}": each.value for name, each in module.objective.baselines.items()}
        values["train/learning_rate"] = self._learning_rate
        if (square := summary.totals.get("gradient_square")) is not None:
            values["train/gradient_norm"] = math.sqrt(square)
        metrics.reset()
        log_step(trainer, values, summary.step)
        for short, name in (("loss", "loss"), ("delta", "reward_shift"), ("margin", "margin")):  # numbers are awaited
            module.log(short, torch.tensor(values[f"train/{name}"]), prog_bar=True, logger=False)
        self._warn(values, module.beta)

    def _warn(self, values: dict[str, float], beta: float) -> None:
        """Of each kind of problem once."""
        problems = {}
        for thumb in ("up", "down"):
            reward = values[f"train/reward_{thumb}"]
            if abs(reward) > _EXPLODED:
                problems[f"{thumb} exploded"] = (
                    f"the mean implicit reward of thumbs-{thumb} rows is {reward:.1f}: the policy is "
                    f"{abs(reward) / beta:.0f} nats per answer away from the reference. Lower model.learning_rate or "
                    "train for fewer steps."
                )
        up, down = values["train/accuracy_up"], values["train/accuracy_down"]
        moved = max(abs(values["train/reward_up"]), abs(values["train/reward_down"])) > _MOVED
        lopsided = moved and min(up, down) < 0.05 and max(up, down) > 0.95
        self._collapsed, self._seen = self._collapsed + self._seen if lopsided else 0, 0
        if self._collapsed >= _MANY_ROWS:
            same = "up" if up > down else "down"
            problems["collapsed"] = (
                f"the classifier says thumbs-{same} to nearly every row of the last {self._collapsed}: one class has "
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
        values = {f"{name}/{key}": float(value) for key, value in self._metrics[name].compute().items()}
        if trainer.sanity_checking:
            return
        values[f"{name}/reward_shift"] = pl_module.reward_shift.value
        if trainer.state.fn == TrainerFn.FITTING:
            self._keep_to_budget(trainer, pl_module, values["val/kl"])
        # Lightning would log it under the step before, and a checkpoint that is evaluated under 0.
        before = 0 if trainer.state.fn == TrainerFn.FITTING else pl_module.steps_before
        values["step"] = float(max(trainer.global_step, before))
        pl_module.log_dict(values)  # already summed over processes

    def _keep_to_budget(self, trainer: Trainer, module: BCOModule, kl: float) -> None:
        step, budget = trainer.global_step, module.options.kl_budget
        if module.options.allows(kl):
            self._within = step, kl
            return
        told = "the last step within it was {:,}, at {:.4g}"
        last = told.format(*self._within) if self._within else "no step was within"
        trainer.should_stop, far = True, f"val/kl is {kl:.4g} nats per answer at step {step:,}"
        self.stopping_reason_message = f"{far}, beyond model.kl_budget of {budget:g}; {last}."

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        asked = trainer.callbacks if trainer.should_stop else [self]
        told = [getattr(callback, "stopping_reason_message", None) for callback in asked]
        reasons = [message.removesuffix(" Signaling Trainer to stop.") for message in told if message]
        step, num_steps = trainer.global_step, pl_module.num_steps()
        if reasons or (trainer.should_stop and step < num_steps):
            reason = " ".join(reasons) or "A callback asked for it."
            rank_zero_info(f"Stopped after optimizer step {step:,} of {num_steps:,}: {reason}")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def _stage(trainer: Trainer) -> str:
    return "test" if trainer.state.fn == TrainerFn.TESTING else "val"
