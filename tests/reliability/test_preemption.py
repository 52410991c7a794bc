"""A run that is asked to stop saves at a step boundary, leaves with the signal's status, and goes on exactly."""

from __future__ import annotations

import os
import random
import re
import signal
import stat
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from bco_lightning import __main__ as command_line
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.checkpoints.folders import saved_steps
from bco_lightning.checkpoints.format import read_checkpoint
from bco_lightning.checkpoints.manifest import newest_verified, verify_checkpoint
from bco_lightning.cli import app as cli
from bco_lightning.data.row_sets import RowReader
from bco_lightning.errors import PreemptedError
from bco_lightning.parallel.signals import StopSignals
from bco_lightning.reference import column
from bco_lightning.reference.model import Reference
from tests.reliability.tiny_run import STEPS, assert_same, make_log, start, tiny_fit, wait
from tests.trials import Trials

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PHASES = ("training", "validation", "saving")


class Slow(Callback):
    """Makes a phase long enough to be hit, and says when it has begun."""

    def __init__(self, folder: str, phase: str) -> None:
        self.folder, self.phase = Path(folder), phase

    def reach(self, phase: str) -> None:
        if phase == self.phase:
            (self.folder / "reached").touch()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        flush = os.fsync

        def slow(descriptor: int) -> None:
            self.reach("saving")
            time.sleep(0.02)
            flush(descriptor)

        os.fsync = slow  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= 1:
            self.reach("training")
        time.sleep(0.01)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.reach("validation")
        time.sleep(0.02)


def slow_run(model: str, log: str, held_out: str, folder: str, phase: str, accumulation: int, ranks: int) -> None:
    callbacks = [Slow(folder, phase), RunCheckpoint(every_n_steps=5, keep=9)]
    tiny_fit(model, log, callbacks=callbacks, **options(folder, held_out, accumulation, ranks))


def options(folder: str, held_out: str, accumulation: int, ranks: int = 1) -> dict[str, Any]:
    trainer: dict[str, Any] = {"accumulate_grad_batches": accumulation, "default_root_dir": folder, "devices": ranks}
    if ranks > 1:
        trainer["strategy"] = "ddp"
    data = {"batch_size": 8 // accumulation // ranks, "validation_files": held_out}
    return {"trainer_options": trainer, "data_options": data}


def await_file(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.002)


@pytest.mark.promise("R9", "A signal at any moment saves at a step boundary, ends with its status, and resumes exactly")
def test_a_signal_at_any_moment_keeps_the_work(byte_model: str, feedback: str, tmp_path: Path, trials: Trials) -> None:
    drawn = random.Random(9)
    held_out = make_log(tmp_path / "held_out.jsonl", num_rows=33, seed=1)
    whole: dict[int, dict[str, Any]] = {}
    cases = [
        (number, phase, round(drawn.uniform(0, 0.06), 4), accumulation, twice)
        for number in SIGNALS
        for phase in PHASES
        for accumulation in (1, 4)
        for twice in (False, True)
    ][:30]
    cases = sorted(cases, key=lambda case: drawn.random())
    for trial in trials(cases, quick=3):
        with trial as (number, phase, seconds, accumulation, twice):
            folder = tmp_path / f"{number.name}-{phase}-{seconds}"
            run = partial(slow_run, byte_model, feedback, held_out, str(folder), phase, accumulation, 1)
            (process,) = start(run, folder=folder)
            await_file(folder / "reached")
            time.sleep(seconds)
            asked = time.monotonic()
            os.kill(process.pid, number)
            if twice:
                time.sleep(0.01)
                os.kill(process.pid, number)
            assert wait([process], timeout=10) == [128 + number], (folder / "output.0").read_text()[-2000:]
            assert time.monotonic() - asked < 10
            assert f"{number.name}: saving at the end of this optimizer step" in (folder / "output.0").read_text()
            newest = newest_verified(folder / "checkpoints", pytest.fail)
            assert newest is not None
            if accumulation not in whole:
                whole[accumulation] = tiny_fit(
                    byte_model, feedback, **options(str(tmp_path / "w"), held_out, accumulation)
                )
            more = options(str(folder / "again"), held_out, accumulation)
            again = tiny_fit(byte_model, feedback, ckpt_path=str(newest), callbacks=[RunCheckpoint()], **more)
            for name in ("weights", "moments", "shift", "learning_rate"):
                assert_same(again[name], whole[accumulation][name], name)
            step = read_checkpoint(newest)["global_step"]
            before = {row: values for row, values in whole[accumulation]["rows"].items() if row >= step}
            assert again["rows"] == before
            for number, values in whole[accumulation]["values"].items():
                if number > step:
                    assert_same(values, again["values"][number], f"values at step {number}")
            due = [key for key in whole[accumulation]["values"].get(step - 1, {}) if key.startswith("val/")]
            for key in due if phase == "validation" else []:
                assert_same(again["values"][step - 1][key], whole[accumulation]["values"][step - 1][key], key)


@pytest.mark.promise("R9", "A signal to one of two processes stops both in the same step")
def test_a_signal_to_one_process_stops_both(byte_model: str, feedback: str, tmp_path: Path, trials: Trials) -> None:
    held_out = make_log(tmp_path / "held_out.jsonl", num_rows=33, seed=1)
    for trial in trials([(rank, phase) for rank in (0, 1) for phase in ("training", "validation")], quick=2):
        with trial as (rank, phase):
            folder = tmp_path / f"{rank}-{phase}"
            run = partial(slow_run, byte_model, feedback, held_out, str(folder), phase, 2, 2)
            processes = start(run, ranks=2, folder=folder)
            await_file(folder / "reached")
            os.kill(processes[rank].pid, signal.SIGTERM)
            assert wait(processes, timeout=15) == [143, 143], (folder / f"output.{rank}").read_text()[-2000:]
            assert newest_verified(folder / "checkpoints", pytest.fail) is not None


def on_slurm(model: str, log: str, folder: str) -> None:
    class Ask(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)

    tiny_fit(model, log, callbacks=[Ask(), RunCheckpoint()], trainer_options={"default_root_dir": folder})


@pytest.mark.promise("R9", "On SLURM the job is requeued, by number, after it has saved")
@pytest.mark.parametrize(("job", "requeued"), [("1234", "requeue 1234"), ("1234; touch evil", None)])
def test_a_slurm_job_is_requeued(
    job: str, requeued: str | None, byte_model: str, feedback: str, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nls {tmp_path}/checkpoints > {tmp_path}/saved\necho "$@" > {tmp_path}/asked\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    # No SLURM_NTASKS: the environment of a batch script's own shell, in which Lightning starts processes itself.
    environment = {"SLURM_JOB_ID": job, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    processes = start(partial(on_slurm, byte_model, feedback, str(tmp_path)), folder=tmp_path, environment=environment)
    assert wait(processes) == [128 + signal.SIGUSR1], (tmp_path / "output.0").read_text()
    if requeued:
        assert (tmp_path / "asked").read_text().strip() == requeued
        assert (tmp_path / "saved").read_text().split() == ["step-00000003"]
    else:
        assert not (tmp_path / "asked").exists()
        assert "it is not requeued" in (tmp_path / "output.0").read_text()


def add_to_command(callback: Callback) -> None:
    """Lets the command line of this process train with one more callback."""
    original = cli.BCOCLI.instantiate_trainer

    def with_callback(self: Any, **arguments: Any) -> Any:
        trainer = original(self, **arguments)
        trainer.callbacks.insert(0, callback)
        return trainer

    cli.BCOCLI.instantiate_trainer = with_callback  # type: ignore[method-assign]


def stopped_command(model: str, log: str, stop_at: int) -> None:
    class Ask(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == stop_at - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    add_to_command(Ask())
    options = {
        "model.name_or_path": model, "data.train_files": log, "trainer.accelerator": "cpu", "trainer.max_epochs": "2",
        "known_reward.reward": "tone", "ckpt_path": "auto",
    }  # fmt: skip
    raise SystemExit(cli.main(["fit", *(f"--{name}={value}" for name, value in options.items())]))


@pytest.mark.promise(
    "R9", "The command says where it stopped, does not go on to sampling, and the same command goes on"
)
def test_the_command_says_where_it_stopped_and_goes_on(byte_model: str, feedback: str, tmp_path: Path) -> None:
    stopped = partial(stopped_command, byte_model, feedback)
    assert wait(start(partial(stopped, 3), folder=tmp_path)) == [143]
    said = (tmp_path / "output.0").read_text()
    assert "expected a whole checkpoint to go on with, found none. Starting a new run, as 'auto' says." in said
    assert (
        "Stopped by SIGTERM after optimizer step 3; everything is in runs/bco/version_0/checkpoints/step-00000003"
        in said
    )
    assert "true reward" not in said
    assert wait(start(partial(stopped, 5), folder=tmp_path)) == [143]
    said = (tmp_path / "output.0").read_text()
    assert "checkpoint: runs/bco/version_0/checkpoints/step-00000003" in said
    assert "after optimizer step 5" in said
    assert not (tmp_path / "runs" / "bco" / "version_1").exists()


MOMENTS = ("import", "reading", "reference", "start")


class SlowImport:
    """Says when the command line is about to be imported, and takes its time."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "bco_lightning.cli.app":
            Path("reached").touch()
            await_file(Path("sent"))


def dawdle(*_: Any, **__: Any) -> None:
    Path("reached").touch()
    for _ in range(3000):  # not at a stretch: a signal that comes just before a sleep is heard after it
        time.sleep(0.02)


def fit_before_step_1(model: str, log: str, moment: str) -> None:
    options = {
        "model.name_or_path": model, "data.train_files": log, "data.validation_fraction": "0",
        "data.cache_rows": "false",
        "trainer.accelerator": "cpu", "trainer.max_steps": "1", "trainer.enable_progress_bar": "false",
        "model.reference_log_probs": "before", "ckpt_path": "auto",
    }  # fmt: skip
    sys.argv = ["bco_lightning", "fit", *(f"--{name}={value}" for name, value in options.items())]
    if moment == "import":
        del sys.modules["bco_lightning.cli.app"], sys.modules["bco_lightning.cli"].app
        sys.meta_path.insert(0, SlowImport())  # type: ignore[arg-type]
    elif moment == "reading":
        RowReader._fill = dawdle  # type: ignore[assignment, method-assign]
    elif moment == "reference":
        score, column._BATCH_TOKENS = Reference.log_probs, 200
        passes = iter(range(10**6))
        Reference.log_probs = lambda *given: dawdle() if next(passes) == 3 else score(*given)  # type: ignore[method-assign, assignment]
    elif moment == "start":

        class Wait(Callback):
            on_fit_start = dawdle

        add_to_command(Wait())
    raise SystemExit(command_line.main())


@pytest.mark.promise(
    "R9", "A signal before the first step ends in words, with its status, and keeps reference log-probs"
)
def test_a_signal_before_the_first_step_ends_in_words_and_keeps_what_was_computed(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "$@" >> asked\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    for trial in trials([(number, moment) for number in SIGNALS for moment in MOMENTS], quick=3):
        with trial as (number, moment):
            folder = tmp_path / f"{number.name}-{moment}"
            monkeypatch.setenv("BCO_CACHE", str(folder / "cache"))
            run = partial(fit_before_step_1, byte_model, feedback)
            (process,) = start(run, moment, folder=folder, environment=slurm)
            await_file(folder / "reached")
            os.kill(process.pid, number)
            (folder / "sent").touch()
            assert wait([process], timeout=20) == [128 + number], (folder / "output.0").read_text()[-2000:]
            said = (folder / "output.0").read_text()
            assert f"{number.name}: stopping." in said
            at_once = (number, moment) == (signal.SIGINT, "import")  # a terminal does not wait for imports
            assert (f"Stopped by {number.name} outside of training." in said) != at_once
            assert "Traceback" not in said
            assert (folder / "asked").exists() == (number == signal.SIGUSR1)
            assert not (folder / "runs").exists()
            known = list((folder / "cache" / "reference_log_probs").rglob("*.npy"))
            assert bool(known) == (moment in ("reference", "start"))
            if moment == "reference":
                assert wait(start(run, "", folder=folder)) == [0]
                assert re.search(r"reference log-probs: [1-9]\d? of 96 known", (folder / "output.0").read_text())


def test_the_last_of_several_signals_ends_a_command_that_would_swallow_the_first(tmp_path: Path) -> None:
    heard = StopSignals("stopping")
    heard.install()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(PreemptedError) as caught:
            heard.leave_at_once()
        assert caught.value.code == 128 + signal.SIGUSR1
        with pytest.raises(PreemptedError):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        heard.remove()


def test_handlers_are_put_back_and_a_later_fit_is_not_stopped(byte_model: str, feedback: str, tmp_path: Path) -> None:
    class Ask(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    before = [signal.getsignal(number) for number in SIGNALS]
    checkpoint = RunCheckpoint()
    with pytest.raises(PreemptedError):
        tiny_fit(
            byte_model, feedback, callbacks=[Ask(), checkpoint], trainer_options={"default_root_dir": str(tmp_path)}
        )
    assert [signal.getsignal(number) for number in SIGNALS] == before
    again = tiny_fit(byte_model, feedback, callbacks=[checkpoint], trainer_options={"default_root_dir": str(tmp_path)})
    assert again["step"] == STEPS
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_checkpoints_are_also_saved_by_the_clock(byte_model: str, feedback: str, tmp_path: Path) -> None:
    class Wait(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            time.sleep(0.8 if trainer.global_step in (3, 9) else 0)

    tiny_fit(
        byte_model, feedback, callbacks=[Wait(), RunCheckpoint(every_n_steps=10**6, every_minutes=0.7 / 60, keep=99)],
        trainer_options={"default_root_dir": str(tmp_path)},
    )  # fmt: skip
    steps = {int(step.name.removeprefix("step-")) for step in saved_steps(tmp_path / "checkpoints")}
    assert {4, 10, STEPS} <= steps
    assert len(steps) < STEPS
    assert all(verify_checkpoint(step) for step in saved_steps(tmp_path / "checkpoints"))


def hangs(model: str, log: str, folder: str, how: str, rank: int) -> int:
    class Fault(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 7 and trainer.global_rank == rank:
                (Path(folder) / "fault").touch()
                if how == "sleeps":
                    time.sleep(10**6)
                if how == "is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                os._exit(3)

    add_to_command(Fault())
    torch.set_num_threads(1)
    options = {
        "model.name_or_path": model, "data.train_files": log, "data.batch_size": "4", "data.validation_fraction": "0",
        "trainer.accelerator": "cpu", "trainer.devices": "2", "trainer.strategy": "ddp", "trainer.max_epochs": "2",
        "run_folder": f"{folder}/runs", "process_timeout": "5",
    }  # fmt: skip
    raise SystemExit(cli.main(["fit", *(f"--{name}={value}" for name, value in options.items())]))


@pytest.mark.promise("R21", "When one process hangs or dies, the other ends with an error in words within the timeout")
def test_no_process_waits_for_ever(byte_model: str, feedback: str, tmp_path: Path, trials: Trials) -> None:
    for trial in trials([(how, rank) for how in ("sleeps", "exits", "is killed") for rank in (0, 1)], quick=1):
        with trial as (how, rank):
            folder = tmp_path / f"{how}-{rank}"
            processes = start(partial(hangs, byte_model, feedback, str(folder), how, rank), ranks=2, folder=folder)
            await_file(folder / "fault")
            began = time.monotonic()
            (code,) = wait([processes[1 - rank]], timeout=30)
            processes[rank].kill()
            wait([processes[rank]])
            said = (folder / f"output.{1 - rank}").read_text()
            assert code == 2, said[-2000:]
            assert time.monotonic() - began < 30
            assert "error: processes: expected an answer of every process, found that one is gone or hangs" in said
            assert "Traceback" not in said
