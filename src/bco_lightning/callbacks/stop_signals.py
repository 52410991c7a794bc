"""Being asked to stop: signals are noted at any moment, and acted upon at the next optimizer-step boundary."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Takes note of a signal and does nothing else, so it may come at any moment."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def installed(self) -> bool:
        """Whether signals come here."""
        return bool(self._before)

    def install(self) -> None:
        """Has signals come here, if this is the main thread."""
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def remove(self) -> None:
        """Gives signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: Any) -> None:
        if not self.received:
            # os.write, since a signal may come while the same stream is being written to
            text = f"\n{signal.Signals(number).name}: saving at the end of this optimizer step, then stopping.\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
            self.received = number


def requeue_slurm_job() -> None:
    """Asks SLURM to start this job again; the same command with ``--ckpt_path auto`` then goes on."""
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    program = shutil.which("scontrol")
    if job is None:
        return
    if program is None or not re.fullmatch(r"\d+(_\d+)?", job):
        rank_zero_warn(f"SLURM job {job!r}: expected a job number and the program scontrol; it is not requeued.")
        return
    done = subprocess.run([program, "requeue", job], check=False)  # noqa: S603
    if done.returncode:
        rank_zero_warn(f"scontrol requeue {job} failed with status {done.returncode}.")
    else:
        rank_zero_info(f"SLURM job {job} is requeued.")
