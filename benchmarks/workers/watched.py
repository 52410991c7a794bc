"""Time, memory and bytes written of a part of a program, as JSON on the last line of its output."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any


class Watched:
    """Watches this process from ``start`` to ``report``; anonymous memory is what no file can give back."""

    def start(self) -> None:
        """From here on."""
        self._peak_kib = self._before_kib = _anonymous_kib()
        self._written, self._wall, self._cpu = _bytes_written(), time.perf_counter(), time.process_time()
        self._marks: dict[str, float] = {}
        self._watching = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def mark(self, name: str) -> None:
        """Notes the seconds since the start."""
        self._marks[name] = time.perf_counter() - self._wall

    def report(self, **values: Any) -> None:
        """Up to here."""
        self._watching = False
        self._thread.join()
        found = {
            "cpu_s": time.process_time() - self._cpu,
            "written_mib": (_bytes_written() - self._written) / 2**20,
            "anonymous_mib": (self._peak_kib - self._before_kib) / 2**10,
            **{f"{name}_s": seconds for name, seconds in self._marks.items()},
            **values,
        }
        print(json.dumps(found))

    def _watch(self) -> None:
        while self._watching:
            self._peak_kib = max(self._peak_kib, _anonymous_kib())
            time.sleep(0.02)


def _anonymous_kib() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def _bytes_written() -> int:
    """What system calls were given to write, whether it has reached a disk or not; mapped files are not in it."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])
