"""Signals that ask a command to stop: heard from its first moment on, and SLURM is asked to start the job again."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any

from bco_lightning.errors import PreemptedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Takes note of a signal, so it may come at any moment; only where that is said it also leaves at once."""

    def __init__(self, then: str) -> None:
        self.received, self._then = 0, then
        self._at_once, self._process = False, os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    @property
    def installed(self) -> bool:
        """Whether signals come here."""
        return bool(self._before)

    def install(self) -> None:
        """Has signals come here, if this is the main thread."""
        self.received, self._process = 0, os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def leave_at_once(self) -> None:
        """From now on a signal raises, where the program is; so does now one that has come before."""
        self._at_once, self._process = True, os.getpid()
        if self.received:
            raise PreemptedError(self.received)

    def remove(self) -> None:
        """Gives signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._at_once = {}, False

    def _note(self, number: int, _: Any) -> None:
        if not self.received and os.getpid() == self._process:  # which says it for its workers, too
            # os.write, since a signal may come while the same stream is being written to
            with contextlib.suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: {self._then}.\n".encode())
        self.received = self.received or number
        if self._at_once and os.getpid() == self._process:  # forked workers are ended by the process that has them
            raise PreemptedError(self.received)


early = StopSignals("stopping")  # of a whole command; training has its own meanwhile


def requeue_slurm_job() -> None:
    """Asks SLURM to start this job again; the same command with ``--ckpt_path auto`` then goes on."""
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    program = shutil.which("scontrol")
    if job is None:
        return
    if program is None or not re.fullmatch(r"\d+(_\d+)?", job):
        said = f"SLURM job {job!r}: expected a job number and the program scontrol; it is not requeued."
    elif status := subprocess.run([program, "requeue", job], check=False).returncode:  # noqa: S603
        said = f"scontrol requeue {job} failed with status {status}."
    else:
        said = f"SLURM job {job} is requeued."
    print(said, file=sys.stderr)
