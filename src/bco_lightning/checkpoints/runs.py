"""Run folders: one process at a time trains in each, and starts are numbered, since clocks go back and folders move."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from bco_lightning.errors import CheckpointError, ConfigError

LOCK_FILE = "run.lock"  # locked while a process trains; says how many starts there were, with this one
_held: dict[Path, int] = {}


def claim_run(runs: Path) -> Path:
    """Makes a folder ``version_N`` for a new run, which no process that starts at the same time gets too."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1 + max(map(_version_of, runs.iterdir()), default=-1)):
            with contextlib.suppress(FileExistsError):
                (runs / f"version_{number}").mkdir()
                break
    except OSError as error:
        problem = f"expected a folder to make runs in, found that it cannot be ({error.strerror}: {runs})."
        raise ConfigError("run_folder", problem) from error
    return runs / f"version_{number}"


def hold_run(run: Path) -> None:
    """Has this process alone train in a run's folder, until it ends, however it ends, or lets go.

    Raises:
        CheckpointError: If another process does; a run that is asked for twice at once goes on once.
    """
    run.mkdir(parents=True, exist_ok=True)
    if (key := run.resolve()) in _held:
        return
    start = 1 + max(map(start_of, run.resolve().parent.iterdir()), default=0)
    descriptor = os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            problem = "expected a run that no process is training, found that one is."
            remedy = "Wait until it has ended, or start another run: leave ckpt_path out, or give another run_folder."
            raise CheckpointError(str(run), problem, remedy) from None
        rank_zero_warn(f"{run}: its file system has no locks ({error.strerror}); let no second process go on with it.")
    _held[key] = descriptor
    with contextlib.suppress(OSError):  # a full disk is for what matters to say
        os.pwrite(descriptor, f"{start}\n".encode(), 0)


def let_go_of(run: Path) -> None:
    """Gives a run's folder up, if this process holds it."""
    if (descriptor := _held.pop(run.resolve(), None)) is not None:
        os.close(descriptor)


def newest_first(runs: Path) -> list[Path]:
    """Runs in a folder, whatever they are called now: the one that was started last, or gone on with, comes first."""
    found = [run for run in runs.iterdir() if (run / "checkpoints").is_dir()]
    return sorted(found, key=lambda run: (start_of(run), _version_of(run), run.name), reverse=True)


def start_of(run: Path) -> int:
    """The number of a run's last start among all starts in its folder of runs; 0 where nothing tells."""
    file = run / LOCK_FILE
    try:
        return int(file.read_bytes()[:20]) if file.is_file() else 0
    except (OSError, ValueError):
        return 0


def _version_of(run: Path) -> int:
    name = run.name.removeprefix("version_")
    return int(name) if name != run.name and name.isdecimal() else -1


def _let_go_in_child() -> None:
    """A forked loader worker that outlives its parent must not keep the run from going on."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
