"""Each run has a folder of its own, and one process at a time trains in it."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from bco_lightning.checkpoints.folders import saved_steps
from bco_lightning.checkpoints.manifest import verify_checkpoint
from bco_lightning.checkpoints.runs import LOCK_FILE
from tests.reliability.test_preemption import add_to_command, await_file
from tests.reliability.tiny_run import start, wait
from tests.trials import Trials


def arguments(model: str, log: str, runs: str, *more: str) -> list[str]:
    options = {
        "model.name_or_path": model, "data.train_files": log, "data.batch_size": "4", "data.validation_fraction": "0",
        "trainer.accelerator": "cpu", "trainer.max_steps": "4", "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_steps": "2", "run_folder": runs,
    }  # fmt: skip
    return ["fit", *(f"--{name}={value}" for name, value in options.items()), *more]


def fit_when_told(model: str, log: str, runs: str, *more: str) -> None:
    from bco_lightning.cli.app import main

    Path("ready").touch()
    await_file(Path("../go"))
    raise SystemExit(main(arguments(model, log, runs, *more)))


@pytest.mark.promise("R25", "Runs that are started together have a folder each, with all that they save")
def test_runs_started_together_have_a_folder_each(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials
) -> None:
    cases = [*((batch, 1) for batch in range(14)), *((batch, 2) for batch in range(14, 18))]
    for trial in trials(cases, quick=1):
        with trial as (batch, ranks):
            folder, together = tmp_path / str(batch), []
            for seed in range(3 if ranks == 1 else 2):
                more = [
                    f"--seed_everything={seed}",
                    *(["--trainer.devices=2", "--trainer.strategy=ddp"][: 2 * ranks - 2]),
                ]
                run = partial(fit_when_told, byte_model, feedback, str(folder / "runs"), *more)
                together.append((folder / f"run-{seed}", start(run, ranks=ranks, folder=folder / f"run-{seed}")))
            for own, _ in together:
                await_file(own / "ready")
            (folder / "go").touch()
            for own, processes in together:
                assert wait(processes) == [0] * ranks, (own / "output.0").read_text()[-2000:]
            made = sorted((folder / "runs").iterdir())
            assert [run.name for run in made] == [f"version_{number}" for number in range(len(together))]
            seeds = [json.loads((run / "provenance.json").read_text())["seed"] for run in made]
            assert sorted(seeds) == list(range(len(together)))
            for run in made:
                assert [verify_checkpoint(step)["step"] for step in saved_steps(run / "checkpoints")] == [2, 4]
                assert len(list(run.glob("events.out.tfevents*"))) == 1


def fit_and_hang(model: str, log: str, runs: str, workers: int) -> None:
    from bco_lightning.cli.app import main

    class Hang(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                Path("reached").touch()
                time.sleep(1000)

    add_to_command(Hang())
    main(arguments(model, log, runs, f"--data.num_workers={workers}"))


@pytest.mark.promise("R25", "A run that a process trains is refused to others in words, until that process is gone")
def test_a_run_is_trained_by_one_process(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials, capfd: pytest.CaptureFixture[str]
) -> None:
    from bco_lightning.cli.app import main

    cases = [
        (asked, workers)
        for workers in (1, 0)
        for asked in ("last", "auto", "version_0", "version_0/checkpoints/step-00000002")
    ]
    for trial in trials(cases, quick=1):
        with trial as (asked, workers):
            folder = tmp_path / f"{asked.replace('/', '-')}-{workers}"
            runs = folder / "runs"
            (first,) = start(partial(fit_and_hang, byte_model, feedback, str(runs), workers), folder=folder)
            try:
                await_file(folder / "reached")
                before = sorted(runs.rglob("*"))
                second = arguments(
                    byte_model,
                    feedback,
                    str(runs),
                    f"--ckpt_path={asked if asked in ('last', 'auto') else runs / asked}",
                )
                assert main(second) == 2
                said = capfd.readouterr().err
                assert (
                    f"error: {runs / 'version_0'}: expected a run that no process is training, found that one is."
                    in said
                )
                assert sorted(runs.rglob("*")) == before
            finally:
                os.kill(first.pid, signal.SIGKILL)
                wait([first])
            assert main(second) == 0
            assert [run.name for run in runs.iterdir()] == ["version_0"]
            assert int((runs / "version_0" / LOCK_FILE).read_text()) == 2
