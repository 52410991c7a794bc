"""Which step of which run: the newest that verifies, and which of them stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bco_lightning.checkpoints.folders import discard
from bco_lightning.checkpoints.manifest import MANIFEST_FILE, verify_checkpoint
from bco_lightning.errors import CheckpointError, UnsafeCheckpointError

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of an optimizer step, named so that names sort like steps."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step that a folder is named after."""
    return int(folder.name.removeprefix("step-"))


def saved_steps(checkpoints: Path) -> list[Path]:
    """Folders that have a step's name, oldest first; whether they verify is another question."""
    if not checkpoints.is_dir():
        return []
    return sorted((path for path in checkpoints.iterdir() if _STEP_FOLDER.fullmatch(path.name)), key=step_of)


def newest_verified(
    checkpoints: Path, skipped: Callable[[CheckpointError], None], share: tuple[int, int] | None = (0, 1)
) -> Path | None:
    """The newest step of a run that verifies.

    Args:
        checkpoints: The run's ``checkpoints`` folder.
        skipped: Is told why each newer one was passed over.
        share: As for :func:`verify_checkpoint`.

    Returns:
        Its folder, or ``None``.
    """
    for folder in reversed(saved_steps(checkpoints)):
        try:
            verify_checkpoint(folder, share)
        except CheckpointError as error:
            skipped(error)
        else:
            return folder
    return None


def resolve_checkpoint(
    path: Path, skipped: Callable[[CheckpointError], None], share: tuple[int, int] | None = (0, 1)
) -> Path:
    """Finds the checkpoint that a path means.

    Args:
        path: A step's folder, a run's folder (its newest whole step), or a folder of runs (that of its newest run that
            has one).
        skipped: Is told why each newer step was passed over.
        share: As for :func:`verify_checkpoint`.

    Returns:
        A step's folder.

    Raises:
        CheckpointError: If there is none.
        UnsafeCheckpointError: If it is a file.
    """
    require_folder(path)
    if (path / MANIFEST_FILE).exists() or _STEP_FOLDER.fullmatch(path.name):
        return path
    runs = [path / "checkpoints", path, *(run / "checkpoints" for run in _newest_first(path.glob("version_*")))]
    for checkpoints in runs:
        if (found := newest_verified(checkpoints, skipped, share)) is not None:
            return found
    raise CheckpointError(str(path), "expected a whole checkpoint to go on with, found none.")


def require_folder(path: Path) -> None:
    """Refuses what is no folder, before anything else looks into it.

    Raises:
        CheckpointError: If it is not there.
        UnsafeCheckpointError: If it is a file.
    """
    if path.is_file():
        raise UnsafeCheckpointError(
            str(path),
            "expected the folder of a checkpoint, found a file, which may hold objects that would run code when read.",
            "Do not use this file.",
        )
    if not path.is_dir():
        raise CheckpointError(str(path), "expected a whole checkpoint to go on with, found none.")


def _newest_first(runs: Iterator[Path]) -> list[Path]:
    def last_saved(run: Path) -> int:
        return max((step.stat().st_mtime_ns for step in saved_steps(run / "checkpoints")), default=0)

    return sorted(runs, key=last_saved, reverse=True)


def prune(checkpoints: Path, keep: int, verified: Callable[[Path], bool]) -> list[Path]:
    """Removes old steps once ``keep`` newer ones are known to be whole.

    Args:
        checkpoints: The run's ``checkpoints`` folder.
        keep: How many whole checkpoints stay; at least 2.
        verified: Whether a folder is whole.

    Returns:
        What was removed.
    """
    whole, removed = 0, []
    for folder in reversed(saved_steps(checkpoints)):
        if whole >= keep:
            discard(folder)
            removed.append(folder)
        else:
            whole += verified(folder)
    return removed
