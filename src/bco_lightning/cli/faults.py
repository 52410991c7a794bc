"""Faults of the machine, of a loader worker or of another process, told in words a user can act on."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from bco_lightning.cli.wording import in_one_line
from bco_lightning.errors import FaultError, UserError, causes_of

_TOO_LONG = re.compile(r"timed out|wait timeout|watchdog|timeout caused pair closure", re.IGNORECASE)
_GONE = re.compile(
    r"Connection (?:closed by peer|reset|refused)|Broken pipe|connectFullMesh|remote process exit|NCCL communicator",
    re.IGNORECASE,
)
_WAITED = re.compile(r"(?:after|waiting|Timeout\(ms\)=)\s*(\d+)\s*(seconds)?", re.IGNORECASE)
_NOT_ALL_CAME = re.compile(r"(\d+)/(\d+) clients joined")
_PLACE_IN_LIBRARY = re.compile(r"^\[\S+:\d+\] ")
_DISK = {
    errno.ENOSPC: ("the disk is full", "Free some space."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space."),
    errno.EROFS: ("the file system is read-only", "Give a run_folder that can be written."),
    errno.EACCES: ("permission is missing", "See who may read and write it."),
    errno.EPERM: ("permission is missing", "See who may read and write it."),
    errno.EFBIG: ("it may not grow any more", "Raise the limit on the size of files (ulimit -f)."),
    errno.EEXIST: ("something of that name came meanwhile", "Choose another name."),
    errno.ENOTDIR: ("it lies under what is no folder", "Choose another place."),
    errno.ENAMETOOLONG: ("its name is too long", "Choose a shorter one."),
    errno.EIO: ("the disk fails", "See what the system says of it (dmesg)."),
}
# Where, what a library says, what was expected, and what to do.
_SAID = (
    (
        "trainer.devices",
        re.compile(r"You set `(?:devices=|num_nodes=|--ntasks=)|multiplied should equal the world size"),
        "expected as many processes as were started",
        "trainer.num_nodes is the number of nodes, trainer.devices that of processes on each.",
    ),
    (
        "memory",
        re.compile(r"can't allocate memory|out of memory|not enough memory", re.IGNORECASE),
        "expected the step to fit, found none left",
        "Set or lower data.tokens_per_micro_batch (or data.batch_size, and raise trainer.accumulate_grad_batches), "
        "lower data.max_length, set model.gradient_checkpointing: true, or train adapters (model.lora).",
    ),
    (
        "data.num_workers",
        re.compile(r"DataLoader worker .*(?:killed|exited unexpectedly)", re.DOTALL),
        "expected loader workers to live, found one dead",
        "Often the machine ran out of memory; data.num_workers: 0 loads in the training process.",
    ),
)
# Libraries that look at what they are given, and say what is wrong with it.
_CHECKING = {
    name: Path(str(find_spec(name).origin)).parent  # type: ignore[union-attr]
    for name in ("lightning", "lightning_utilities", "torchmetrics", "jsonargparse", "torch.distributed")
}
_LOOK_THERE = "Look for the first error in the output of the others"
_LAST_WORDS, _LOOK_EVERY, _OUTLIVE = 30.0, 0.5, 5.0  # seconds


def in_words(error: BaseException) -> UserError | None:
    """The fault behind an error that a library raised, or nothing if it is nobody's but ours."""
    causes = causes_of(error)
    told = [cause for cause in causes if isinstance(cause, UserError)]
    return next((fault for fault in (*told, *map(_fault_of, causes)) if fault is not None), None)


def _fault_of(error: BaseException) -> UserError | None:
    text = "out of memory" if isinstance(error, MemoryError) else str(error)
    if isinstance(error, OSError) and error.errno in _DISK:
        problem, remedy = _DISK[error.errno]
        return FaultError(str(error.filename or "disk"), f"expected to use it, found that {problem}.", remedy)
    if isinstance(error, (RuntimeError, ValueError, MemoryError)):
        for where, pattern, expected, remedy in _SAID:
            if pattern.search(text):
                return FaultError(where, f"{expected} ({_first_line(text)}).", remedy)
    if isinstance(error, RuntimeError) and (_TOO_LONG.search(text) or _GONE.search(text)):
        return _fault_of_another_process(text)
    return _said_on_purpose(error)


def _said_on_purpose(error: BaseException) -> FaultError | None:
    """What a library says by a ``raise`` of its own, or PyTorch of processes, in one line; else it is an accident."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    said = [
        (name, frame.line)
        for frame in last
        for name, folder in _CHECKING.items()
        if folder in Path(frame.filename).parents
    ]
    if isinstance(error, DistError) or any(str(line).startswith("raise ") for _, line in said):
        words = str(error.args[0] if isinstance(error, KeyError) else error)
        where = said[0][0] if said else "torch.distributed"
        if where == "jsonargparse":
            return FaultError(*in_one_line(words))
        return FaultError(where, " ".join(words.split()) or type(error).__name__)
    return None


def _fault_of_another_process(text: str) -> FaultError:
    """What gloo, NCCL or the store that they meet at have to say of a process that does not answer."""
    first = _first_line(_PLACE_IN_LIBRARY.sub("", text.strip())).rstrip(".")
    waited = "process_timeout"
    if seconds := _WAITED.search(text):
        waited = f"{int(seconds[1]) / (1 if seconds[2] else 1000):g} s (process_timeout)"
    problem = f"expected an answer of every process, found that one is gone or hangs ({first})."
    remedy = f"{_LOOK_THERE}; one without any may have been killed for want of memory."
    if came := _NOT_ALL_CAME.search(text):
        problem = f"expected {came[2]} processes to start, found {came[1]} after {waited}."
        remedy = "Start it on every node, with the same first node and port, or raise process_timeout."
    elif _TOO_LONG.search(text):
        problem = f"expected an answer of every process, found that one is gone or hangs: none in {waited}. {first}."
        remedy = f"{_LOOK_THERE}; raise process_timeout if one of them only took long."
    return FaultError("processes", problem, remedy)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0][:160]


def watch_processes(child_processes: list[subprocess.Popen[Any]]) -> None:
    """Sees to it that the processes which the first one has started end with it, and it with them.

    Lightning's own watch kills the first process without a word, often before that could say what it has met, and
    leaves the others behind when the first one fails. Given are the second process of this machine and those after it.
    """
    over = threading.Event()
    atexit.register(_end_with_this_one, child_processes, over)
    threading.Thread(target=_watch, args=(child_processes, over), daemon=True, name="process-watch").start()


def _watch(processes: list[subprocess.Popen[Any]], over: threading.Event) -> None:
    while not any(process.poll() for process in processes):
        if over.wait(_LOOK_EVERY):
            return
    number, status = next((n, status) for n, process in enumerate(processes, 1) if (status := process.poll()))
    if over.wait(_LAST_WORDS):  # mostly this process meets an error of its own
        return
    ended = f"ended with status {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
    problem = f"expected process {number} to live, found that it {ended} {_LAST_WORDS:g} s ago."
    remedy = "Look for the first error in its output; one without any may have been killed for want of memory."
    print(f"error: {FaultError('processes', problem, remedy)}", file=sys.stderr, flush=True)
    for other in processes:
        other.kill()
    os._exit(2)  # the main thread may wait for a device, where no exception reaches it


def _end_with_this_one(processes: list[subprocess.Popen[Any]], over: threading.Event) -> None:
    """Leaves the others a moment for what they have to say, then ends those that hang."""
    over.set()
    deadline = time.monotonic() + _OUTLIVE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
