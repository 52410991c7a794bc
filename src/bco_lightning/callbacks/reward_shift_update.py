"""Update the reward shift once per optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from bco_lightning.batch import RewardedRows
from bco_lightning.distributed import sum_over_ranks
from bco_lightning.module import BCOModule


class RewardShiftUpdate(Callback):
    """Feeds the rewards of all micro-batches and ranks of a step to ``module.reward_shift``, after the step.

    During a step the shift stands still, so the step's gradient does not depend on how it was cut. The state lives in
    :class:`~bco_lightning.reward_shift.RewardShift`, which the module puts into checkpoints.
    """

    def __init__(self) -> None:
        self._last_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: BCOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        step_sums = torch.zeros(4, dtype=torch.float64)
        for rows in pl_module.step_rows:
            step_sums += _class_sums(rows)
        sum_up, num_up, sum_down, num_down = sum_over_ranks(step_sums.tolist(), trainer)
        pl_module.reward_shift.update(sum_up=sum_up, num_up=num_up, sum_down=sum_down, num_down=num_down)


def _class_sums(rows: RewardedRows) -> torch.Tensor:
    rewards_B, up_B = rows.rewards_B.cpu().double(), rows.thumbs_up_B.cpu()
    up, down = rewards_B[up_B], rewards_B[~up_B]
    return torch.stack([up.sum(), torch.tensor(len(up)), down.sum(), torch.tensor(len(down))]).double()
