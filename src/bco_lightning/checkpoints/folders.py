"""Files and folders that appear and go in one piece, and those that are named after optimizer steps."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STEP_FOLDER = re.compile(r"step-(\d{8,})")


@contextmanager
def written_whole(target: Path, replaces: bool = True) -> Iterator[Path]:
    """Yields the path of a file or folder to make; once made and flushed, it takes the place of ``target``.

    Raises:
        OSError: If the disk is full or cannot be written, or ``target`` has come to be meanwhile where it ``replaces``
            nothing; it is then as it was before.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if not replaces and os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        replaced = target.with_name(f".{target.name}.removed-{os.getpid()}")
        if target.is_dir():  # the same step, written again after a resume from an earlier one
            target.rename(replaced)
        partial.rename(target)
        _flush(target.parent)
    except BaseException:
        _remove(partial)
        raise
    _remove(replaced)


def discard(target: Path) -> None:
    """Removes a folder, its name first: what has a name is never half there."""
    if target.exists() or target.is_symlink():
        doomed = target.with_name(f".{target.name}.removed-{os.getpid()}")
        _remove(doomed)
        target.rename(doomed)
        _remove(doomed, ignore_errors=False)


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of an optimizer step, named so that names sort like steps."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step that a folder is named after."""
    return int(folder.name.removeprefix("step-"))


def saved_steps(checkpoints: Path) -> list[Path]:
    """Folders that have a step's name, oldest first; whether they verify is another question."""
    return sorted((path for path in checkpoints.glob("step-*") if STEP_FOLDER.fullmatch(path.name)), key=step_of)


def prune(checkpoints: Path, keep: int, verified: Callable[[Path], bool], best: int | None = None) -> list[Path]:
    """Removes old steps but the best one once ``keep`` newer ones are known to be whole, and says which."""
    whole, removed = 0, []
    for folder in reversed(saved_steps(checkpoints)):
        if whole >= keep:
            if step_of(folder) != best:
                discard(folder)
                removed.append(folder)
        else:
            whole += verified(folder)
    return removed


def remove_orphans(checkpoints: Path) -> list[Path]:
    """Removes what a killed process left of steps half-written or half-removed."""
    found = [path for path in checkpoints.glob(".step-*") if path.is_dir()]
    for path in found:
        _remove(path)
    return found


def _remove(path: Path, ignore_errors: bool = True) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; they are no reason to save nothing.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
