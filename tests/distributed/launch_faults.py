"""What may happen to one process of several, as a callback that a command line can name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class Fault(Callback):
    """Happens once in a folder, in the middle of training, and leaves a file ``fault-RANK``.

    Args:
        how: The process ``raises`` an error that is nobody's, ``is killed``, ``sleeps`` for ever, or ``is asked to
            stop`` as SLURM asks.
        ranks: The processes.
        step: Optimizer steps done before.
    """

    def __init__(self, how: str, ranks: list[int], step: int = 4) -> None:
        self.how, self.ranks, self.step = how, ranks, step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        happened = Path(f"fault-{trainer.global_rank}")
        if trainer.global_step != self.step or trainer.global_rank not in self.ranks or happened.exists():
            return
        happened.touch()
        if self.how == "raises":
            raise KeyError("planted")
        if self.how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "is asked to stop":
            os.kill(os.getpid(), signal.SIGUSR1)
        while self.how == "sleeps":
            time.sleep(60)
