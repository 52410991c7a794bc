"""A checkpoint is whole or not there: killed writers, failing disks, flipped bytes, retention."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lightning.pytorch import Callback

from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.checkpoints.folders import prune, remove_orphans, saved_steps, step_folder
from bco_lightning.checkpoints.format import read_checkpoint, write_checkpoint
from bco_lightning.checkpoints.manifest import newest_verified, verify_checkpoint
from bco_lightning.cli import app as cli
from bco_lightning.errors import CheckpointError
from tests.reliability.test_preemption import add_to_command
from tests.reliability.tiny_run import STEPS, start, tiny_fit, wait
from tests.trials import Trials


def state(step: int, size: int = 200_000) -> dict[str, Any]:
    """A checkpoint of about 0.8 MB that tells its own step in every number."""
    return {"global_step": step, "weights": torch.full((size,), float(step)), "fingerprints": {"beta": 0.1}}


def assert_whole(folder: Path, step: int) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint["global_step"] == step
    assert bool((checkpoint["weights"] == float(step)).all())


def save_for_ever(folder: str, temporary: str) -> None:
    """Saves step after step and says, in a file of its own, which saves have come back."""
    tempfile.tempdir = os.environ["TMPDIR"] = temporary
    root, step = Path(folder), 0
    while True:
        step += 1
        write_checkpoint(state(step), step_folder(root / "checkpoints", step))
        done = os.open(root / "done", os.O_CREAT | os.O_WRONLY)
        os.pwrite(done, f"{step:08d}".encode(), 0)
        os.close(done)
        prune(root / "checkpoints", 2, lambda _: True)


@pytest.mark.promise("R6", "A writer killed at any moment leaves a whole checkpoint, the newest one that was done")
def test_a_killed_writer_leaves_the_newest_whole_checkpoint(tmp_path: Path, trials: Trials) -> None:
    drawn = random.Random(6)
    memory = Path("/dev/shm")  # noqa: S108
    other_file_system = str(memory if memory.stat().st_dev != tmp_path.stat().st_dev else tmp_path)
    cases = [(number, round(drawn.uniform(0, 0.5), 4), where) for number in range(50) for where in ("same", "other")]
    for trial in trials(cases, quick=6):
        with trial as (number, seconds, where):
            folder = tmp_path / f"{number}-{where}"
            temporary = str(folder) if where == "same" else other_file_system
            (writer,) = start(save_for_ever, str(folder), temporary, folder=folder)
            deadline = time.monotonic() + 60
            while not (folder / "done").exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(seconds)
            writer.kill()
            wait([writer])
            done = int((folder / "done").read_text())
            newest = newest_verified(folder / "checkpoints", pytest.fail)  # what has a step's name must be whole
            assert newest is not None
            step = int(newest.name.removeprefix("step-"))
            assert step >= done
            assert_whole(newest, step)
            remove_orphans(folder / "checkpoints")
            assert not list((folder / "checkpoints").glob(".*"))
            shutil.rmtree(folder)


FSYNC = ("fsync of the tensors", "fsync of a file", "fsync of the last file", "fsync of the folder")
POINTS = ("open", "write", *FSYNC, "rename", "prune")


def fail_at(point: str, hard: bool) -> Callable[[], None]:
    """Patches the one system call that stands for a point of a save, to raise ENOSPC or to end the process."""

    def fault(*_: Any, **__: Any) -> Any:
        if hard:
            os._exit(9)
        raise OSError(errno.ENOSPC, "No space left on device")

    def after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
        left = [calls]

        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            return fault() if left[0] < 0 else real(*arguments, **options)

        return call

    def patch() -> None:
        if point == "open":
            Path.mkdir = after(0, Path.mkdir)  # type: ignore[method-assign]
        elif point == "write":
            safetensors.torch.save = fault
        elif point.startswith("fsync"):
            os.fsync = after((0, 1, 3, 4)[FSYNC.index(point)], os.fsync)
        elif point == "rename":
            Path.rename = fault  # type: ignore[method-assign]
        else:
            shutil.rmtree = fault  # type: ignore[assignment]

    return patch


def save_with_fault(folder: str, point: str, hard: bool) -> str:
    checkpoints = Path(folder) / "checkpoints"
    for step in (1, 2, 3):
        write_checkpoint(state(step), step_folder(checkpoints, step))
    fail_at(point, hard)()
    try:
        if point != "prune":
            write_checkpoint(state(4), step_folder(checkpoints, 4))
        else:
            prune(checkpoints, 2, lambda _: True)
    except OSError as error:
        return f"OSError {error.errno}"
    except CheckpointError as error:
        return str(error)
    return "no fault"


@pytest.mark.promise("R7", "A fault at any point of a save leaves the previous step, and no half-written one is used")
def test_a_fault_at_any_point_of_a_save_leaves_the_previous_step(tmp_path: Path, trials: Trials) -> None:
    for trial in trials([(point, hard) for point in POINTS for hard in (False, True)], quick=5):
        with trial as (point, hard):
            folder = tmp_path / f"{point}-{hard}"
            codes = wait(processes := start(save_with_fault, str(folder), point, hard, folder=folder))
            assert codes == [9 if hard else 0], (folder / "output.0").read_text()
            assert len(processes) == 1
            if not hard:
                told = torch.load(folder / "result.0", weights_only=False)
                assert ("No space left" in told) if point != "prune" else told == f"OSError {errno.ENOSPC}"
            newest = newest_verified(folder / "checkpoints", pytest.fail)
            assert newest is not None
            assert_whole(newest, 3)
            assert all(verify_checkpoint(step) for step in saved_steps(folder / "checkpoints"))
            remove_orphans(folder / "checkpoints")
            assert not list((folder / "checkpoints").glob(".*"))


@pytest.fixture
def three_steps(byte_model: str, feedback: str, tmp_path: Path) -> Path:
    """The checkpoints of a real run at steps 8, 16 and 24."""
    tiny_fit(
        byte_model, feedback, callbacks=[RunCheckpoint(every_n_steps=8, keep=9)],
        trainer_options={"default_root_dir": str(tmp_path)},
    )  # fmt: skip
    return tmp_path / "checkpoints"


def assert_refused_and_passed_over(checkpoints: Path, damaged: Path) -> None:
    told: list[CheckpointError] = []
    with pytest.raises(CheckpointError, match=f"{damaged.parent.name}/"):
        read_checkpoint(damaged.parent)
    assert newest_verified(checkpoints, told.append) == step_folder(checkpoints, 16)
    assert len(told) == 1
    assert damaged.name in told[0].where or "manifest" in told[0].where


@pytest.mark.promise(
    "R8", "A flipped byte, a cut, missing or swapped file is refused by name; the step before is taken"
)
def test_a_damaged_file_is_refused_and_the_step_before_is_taken(three_steps: Path, trials: Trials) -> None:
    drawn = random.Random(8)
    newest = step_folder(three_steps, STEPS)
    files = sorted(newest.iterdir())
    cases: list[tuple[str, str, int]] = []
    for number in range(200):
        file = files[number % len(files)]
        cases.append(("flip", file.name, drawn.randrange(file.stat().st_size)))
    for number in range(20):
        file = files[number % len(files)]
        cases.append(("cut", file.name, drawn.randrange(file.stat().st_size)))
    cases += [("delete", file.name, 0) for file in files] + [("swap", file.name, 0) for file in files]
    for trial in trials(cases, quick=24):
        with trial as (damage, name, place):
            path, whole = newest / name, (newest / name).read_bytes()
            try:
                if damage == "flip":
                    path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
                elif damage == "cut":
                    path.write_bytes(whole[:place])
                elif damage == "delete":
                    path.unlink()
                else:
                    path.write_bytes((step_folder(three_steps, 16) / name).read_bytes())
                if damage == "swap" and name == "manifest.json":
                    path = next(
                        newest.glob("*.safetensors")
                    )  # the other manifest is whole; what it describes is not here
                assert_refused_and_passed_over(three_steps, path)
            finally:
                (newest / name).write_bytes(whole)
    assert newest_verified(three_steps, pytest.fail) == newest


def fill_the_disk(model: str, log: str, folder: str, limit: int, if_saving_fails: str) -> dict[str, Any]:
    class SmallDisk(RunCheckpoint):
        """From step 12 on, files may not grow beyond the limit, as on a full disk."""

        def _save(self, trainer: Any) -> None:
            if trainer.global_step == 12:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            super()._save(trainer)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    callback = SmallDisk(every_n_steps=6, keep=9, if_saving_fails=if_saving_fails)  # type: ignore[arg-type]
    try:
        result = tiny_fit(model, log, callbacks=[callback], trainer_options={"default_root_dir": folder})
    except CheckpointError as error:
        return {"error": str(error)}
    return {"step": result["step"]}


@pytest.mark.promise(
    "R19", "A full disk ends the run with a clear error, or not, as configured; earlier steps stay whole"
)
def test_a_full_disk_leaves_earlier_steps_whole(byte_model: str, feedback: str, tmp_path: Path, trials: Trials) -> None:
    cases = [(20_000, "stop"), (60_000, "stop"), (200_000, "stop"), (20_000, "warn"), (200_000, "warn")]
    for trial in trials(cases, quick=5):
        with trial as (limit, if_saving_fails):
            folder = tmp_path / f"{limit}-{if_saving_fails}"
            run = partial(fill_the_disk, byte_model, feedback, str(folder), limit, if_saving_fails)
            processes = start(run, folder=folder)
            assert wait(processes) == [0], (folder / "output.0").read_text()[-2000:]
            told = torch.load(folder / "result.0", weights_only=False)
            steps = [int(step.name.removeprefix("step-")) for step in saved_steps(folder / "checkpoints")]
            assert all(verify_checkpoint(step) for step in saved_steps(folder / "checkpoints"))
            if if_saving_fails == "stop":
                assert "File too large" in told["error"]
                assert "Free some space" in told["error"]
                assert steps == [6]
            else:
                assert told["step"] == STEPS
                assert steps == [6, 18, 24]
                assert "Going on without it" in (folder / "output.0").read_text()


def fit_on_a_small_disk(model: str, log: str, runs: str, if_saving_fails: str, free_at: int) -> None:
    class Fill(Callback):
        """Leaves no byte of the disk at step 3, and all of it again later."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            filler = Path(runs) / "filler"
            if trainer.global_step == 3:
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(512))
            elif trainer.global_step == free_at:
                filler.unlink()

    add_to_command(Fill())
    options = {
        "model.name_or_path": model, "data.train_files": log, "data.validation_fraction": "0", "run_folder": runs,
        "trainer.accelerator": "cpu", "trainer.max_steps": "8", "trainer.enable_progress_bar": "false",
        "trainer.log_every_n_steps": "1", "checkpoint.every_n_steps": "3",
        "checkpoint.if_saving_fails": if_saving_fails,
    }  # fmt: skip
    raise SystemExit(cli.main(["fit", *(f"--{name}={value}" for name, value in options.items())]))


@pytest.mark.promise(
    "R19", "A disk of 1.5 MB that is truly full, under events too: in words, as configured, no step lost"
)
def test_a_truly_full_disk_is_met_in_words(byte_model: str, feedback: str, tmp_path: Path, trials: Trials) -> None:
    cases = [("warn", 7, [3, 8]), ("warn", 99, [3]), ("stop", 99, [3])]
    for trial in trials(cases, quick=2):
        with trial as (if_saving_fails, free_at, saved):
            folder = tmp_path / f"{if_saving_fails}-{free_at}"
            runs = folder / "runs"
            runs.mkdir(parents=True)
            mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(runs)]
            if os.geteuid() or subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
                pytest.skip("needs the right to mount a small disk")
            try:
                fit = partial(fit_on_a_small_disk, byte_model, feedback, str(runs), if_saving_fails, free_at)
                (status,) = wait(start(fit, folder=folder))
                said = (folder / "output.0").read_text()
                steps = [verify_checkpoint(step)["step"] for step in saved_steps(runs / "version_0" / "checkpoints")]
            finally:
                subprocess.run(["umount", str(runs)], check=True)  # noqa: S607
            assert "Traceback" not in said, said[-3000:]
            assert steps == saved
            assert status == (2 if free_at == 99 else 0), said[-3000:]
            if if_saving_fails == "warn":
                assert "could not be written (No space left on device); going on without it" in said
                not_saved = "Training has ended, but what it came to is not saved; the newest checkpoint is"
                assert (f"{not_saved} {runs}/version_0/checkpoints/step-00000003" in said) == (free_at == 99)
            else:
                assert "expected to write a checkpoint, found that No space left on device" in said


def save_thirty(folder: str, kill_after: int) -> int:
    """Thirty saves with three kept; the process ends between a save and its pruning."""
    checkpoints = Path(folder) / "checkpoints"
    for step in range(1, 31):
        write_checkpoint(state(step, 1000), step_folder(checkpoints, step))
        if step == kill_after:
            os._exit(9)
        prune(checkpoints, 3, checks_out)
        assert len([folder for folder in saved_steps(checkpoints) if checks_out(folder)]) >= min(step, 3)
    return len(saved_steps(checkpoints))


def checks_out(folder: Path) -> bool:
    try:
        verify_checkpoint(folder)
    except CheckpointError:
        return False
    return True


@pytest.mark.promise("R20", "There are never fewer than two whole steps, however pruning ends")
def test_there_are_never_fewer_than_two_whole_steps(tmp_path: Path, trials: Trials) -> None:
    drawn = random.Random(20)
    for trial in trials([0, *drawn.sample(range(4, 30), 10)], quick=4):
        with trial as kill_after:
            folder = tmp_path / str(kill_after)
            codes = wait(start(save_thirty, str(folder), kill_after, folder=folder))
            assert codes == [9 if kill_after else 0], (folder / "output.0").read_text()
            whole = [step for step in saved_steps(folder / "checkpoints") if checks_out(step)]
            assert len(whole) == (4 if kill_after else 3)


@pytest.mark.promise("R20", "A damaged step does not count as one to keep, and a failing delete does not stop training")
def test_a_damaged_step_does_not_count_and_a_failing_delete_does_not_stop(
    byte_model: str, feedback: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 5):
        write_checkpoint(state(step, 1000), step_folder(tmp_path / "a", step))
    (step_folder(tmp_path / "a", 4) / "values.json").write_bytes(b"damaged")
    assert prune(tmp_path / "a", 2, checks_out) == [step_folder(tmp_path / "a", 1)]

    real = shutil.rmtree

    def stuck(path: Any, ignore_errors: bool = False, **options: Any) -> None:
        if ".removed-" in str(path) and not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(path, ignore_errors=ignore_errors, **options)

    monkeypatch.setattr(shutil, "rmtree", stuck)
    with pytest.warns(UserWarning, match="an old checkpoint could not be removed"):
        result = tiny_fit(
            byte_model, feedback, callbacks=[RunCheckpoint(every_n_steps=4, keep=2)],
            trainer_options={"default_root_dir": str(tmp_path)},
        )  # fmt: skip
    assert result["step"] == STEPS


@pytest.mark.promise("R20", "Fewer than two checkpoints to keep is refused")
def test_keeping_fewer_than_two_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep: expected at least 2, found 1"):
        RunCheckpoint(keep=1)
