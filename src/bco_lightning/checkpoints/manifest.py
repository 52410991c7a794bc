"""The manifest of a checkpoint: what it is of, size and SHA-256 digest of each of its files; and which one to take."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bco_lightning.checkpoints.best import BestSteps
from bco_lightning.checkpoints.folders import STEP_FOLDER, saved_steps, step_folder, step_of
from bco_lightning.checkpoints.runs import newest_first
from bco_lightning.errors import CheckpointError, UnsafeCheckpointError
from bco_lightning.identity import digest_of_file

MANIFEST_FILE = "manifest.json"
FORMAT = 2
BEST, WORDS = "best", ("last", "best")  # that stand for a step of the run, or runs, in whose folder they seem to lie
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes, last of all files, some facts that can be read without the others, and what those are."""
    (folder / MANIFEST_FILE).write_bytes(_sealed({"format": FORMAT, **facts, "files": files}))


def verify_checkpoint(folder: Path, share: tuple[int, int] | None = (0, 1)) -> dict[str, Any]:
    """Compares the files of a step's folder with its manifest, which it gives back, and names the first that is wrong.

    ``share`` is ``(process, processes)``: this process compares the bytes of its share of the files, and the sizes of
    all; ``None`` is for sizes alone.
    """
    _require_folder(folder)
    if folder.is_symlink():
        raise CheckpointError(str(folder), "expected the folder of a checkpoint, found a link.")
    manifest = _manifest_of(folder)
    if STEP_FOLDER.fullmatch(folder.name) and step_of(folder) != manifest["step"]:
        found = manifest["step"]
        problem = f"expected the checkpoint of the step that its folder is named after, found that of step {found}."
        raise CheckpointError(str(folder / MANIFEST_FILE), problem, "Give it the name that it had.")
    files = manifest["files"]
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in files:
            raise CheckpointError(str(path), "expected the checkpoint's own files, found this one besides.")
    own = sorted(files)[share[0] :: share[1]] if share else []
    for name, facts in files.items():
        path = _own_file(folder, name, "a file of the checkpoint")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(str(path), f"expected {facts['bytes']} bytes, found {path.stat().st_size}.")
        if name in own and digest_of_file(path) != facts["sha256"]:
            raise CheckpointError(str(path), "expected the bytes that were written, found others (SHA-256 differs).")
    return manifest


def _manifest_of(folder: Path) -> dict[str, Any]:
    path = _own_file(folder, MANIFEST_FILE, "the manifest of a checkpoint")
    written = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(written)
        del manifest["checksum"]
        whole = _sealed(manifest) == written
        names, found, _ = list(manifest["files"]), manifest["format"], manifest["step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(str(path), "expected a manifest, found something unreadable.") from error
    if not whole:
        raise CheckpointError(str(path), "expected the manifest as it was written, found a changed one.")
    if found != FORMAT:
        problem = f"expected format {FORMAT}, found {found}."
        raise CheckpointError(str(path), problem, "Use the version of this package that wrote it.")
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(str(path), f"expected plain file names, found {name[:60]!r}.")
    return manifest


def _own_file(folder: Path, name: str, what: str) -> Path:
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(str(path), f"expected {what}, found none.")
    return path


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's one canonical text, with a digest of itself, so that no byte of it can change unseen."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "checksum": digest}, indent=1, sort_keys=True) + "\n").encode()


def newest_verified(
    checkpoints: Path, skipped: Callable[[CheckpointError], None], share: tuple[int, int] | None = (0, 1)
) -> Path | None:
    """The newest step of a run that verifies; ``skipped`` is told why each newer one was passed over."""
    for folder in reversed(saved_steps(checkpoints)):
        try:
            verify_checkpoint(folder, share)
        except CheckpointError as error:
            skipped(error)
        else:
            return folder
    return None


def resolve_checkpoint(
    path: Path,
    skipped: Callable[[CheckpointError], None],
    share: tuple[int, int] | None = (0, 1),
    run_folder: Path | None = None,
) -> Path:
    """The step's folder that a path or a word means.

    That may be a step's folder, a run's folder (its newest whole step), or a folder of runs (that of its newest run
    that has one); ``last`` in a folder is the same, and ``best`` the best step of that run. A word alone is about
    ``run_folder``. ``skipped`` is told why each newer step was passed over; the best one is whole, or refused.
    """
    path = run_folder / path if run_folder is not None and str(path) in WORDS else path
    word = path.name if path.name in WORDS and not path.exists() else ""
    path = path.parent if word else path
    _require_folder(path)
    if (path / MANIFEST_FILE).exists() or STEP_FOLDER.fullmatch(path.name):
        return path
    for checkpoints in (path / "checkpoints", path, *(run / "checkpoints" for run in newest_first(path))):
        if word == BEST and saved_steps(checkpoints):
            return _best_of(checkpoints, share)
        if word != BEST and (found := newest_verified(checkpoints, skipped, share)) is not None:
            return found
    raise CheckpointError(str(path), "expected a whole checkpoint to go on with, found none.")


def _best_of(checkpoints: Path, share: tuple[int, int] | None) -> Path:
    if (step := BestSteps.read(checkpoints).step) is None:
        remedy = "checkpoint.monitor says by what a step is the best at a validation; 'last' is the newest step."
        raise CheckpointError(str(checkpoints), "expected a run with a best step, found none.", remedy)
    verify_checkpoint(best := step_folder(checkpoints, step), share)
    return best


def _require_folder(path: Path) -> None:
    """Before anything else looks into it."""
    if path.is_file():
        found = "found a file, which may hold objects that would run code when read"
        problem = f"expected the folder of a checkpoint, {found}."
        raise UnsafeCheckpointError(str(path), problem, "Do not use this file.")
    if not path.is_dir():
        raise CheckpointError(str(path), "expected a whole checkpoint to go on with, found none.")
