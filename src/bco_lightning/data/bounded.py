"""Programs of others, such as chat templates: tried in a process that may be killed, then run under a clock."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

_MORE_BYTES, _CPU_SECONDS, _SECONDS, _WAIT = 2**30, 10, 60, 120


class TooLongError(BaseException):
    """Time is over; no program may catch it as an error of its own."""


def ends(program: Callable[[], object]) -> bool:
    """Whether a program ends in 10 s and 1 GiB: in a copy of this process, the only thing that can be stopped."""
    if sys.platform != "linux":
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads are not copied; the program needs none
        child = os.fork()
    if not child:
        _run(program)
    status = os.waitpid(child, 0)[1]
    # Killed by the clock on the wall, it has waited for others, not worked.
    return status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM)


def _run(program: Callable[[], object]) -> NoReturn:
    status = 1
    try:
        import resource

        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_WAIT)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _MORE_BYTES, size + _MORE_BYTES))
        used = int(sum(os.times()[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (used + _CPU_SECONDS, used + _CPU_SECONDS))
        try:
            program()
            status = 0
        except Exception as error:
            status = int(isinstance(error, MemoryError))
    finally:
        os._exit(status)


@contextmanager
def clocked() -> Iterator[None]:
    """Raises a TooLongError after a minute, where this is the main thread and nobody else's alarm is set."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
