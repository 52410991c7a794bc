"""One event for each optimizer step: who is told, of what, in whatever order; and what of it Lightning can monitor."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import CSVLogger

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.batch import StepSummary
from bco_lightning.callbacks import (
    FiniteGuard,
    ImplicitRewardMonitor,
    RewardShiftUpdate,
    RunCheckpoint,
    StepCallback,
)
from bco_lightning.callbacks.step_callback import loss_in_passes
from bco_lightning.checkpoints.folders import saved_steps
from bco_lightning.checkpoints.format import read_checkpoint
from bco_lightning.errors import ConfigError, PreemptedError
from tests.conftest import tiny_data, tiny_module, tiny_trainer
from tests.reliability.tiny_run import ROWS, assert_same, tiny_fit


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


# --- Lightning's own callbacks

BESIDE_OURS: dict[str, Any] = {
    "those that watch": lambda: [
        ModelCheckpoint("own", monitor="train/loss", every_n_train_steps=5, save_last=True),
        EarlyStopping("train/loss", patience=9, check_on_train_epoch_end=True),
        callbacks.LearningRateMonitor(),
        callbacks.Timer("00:01:00:00", interval="step"),
        callbacks.DeviceStatsMonitor(cpu_stats=True),
        callbacks.ThroughputMonitor(batch_size_fn=len),
        callbacks.ModelSummary(max_depth=2),
        callbacks.LambdaCallback(on_train_epoch_end=lambda *_: None),
        callbacks.OnExceptionCheckpoint("own"),
        SpikeDetection(warmup=100),
    ],
    "one that stops": lambda: [EarlyStopping("train/loss", stopping_threshold=100.0, check_on_train_epoch_end=True)],
    "one that averages": lambda: [callbacks.EMAWeightAveraging(decay=0.9)],
}


@pytest.mark.parametrize("name", BESIDE_OURS)
def test_lightnings_callbacks_leave_rows_and_the_last_checkpoint_whole(
    name: str, byte_model: str, feedback: str, tmp_path: Path
) -> None:
    options = {"default_root_dir": str(tmp_path), "logger": CSVLogger(tmp_path / "csv"), "accumulate_grad_batches": 2}
    saving = RunCheckpoint()
    saving.run_folder = str(tmp_path)
    run = tiny_fit(
        byte_model, feedback, callbacks=[*BESIDE_OURS[name](), saving], trainer_options=options,
        data_options={"batch_size": 4},
    )  # fmt: skip
    epochs = 1 if name == "one that stops" else 2
    assert run["step"] == 12 * epochs
    for epoch in range(epochs):
        seen = [row for step in range(12 * epoch, 12 * epoch + 12) for row in run["rows"][step]]
        assert sorted(seen) == list(range(ROWS))
    checkpoint = read_checkpoint(saved_steps(tmp_path / "checkpoints")[-1])
    assert checkpoint["global_step"] == run["step"]
    assert_same(checkpoint["state_dict"], run["weights"])


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4, alpha=8)])
def test_averaged_weights_are_those_that_are_saved_and_loaded_and_averaging_goes_on(
    lora: LoraSettings | None, byte_model: str, feedback: str, tmp_path: Path
) -> None:
    decay, of_steps = 0.7, []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            of_steps.append({name: p.detach().double() for name, p in module.named_parameters() if p.requires_grad})

    class Stop(Callback):
        def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 14:
                os.kill(os.getpid(), signal.SIGTERM)

    def fit(folder: Path, *more: Callback, every: int = 7, **options: Any) -> Path:
        averaging, saving = callbacks.EMAWeightAveraging(decay=decay), RunCheckpoint(every_n_steps=every, keep=9)
        saving.run_folder = str(folder)
        module = {"lora": lora, "learning_rate": 1e-2}
        tiny_fit(byte_model, feedback, callbacks=[averaging, saving, *more], module_options=module, **options)
        return saved_steps(folder / "checkpoints")[-1]

    last = fit(tmp_path / "whole", Keep())
    average = of_steps[0]
    for weights in of_steps[1:]:
        average = {name: decay * average[name] + (1 - decay) * value for name, value in weights.items()}
    loaded = dict(BCOModule.load_from_checkpoint(last).named_parameters())
    assert {name for name, value in loaded.items() if value.requires_grad} == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(loaded[name].double(), value, atol=1e-6, rtol=0)
        assert not torch.equal(loaded[name].double(), of_steps[-1][name])
    resumed = fit(tmp_path / "again", ckpt_path=str(last.with_name("step-00000014")))
    for name in ("state_dict", "current_model_state", "optimizer_states"):
        assert_same(read_checkpoint(last)[name], read_checkpoint(resumed)[name], name)
    # A validation looks at the average, and a stop amid it saves what a stop before it would.
    options = {"data_options": {"validation_files": feedback}, "trainer_options": {"val_check_interval": 2}}
    with pytest.raises(PreemptedError):
        fit(tmp_path / "stopped", Stop(), every=10**9, **options)
    stopped = saved_steps(tmp_path / "stopped" / "checkpoints")[-1]
    for name in ("state_dict", "current_model_state"):
        assert_same(read_checkpoint(last.with_name(stopped.name))[name], read_checkpoint(stopped)[name], name)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: callbacks.GradientAccumulationScheduler({0: 1, 1: 3}), "no GradientAccumulationScheduler"),
        (lambda: callbacks.StochasticWeightAveraging(1e-2), "no StochasticWeightAveraging"),
        (callbacks.LearningRateFinder, "no LearningRateFinder"),
        (callbacks.BatchSizeFinder, "no BatchSizeFinder"),
        (lambda: callbacks.ModelPruning("l1_unstructured"), "no ModelPruning"),
        (callbacks.BackboneFinetuning, "no BaseFinetuning, found BackboneFinetuning"),
        (RewardShiftUpdate, "one RewardShiftUpdate, found 2"),
        (lambda: type("Sub", (FiniteGuard,), {})(), "one FiniteGuard, found 2"),
    ],
)
def test_callbacks_that_would_do_harm_or_nothing_are_refused_before_anything_is_read(
    given: Any, said: str, tmp_path: Path
) -> None:
    both = [given(), NamedUpdate(), FiniteGuard()] if "found 2" in said else [given()]
    with pytest.raises(ConfigError, match=f"trainer.callbacks: expected {said}"):
        tiny_fit("no model", "no log", callbacks=both)


def test_under_ddp_gradients_of_all_passes_are_added_in_its_buckets() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = bucket = torch.full((3,), 7.0)  # of the step before
    wrapped = SimpleNamespace(gradient_as_bucket_view=True, find_unused_parameters=False)
    strategy = SimpleNamespace(model=wrapped, backward=lambda loss, _: loss.backward())
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD([weight])], strategy=strategy)
    parts: Any = [[0], [0, 0, 0]]
    loss_in_passes(lambda part, share: share * weight.sum(), parts, trainer, begins=True).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is bucket
    assert bucket.tolist() == [1.0, 1.0, 1.0]
