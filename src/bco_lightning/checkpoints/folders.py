"""Writing beside the target, flushing, renaming: what has a name was complete once."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yields the path of a file or folder to make; once made, it becomes ``target`` in one piece.

    Args:
        target: What is to appear; one that is there already is replaced.

    Raises:
        OSError: If the disk is full or cannot be written; ``target`` is then as it was before.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
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
    """Removes a file or folder, its name first: what has a name is never half there."""
    if target.exists() or target.is_symlink():
        doomed = target.with_name(f".{target.name}.removed-{os.getpid()}")
        _remove(doomed)
        target.rename(doomed)
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()


def remove_orphans(folder: Path) -> list[Path]:
    """Removes what a killed process left half-written or half-removed of folders called ``step-...``."""
    found = [path for path in folder.glob(".step-*") if path.is_dir()] if folder.is_dir() else []
    for path in found:
        _remove(path)
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
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
