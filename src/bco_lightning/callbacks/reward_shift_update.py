"""Update the reward shift once per optimizer step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from typing_extensions import override

from bco_lightning.batch import StepSummary
from bco_lightning.callbacks.step_callback import StepCallback


class RewardShiftUpdate(StepCallback):
    """Feeds the rewards of all micro-batches and ranks of a step to ``module.reward_shift``, after the step.

    During a step the shift stands still, so the step's gradient does not depend on how it was cut. The state lives in
    :class:`~bco_lightning.objectives.RewardShift`, which the module puts into checkpoints. A subclass that the
    trainer is given is used instead.
    """

    @override
    def on_step_end(self, trainer: Trainer, module: Any, summary: StepSummary) -> None:
        module.reward_shift.update(
            sum_up=summary.sum_up, num_up=summary.num_up, sum_down=summary.sum_down, num_down=summary.num_down
        )
