"""The best step is kept beside the newest; runs stop early by names that are logged, and by distance."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from bco_lightning.callbacks import ImplicitRewardMonitor, RunCheckpoint, SpeedMonitor
from bco_lightning.callbacks.refusals import names_logged
from bco_lightning.checkpoints.best import BestSteps
from bco_lightning.checkpoints.folders import saved_steps, step_folder, step_of
from bco_lightning.checkpoints.format import read_checkpoint
from bco_lightning.checkpoints.manifest import resolve_checkpoint
from bco_lightning.errors import CheckpointError, ConfigError
from bco_lightning.parallel.strategy import named_strategy
from tests.conftest import tiny_data, tiny_module, tiny_trainer
from tests.reliability.tiny_run import finish, make_log, make_model, start, tiny_fit
from tests.unit.test_checkpoints import refuse, write


class Says(ImplicitRewardMonitor):
    """Gives the validation after each step values of its own."""

    def __init__(self, **series: list[float]) -> None:
        super().__init__()
        self.series = series

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        own = {name: torch.tensor(values[trainer.global_step - 1]) for name, values in self.series.items()}
        metrics = self._metrics["val"]
        metrics.compute = lambda: own  # type: ignore[method-assign]
        super().on_validation_epoch_end(trainer, pl_module)


def fit(model: str, log: str, folder: Path, *callbacks: Any, ckpt: Path | None = None, **options: Any) -> Any:
    module = {name: options.pop(name) for name in ("kl_budget",) if name in options}
    data = {"validation_fraction": 0.3, "batch_size": 4, **options.pop("data", {})}
    trainer = tiny_trainer(
        default_root_dir=folder, enable_checkpointing=True, callbacks=list(callbacks),
        **{"max_steps": 6, "val_check_interval": 1, **options},
    )  # fmt: skip
    trainer.fit(tiny_module(model, **module), tiny_data(log, **data), ckpt_path=ckpt)
    return trainer


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in saved_steps(folder / "checkpoints")]


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", [0.5, 0.7, math.nan, 0.7, 0.6], 2),  # of equal ones the first; NaN does not win
        ("min", [math.nan, 1.4, 1.1, 1.2, 1.0, math.nan, 1.3], 5),
        ("max", [math.nan, math.nan], None),
    ],
)
def test_the_best_value_is_the_first_of_the_best(mode: str, values: list[float], best: int | None) -> None:
    steps = BestSteps("val/auroc", mode)
    for step, value in enumerate(values, 1):
        if steps.is_beaten_by(value):
            steps.values[step] = value
    assert steps.step == best


def test_the_best_step_is_kept_beside_the_newest(tiny_model: str, log: str, tmp_path: Path) -> None:
    says = Says(auroc=[0.5, 0.7, math.nan, 0.7, 0.6], kl=[0.0] * 5)
    fit(tiny_model, log, tmp_path, says, RunCheckpoint(every_n_steps=1, keep=2), max_steps=5)
    assert steps_in(tmp_path) == [2, 4, 5]
    assert resolve_checkpoint(tmp_path / "best", refuse) == step_folder(tmp_path / "checkpoints", 2)
    assert resolve_checkpoint(tmp_path / "last", refuse) == step_folder(tmp_path / "checkpoints", 5)


def test_a_best_step_that_no_other_reason_would_have_saved_is_whole_and_goes_on_as_if_never_left(
    tiny_model: str, log: str, tmp_path: Path
) -> None:
    auroc, loss = [0.5, 0.6, 0.5, 0.7], [1.0, 1.1, 1.0, 1.1]
    stopping = {"monitor": "val/loss", "patience": 9}

    def run(folder: Path, **options: Any) -> tuple[Any, dict[str, Any], EarlyStopping]:
        early = EarlyStopping(**stopping, check_on_train_epoch_end=False)
        says = Says(auroc=auroc, kl=[0.0] * 4, loss=loss)
        fit(tiny_model, log, folder, says, early, RunCheckpoint(every_n_steps=100), max_steps=4, **options)
        last = read_checkpoint(resolve_checkpoint(folder, refuse))
        return last, BestSteps.read(folder / "checkpoints").values, early

    last, bests, early = run(tmp_path)
    assert steps_in(tmp_path) == [2, 4]
    assert bests == {2: pytest.approx(0.6), 4: pytest.approx(0.7)}
    assert early.wait_count == 3
    again, same, waited = run(tmp_path, ckpt=step_folder(tmp_path / "checkpoints", 2))
    assert same == bests
    assert waited.wait_count == early.wait_count
    for name, value in last["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name]), name


@pytest.mark.slow
def test_what_is_best_is_remembered_as_of_the_step_from_which_a_run_goes_on(
    tiny_model: str, log: str, tmp_path: Path
) -> None:
    def run(auroc: list[float], **options: Any) -> dict[int, float]:
        options = {"max_steps": len(auroc), **options}
        keeper = RunCheckpoint(every_n_steps=1, keep=9, **options.pop("keeper", {}))
        fit(tiny_model, log, tmp_path, Says(auroc=auroc, reward_up=auroc, kl=[0.0] * len(auroc)), keeper, **options)
        return {step: round(value, 4) for step, value in BestSteps.read(tmp_path / "checkpoints").values.items()}

    checkpoints = tmp_path / "checkpoints"
    assert run([0.6, 0.5, 0.8]) == {1: 0.6, 3: 0.8}
    # Step 3 is set aside: it is of another way now.
    assert run([0, 0.5, 0.55, 0.7], ckpt=step_folder(checkpoints, 2)) == {1: 0.6, 4: 0.7}
    other = {"monitor": "val/reward_up", "mode": "min"}  # which compares with none of these
    assert run([0, 0, 0, 0.5], ckpt=step_folder(checkpoints, 3), keeper=other) == {3: 0.0}


def test_a_word_means_a_step_of_the_run_in_whose_folder_it_stands(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    old, new = (write(runs / f"version_{run}" / "checkpoints", step) for run, step in ((0, 9), (1, 3)))
    newest = write(new.parent, 4)
    BestSteps("val/auroc", "max", {2: 0.8, 3: 0.9, 7: 1.0}).write(new.parent)  # of which two are not there
    for path, run_folder, step in (
        (Path("last"), runs, newest), (Path("best"), runs, new), (runs / "best", None, new),
        (runs / "version_1" / "best", None, new), (new.parent / "best", None, new),
        (runs / "version_0/last", None, old),
    ):  # fmt: skip
        assert resolve_checkpoint(path, refuse, run_folder=run_folder) == step
    with pytest.raises(CheckpointError, match="expected a run with a best step, found none"):
        resolve_checkpoint(runs / "version_0" / "best", refuse)
    (new / "values.json").unlink()  # another step would not be the best
    with pytest.raises(CheckpointError, match=r"values\.json: expected a file of the checkpoint, found none"):
        resolve_checkpoint(runs / "best", refuse)


@pytest.mark.parametrize("told", ["", "[]", '{"monitor": 1}', '{"monitor": "x", "mode": "max", "steps": [[1e999, 1]]}'])
def test_a_file_that_does_not_tell_the_best_step_tells_none(told: str, tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text(told)
    assert BestSteps.read(tmp_path) == BestSteps()


@pytest.mark.parametrize(
    ("callback", "options", "words"),
    [
        (lambda: RunCheckpoint(monitor="val/aurok"), {}, r"monitor: .* 'val/aurok'\. Did you mean val/auroc"),
        (lambda: RunCheckpoint(monitor="train/loss"), {}, r"monitor: .* Logged are val/loss, val/reward_shift"),
        (lambda: RunCheckpoint(monitor="val/loss"), {"data": {"validation_fraction": 0.0}}, "No rows are held out"),
        (lambda: RunCheckpoint(monitor="val/loss"), {"limit_val_batches": 0}, "No rows are held out"),
        (lambda: EarlyStopping("val_loss"), {}, r"EarlyStopping\.monitor: .*Did you mean val/loss\?.*train/"),
        (lambda: EarlyStopping("val/auroc"), {}, r"EarlyStopping\.mode: expected max for val/auroc, found min"),
        (lambda: RunCheckpoint(monitor="val/kl"), {}, r"checkpoint\.mode: expected max or min for val/kl"),
        (lambda: RunCheckpoint(monitor="val/auroc", mode="min"), {}, r"checkpoint\.mode: expected max for val/auroc"),
        (lambda: ModelCheckpoint(monitor="val/acuracy"), {}, "Did you mean val/accuracy"),
        (RunCheckpoint, {"kl_budget": 1.0, "data": {"validation_fraction": 0.0}}, r"model\.kl_budget: .*held-out rows"),
    ],
)  # fmt: skip
def test_a_name_that_nobody_logs_is_refused_before_the_first_step(
    callback: Any, options: dict[str, Any], words: str, tiny_model: str, log: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        fit(tiny_model, log, tmp_path, callback(), **options)
    assert "\n" not in str(refused.value)


def test_names_that_can_be_monitored_are_those_that_are_logged(
    tiny_model: str, log: str, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    class Names(Callback):
        names: Sequence[str] = ()

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.names = names_logged(trainer)

    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = Names()
    trainer = fit(tiny_model, [log, str(other)], tmp_path, names, SpeedMonitor(), max_steps=1)  # type: ignore[arg-type]
    aside = {"step", "loss", "delta", "margin", "tok/s"}  # of the progress bar
    assert set(trainer.callback_metrics) - aside == set(names.names)
    assert [name for name in names.names if name.startswith("val/by_source/") and name.endswith("other.jsonl/auroc")]


def test_early_stopping_says_why_and_the_last_step_is_saved_alone_where_none_is_to_be_the_best(
    tiny_model: str, log: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    early = EarlyStopping("val/auroc", mode="max", patience=2, check_on_train_epoch_end=False)
    keeper = RunCheckpoint(every_n_steps=99, monitor=None)
    fit(tiny_model, log, tmp_path, Says(auroc=[0.6, 0.5, 0.4, 0.9], kl=[0.0] * 4), early, keeper)
    assert (
        "Stopped after optimizer step 3 of 6: Monitored metric val/auroc did not improve in the last 2" in caplog.text
    )
    assert "Signaling" not in caplog.text
    assert steps_in(tmp_path) == [3]
    with pytest.raises(CheckpointError, match=r"expected a run with a best step, found none.*checkpoint\.monitor"):
        resolve_checkpoint(tmp_path / "best", refuse)


def test_a_run_that_leaves_its_kl_budget_stops_in_words_and_its_best_step_lies_within(
    tiny_model: str, log: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    far = Says(kl=[0.5, -1.5, 2.5], auroc=[0.5, 0.6, 0.7])
    fit(tiny_model, log, tmp_path, RunCheckpoint(every_n_steps=99), far, kl_budget=2.0)
    said = (
        "Stopped after optimizer step 3 of 6: val/kl is 2.5 nats per answer at step 3, beyond model.kl_budget of 2; "
        "the last step within it was 2, at -1.5."
    )
    assert said in caplog.text
    assert steps_in(tmp_path)[-2:] == [2, 3]
    assert resolve_checkpoint(tmp_path / "best", refuse).name == "step-00000002"


def fit_in_a_group(model: str, log: str, folder: str) -> tuple[list[int], dict[int, float]]:
    """Processes that see other values, as by rounding, and must decide alike."""
    other = float(os.environ["RANK"]) / 4
    says = Says(auroc=[0.5, 0.6 - other, 0.7, 0.55 + other], kl=[0.0, 0.0, 9.0 - other, 0.0])
    keeper = RunCheckpoint(every_n_steps=99)
    options = {"strategy": named_strategy("fsdp2"), "max_steps": 4, "val_check_interval": 1, "devices": 2}
    options |= {"default_root_dir": folder}
    tiny_fit(
        model, log, callbacks=[says, keeper], trainer_options=options, module_options={"kl_budget": 5.0},
        data_options={"validation_fraction": 0.2, "batch_size": 4},
    )  # fmt: skip
    return steps_in(Path(folder)), keeper.best.values


@pytest.mark.slow
def test_processes_that_hold_parts_of_the_model_agree_on_the_best_step(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    folder = str(tmp_path / "run")
    group = start(
        fit_in_a_group,
        str(tmp_path / "model"),
        make_log(tmp_path / "log.jsonl"),
        folder,
        ranks=2,
        folder=tmp_path / "out",
    )
    for steps, values in finish(group, tmp_path / "out"):
        assert steps == [2, 3]
        assert values == {1: 0.5, 2: pytest.approx(0.6)}
    assert resolve_checkpoint(Path(folder) / "best", refuse).name == "step-00000002"
