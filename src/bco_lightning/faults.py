"""Faults of the machine, of a loader worker or of another process, told in words a user can act on."""

from __future__ import annotations

import errno
import re

import torch

from bco_lightning.errors import FaultError, UserError

_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory|Cannot allocate memory", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker .*(?:killed|exited unexpectedly)", re.DOTALL)
_OTHER_PROCESS = re.compile(
    r"Timed out waiting|Connection (?:closed by peer|reset)|timed out|Broken pipe|connectFullMesh|watchdog",
    re.IGNORECASE,
)
_DISK = {
    errno.ENOSPC: ("the disk is full", "Free some space."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space."),
    errno.EROFS: ("the file system is read-only", "Give a run_folder that can be written."),
    errno.EACCES: ("permission is missing", "See who may read and write it."),
    errno.EPERM: ("permission is missing", "See who may read and write it."),
}


def in_words(error: BaseException) -> UserError | None:
    """The fault behind an error, if it is one that a user meets.

    Args:
        error: What a library raised.

    Returns:
        What happened and what to do, or ``None`` for an error that is nobody's but ours.
    """
    for cause in causes_of(error):
        if isinstance(cause, UserError):
            return cause
    for cause in causes_of(error):
        fault = _fault_of(cause)
        if fault is not None:
            return fault
    return None


def _fault_of(error: BaseException) -> UserError | None:
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _MEMORY.search(text)
    ):
        return FaultError(
            "memory",
            f"expected the step to fit, found none left ({_first_line(text)}).",
            "Lower data.batch_size and raise trainer.accumulate_grad_batches by the same factor, lower "
            "data.max_length, set model.gradient_checkpointing: true, or train adapters (model.lora).",
        )
    if isinstance(error, RuntimeError) and _WORKER.search(text):
        return FaultError(
            "data.num_workers",
            f"expected loader workers to live, found one dead ({_first_line(text)}).",
            "Often the machine ran out of memory; data.num_workers: 0 loads in the training process.",
        )
    if isinstance(error, RuntimeError) and _OTHER_PROCESS.search(text):
        return FaultError(
            "processes",
            f"expected an answer of every process, found that one is gone or hangs ({_first_line(text)}).",
            "Look for the first error in the output of the others; process_timeout sets how long to wait.",
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        problem, remedy = _DISK[error.errno]
        return FaultError(str(error.filename or "disk"), f"expected to use it, found that {problem}.", remedy)
    return None


def causes_of(error: BaseException | None) -> list[BaseException]:
    """An error and what led to it, the nearest first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0][:160]
