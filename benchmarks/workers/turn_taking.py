"""The worker's end of the conversation: wait for one's turn, do a step, say what it took.

Commands come in as lines, answers go out as lines of JSON; whatever else a library prints goes to the log. This module
needs nothing but Python, since it runs in the rivals' environments too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def memory_mib(entry: str) -> float:
    """``VmRSS``, the memory of this process, or ``VmHWM``, its peak; ``ru_maxrss`` would count its parent's too."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"expected {entry} in /proc/self/status, found none.")


class Turns:
    """Takes turns with another process.

    A turn lasts from the command to :meth:`done`, so that it holds all that a training loop does for a step: reading
    and collating the rows, forward, backward, clipping, the optimizer, and the loop itself.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._born = self._began = time.perf_counter()
        self._began_cpu = time.process_time()
        self._memory_before = 0.0

    def ready(self, **facts: Any) -> bool:
        """Says that everything is loaded; returns as :meth:`done` does."""
        self._memory_before = memory_mib("VmRSS")
        return self._answer(seconds=time.perf_counter() - self._born, memory_mib=self._memory_before, **facts)

    def done(self, **facts: Any) -> bool:
        """Says that a step is done, and waits.

        Returns:
            Whether there is another step to do.
        """
        cpu_seconds = time.process_time() - self._began_cpu  # of all threads
        return self._answer(seconds=time.perf_counter() - self._began, cpu_seconds=cpu_seconds, **facts)

    def stopped(self) -> None:
        """Gives the peak of memory, the last answer."""
        peak = memory_mib("VmHWM")
        self._send(peak_mib=peak, above_start_mib=peak - self._memory_before)

    def _answer(self, **facts: Any) -> bool:
        self._send(**facts)
        command = sys.stdin.readline().strip()
        self._began, self._began_cpu = time.perf_counter(), time.process_time()
        return command == "step"

    def _send(self, **facts: Any) -> None:
        self._answers.write(json.dumps(facts) + "\n")
