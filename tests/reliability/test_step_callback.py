"""One event for each optimizer step: who is told, of what, in whatever order; and what of it Lightning can monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from bco_lightning.batch import StepSummary
from bco_lightning.callbacks import ImplicitRewardMonitor, RewardShiftUpdate, StepCallback
from bco_lightning.errors import ConfigError
from tests.conftest import tiny_data, tiny_module, tiny_trainer
from tests.reliability.tiny_run import tiny_fit


class Told(StepCallback):
    """Keeps every summary and tells how many micro-batches a step had."""

    def __init__(self) -> None:
        self.summaries: list[StepSummary] = []

    def numbers_of_step(self, trainer: Any, module: Any) -> dict[str, float | torch.Tensor]:
        return {"micro-batches": float(len(module.step_rows)), "rows": torch.tensor(8)}

    def on_step_end(self, trainer: Any, module: Any, summary: StepSummary) -> None:
        assert trainer.global_step == summary.step
        self.summaries.append(summary)


class NamedUpdate(RewardShiftUpdate):
    """A user's own."""

    def __init__(self) -> None:
        self.sums: list[tuple[float, float, float, float]] = []

    def on_step_end(self, trainer: Any, module: Any, summary: StepSummary) -> None:
        self.sums.append((summary.sum_up, summary.num_up, summary.sum_down, summary.num_down))
        super().on_step_end(trainer, module, summary)


def test_a_step_is_told_of_once_with_all_its_micro_batches(byte_model: str, feedback: str) -> None:
    told = Told()
    options = {"accumulate_grad_batches": 4, "max_steps": 5}
    tiny_fit(byte_model, feedback, callbacks=[told], trainer_options=options, data_options={"batch_size": 2})
    assert [summary.step for summary in told.summaries] == [1, 2, 3, 4, 5]
    for summary in told.summaries:
        rewards = torch.cat([rows.rewards_B for rows in summary.rows]).double()
        up = torch.cat([rows.thumbs_up_B for rows in summary.rows])
        assert summary.totals["micro-batches"] == 4
        assert summary.totals["rows"] == len(rewards) == summary.num_up + summary.num_down
        assert summary.num_up == int(up.sum())
        assert summary.sum_up == pytest.approx(float(rewards[up].sum()), rel=1e-12)
        assert summary.sum_down == pytest.approx(float(rewards[~up].sum()), rel=1e-12)
        assert all(rows.reward_shift == summary.reward_shift for rows in summary.rows)


def test_two_callbacks_that_tell_the_same_number_are_refused(byte_model: str, feedback: str) -> None:
    with pytest.raises(ConfigError, match="one callback that tells 'micro-batches', found another in Told"):
        tiny_fit(byte_model, feedback, callbacks=[Told(), Told()])


def test_a_subclass_of_ours_stands_in_its_place_and_moves_the_shift_once(byte_model: str, feedback: str) -> None:
    update = NamedUpdate()
    shift = tiny_fit(byte_model, feedback, callbacks=[update])["shift"]
    assert len(update.sums) == 24
    sums = [0.0, 0.0]
    for sum_up, _, sum_down, _ in update.sums:
        sums = [0.9 * sums[0] + sum_up, 0.9 * sums[1] + sum_down]
    assert shift["sums"] == pytest.approx(sums)
    assert shift == tiny_fit(byte_model, feedback)["shift"]


def test_the_order_of_callbacks_does_not_matter(byte_model: str, feedback: str) -> None:
    one, other = (
        tiny_fit(byte_model, feedback, callbacks=[kind() for kind in order])
        for order in ((ImplicitRewardMonitor, RewardShiftUpdate), (RewardShiftUpdate, ImplicitRewardMonitor))
    )
    assert one["values"] == other["values"]
    assert one["shift"] == other["shift"]
    assert one["shift"]["value"] != 0


def test_what_is_logged_can_be_monitored(tiny_model: str, log: str, tmp_path: Path) -> None:
    best = [
        ModelCheckpoint(tmp_path / "train", monitor="train/loss", every_n_train_steps=2),
        ModelCheckpoint(tmp_path / "val", monitor="val/auroc", mode="max"),
    ]
    stops = [
        EarlyStopping("train/loss", min_delta=100.0, patience=2, check_on_train_epoch_end=True),
        EarlyStopping("val/auroc", mode="max"),
    ]
    trainer = tiny_trainer(
        max_epochs=9,
        enable_checkpointing=True,
        callbacks=[*best, *stops],
        log_every_n_steps=2,
        default_root_dir=tmp_path,
    )
    trainer.fit(tiny_module(tiny_model), tiny_data(log, validation_files=log))
    assert trainer.current_epoch < 9
    for saved in best:
        assert saved.best_model_score is not None
        assert saved.best_model_score.isfinite()
        assert Path(saved.best_model_path).exists()
    assert {"train/loss", "train/auroc", "val/loss", "val/auroc"} <= trainer.callback_metrics.keys()
