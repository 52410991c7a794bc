"""Checkpoints that are whole or not there at all: one folder per step, with a manifest of sizes and SHA-256 digests.

A folder is written under a temporary name beside its target, flushed to the disk, and renamed in one piece; so
whatever has a checkpoint's name was complete once, and the manifest tells whether it still is. Nothing here can run
code out of a file: tensors and plain values are all that is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from typing_extensions import override

from bco_lightning.errors import CheckpointError, UnsafeCheckpointError, causes_of
from bco_lightning.shards import has_shards, is_part, put_shards, read_whole

STATE_FILE, MANIFEST_FILE = "state.ckpt", "manifest.json"
_FORMAT = 1
_TOLD = ("fingerprints", "config_digest", "versions", "accepted_changes")
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_BLOCK = 2**20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of an optimizer step, named so that names sort like steps."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step that a folder is named after."""
    return int(folder.name.removeprefix("step-"))


class VerifiedCheckpointIO(CheckpointIO):
    """Saves a checkpoint as a verified folder, and loads such folders (or a single file) without running code.

    A plain ``Trainer`` takes it as ``Trainer(plugins=[VerifiedCheckpointIO()])``; the command line and
    :class:`~bco_lightning.callbacks.RunCheckpoint` bring it along.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes ``checkpoint`` into the folder ``path``.

        Raises:
            CheckpointError: If the disk is full or cannot be written; earlier checkpoints are as before.
        """
        write_checkpoint(checkpoint, Path(path))

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint; ``weights_only`` is taken as true whatever is given.

        Raises:
            CheckpointError: If it is missing, incomplete or changed.
            UnsafeCheckpointError: If it holds anything but tensors and plain values.
        """
        return read_checkpoint(str(path), map_location or "cpu")

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint; a half-removed one has no checkpoint's name any more."""
        target = Path(path)
        if target.exists():
            _discard(target)


def write_checkpoint(checkpoint: Mapping[str, Any], target: Path) -> None:
    """Writes a checkpoint into the folder ``target``, whole or not at all.

    Args:
        checkpoint: Tensors and plain values. The step, and what the run is made of, are copied into the manifest, where
            they can be read without loading the tensors.
        target: Folder to write; one that is there already is replaced.

    Raises:
        CheckpointError: If the disk is full or cannot be written; ``target`` is then as it was before.
    """
    with whole_folder(target, facts_of(checkpoint)) as partial:
        write_state(checkpoint, partial)


def facts_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of a checkpoint."""
    return {"step": checkpoint.get("global_step"), **{key: checkpoint[key] for key in _TOLD if key in checkpoint}}


def write_state(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Writes tensors and plain values."""
    with (folder / STATE_FILE).open("wb") as file:
        torch.save(dict(checkpoint), file)


@contextmanager
def whole_folder(target: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yields an empty folder to write plain files into; when they are written, it becomes ``target`` in one piece.

    Args:
        target: The folder that is to appear.
        facts: What the manifest says besides the files.

    Raises:
        CheckpointError: If the disk is full or cannot be written.
    """
    with in_checkpoint_words(target):
        partial = begin_folder(target)
        try:
            yield partial
            complete_folder(partial, target, facts, {})
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def begin_folder(target: Path) -> Path:
    """An empty folder beside ``target``, to write plain files into."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def complete_folder(
    partial: Path, target: Path, facts: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]
) -> None:
    """Makes ``target`` of a folder of plain files, in one piece.

    Args:
        partial: The folder.
        target: What it becomes; one that is there already is replaced.
        facts: What the manifest says besides the files.
        known: Sizes and digests of files that their writers have flushed.
    """
    files = {path.name: known.get(path.name) or flushed_file(path) for path in sorted(partial.iterdir())}
    manifest = {"format": _FORMAT, **facts, "files": files}
    (partial / MANIFEST_FILE).write_bytes(_sealed(manifest))
    _flush(partial / MANIFEST_FILE)
    _flush(partial)
    replaced = target.with_name(f".{target.name}.removed-{os.getpid()}")
    if target.exists():  # the same step, written again after a resume from an earlier one
        target.rename(replaced)
    partial.rename(target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flushed_file(path: Path) -> dict[str, Any]:
    """Size and digest of a file, once its bytes are on the disk."""
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


@contextmanager
def in_checkpoint_words(target: Path) -> Iterator[None]:
    """Says what kept a checkpoint from being written; ``target`` is then as it was before."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save hides a failed write behind a RuntimeError
        raise _not_written(target, error) from error


def verify_checkpoint(folder: Path, share: tuple[int, int] | None = (0, 1)) -> dict[str, Any]:
    """Compares every file of a checkpoint with its manifest.

    Args:
        folder: Folder of a step.
        share: ``(process, processes)``: of the parts that several processes wrote, which may be large, the bytes of
            this process's share are compared, and of the others the size; of all parts for ``None``.

    Returns:
        The manifest.

    Raises:
        CheckpointError: Naming the file that is missing, cut, changed or not the checkpoint's own.
    """
    if folder.is_symlink():
        raise CheckpointError(str(folder), "expected the folder of a checkpoint, found a link.")
    manifest = _manifest_of(folder)
    parts = sorted(name for name in manifest["files"] if is_part(name))
    foreign = sorted(path.name for path in folder.iterdir() if is_part(path.name) and path.name not in parts)
    if foreign:
        raise CheckpointError(str(folder / foreign[0]), "expected the checkpoint's own files, found this one besides.")
    own = parts[share[0] :: share[1]] if share else []
    for name, facts in manifest["files"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(str(path), "expected a file of the checkpoint, found none.")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(str(path), f"expected {facts['bytes']} bytes, found {path.stat().st_size}.")
        if (name in own or name not in parts) and sha256_of_file(path) != facts["sha256"]:
            raise CheckpointError(str(path), "expected the bytes that were written, found others (SHA-256 differs).")
    return manifest


def read_checkpoint(
    path: str, map_location: Any = "cpu", *, with_shards: bool = True, share: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """Reads a checkpoint folder after verifying it, or a single file that another trainer wrote.

    Args:
        path: Folder of a step, or a file; never a URL.
        map_location: Where tensors go, as for ``torch.load``.
        with_shards: Put tensors that several processes wrote together, whole, where they belong.
        share: What this process verifies of their files, as for :func:`verify_checkpoint`.

    Returns:
        What was saved.

    Raises:
        CheckpointError: If it is missing, incomplete, changed or unreadable.
        UnsafeCheckpointError: If it holds anything but tensors and plain values.
    """
    source = Path(path)
    if "://" in path:
        raise CheckpointError(
            path, "expected a local checkpoint, found a URL.", "Add #sha256=DIGEST on the command line."
        )
    if source.is_dir():
        verify_checkpoint(source, share)
        source = source / STATE_FILE
    if not source.is_file():
        raise CheckpointError(str(source), "expected a checkpoint, found none.")
    try:
        # Mapped where each process takes a part alone; a whole tensor that stays in use is read, for disks may go away.
        mapped = not with_shards and zipfile.is_zipfile(source)
        checkpoint = torch.load(source, map_location=map_location, weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds on a file that is no checkpoint
        if "weights only load failed" in str(error).lower():
            raise UnsafeCheckpointError(
                str(source),
                "expected tensors and plain values, found an unreadable file or objects that would run code when read.",
                "Do not use this file.",
            ) from error
        raise CheckpointError(
            str(source), f"expected a checkpoint, found an unreadable file ({type(error).__name__})."
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(str(source), f"expected a checkpoint, found a {type(checkpoint).__name__}.")
    if with_shards and Path(path).is_dir() and has_shards(Path(path)):
        put_shards(checkpoint, read_whole(Path(path)))
    return checkpoint


def fetch_checkpoint(url: str, folder: Path) -> Path:
    """Downloads a checkpoint file whose digest is known.

    Args:
        url: ``https://...#sha256=DIGEST`` (or ``http``).
        folder: Where to put it.

    Returns:
        The file.

    Raises:
        CheckpointError: If there is no digest, the file has another, or it cannot be fetched.
    """
    location, _, given = url.partition("#sha256=")
    if not re.fullmatch(r"https?://.+", location) or not re.fullmatch(r"[0-9a-f]{64}", given):
        raise CheckpointError(
            location,
            "expected a local checkpoint, or an http(s) URL that ends in #sha256= and 64 hexadecimal digits.",
            "Whoever offers the file can tell its digest: sha256sum FILE.",
        )
    file = folder / "fetched.ckpt"
    try:
        with urllib.request.urlopen(location, timeout=60) as answer, file.open("wb") as target:  # noqa: S310 (checked)
            shutil.copyfileobj(answer, target, _BLOCK)
    except OSError as error:
        raise CheckpointError(location, f"expected a checkpoint to fetch, found that {error}.") from error
    found = sha256_of_file(file)
    if found != given:
        file.unlink()
        raise CheckpointError(
            location, f"expected SHA-256 {given[:12]}…, found {found[:12]}….", "Do not use this file."
        )
    return file


def saved_steps(checkpoints: Path) -> list[Path]:
    """Folders that have a step's name, oldest first; whether they verify is another question."""
    if not checkpoints.is_dir():
        return []
    named = [path for path in checkpoints.iterdir() if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(named, key=step_of)


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
        path: A step's folder, a run's folder (its newest whole step), a folder of runs (that of its newest run that has
            one), or a single file.
        skipped: Is told why each newer step was passed over.
        share: As for :func:`verify_checkpoint`.

    Returns:
        A step's folder, or the file.

    Raises:
        CheckpointError: If there is none.
    """
    if path.is_file() or (path / MANIFEST_FILE).exists() or _STEP_FOLDER.fullmatch(path.name):
        return path
    runs = [path / "checkpoints", path, *(run / "checkpoints" for run in _newest_first(path.glob("version_*")))]
    for checkpoints in runs:
        if (found := newest_verified(checkpoints, skipped, share)) is not None:
            return found
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
    whole = 0
    removed = []
    for folder in reversed(saved_steps(checkpoints)):
        if whole >= keep:
            _discard(folder)
            removed.append(folder)
        else:
            whole += verified(folder)
    return removed


def remove_orphans(checkpoints: Path) -> list[Path]:
    """Removes what a killed run left half-written or half-removed.

    Returns:
        What was removed.
    """
    found = [path for path in checkpoints.glob(".step-*") if path.is_dir()] if checkpoints.is_dir() else []
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's one canonical text, with a digest of itself, so that no byte of it can change unseen."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "checksum": digest}, indent=1, sort_keys=True) + "\n").encode()


def _manifest_of(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(str(path), "expected the manifest of a checkpoint, found none.")
    written = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(written)
        del manifest["checksum"]
        whole = _sealed(manifest) == written and manifest["format"] == _FORMAT
        names = list(manifest["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(str(path), "expected a manifest, found something unreadable.") from error
    if not whole:
        raise CheckpointError(str(path), "expected the manifest as it was written, found a changed one.")
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(str(path), f"expected plain file names, found {name[:60]!r}.")
    return manifest


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


def _discard(folder: Path) -> None:
    """Takes away the name first: what has a checkpoint's name is never half a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.removed-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def _not_written(target: Path, error: Exception) -> Exception:
    cause = next((found for found in causes_of(error) if isinstance(found, OSError)), None)
    if cause is None:
        return error
    problem = f"expected to write a checkpoint, found that {cause.strerror or cause}."
    remedy = "Free some space, or lower checkpoint.keep; the checkpoints written before are whole."
    if cause.errno not in _NO_SPACE:
        remedy = "Give a run_folder that can be written."
    return CheckpointError(str(target), problem, remedy)
