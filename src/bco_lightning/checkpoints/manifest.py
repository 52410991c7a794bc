"""The manifest of a checkpoint: what it is of, and size and SHA-256 digest of each of its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bco_lightning.errors import CheckpointError
from bco_lightning.identity import digest_of_file

MANIFEST_FILE = "manifest.json"
TENSORS = ".safetensors"
FORMAT = 2
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the manifest, last of all files.

    Args:
        folder: Folder of the checkpoint.
        facts: What the manifest says besides its files, so that it can be read without them.
        files: Size and digest of each file, by name.
    """
    (folder / MANIFEST_FILE).write_bytes(_sealed({"format": FORMAT, **facts, "files": dict(files)}))


def verify_checkpoint(folder: Path, share: tuple[int, int] | None = (0, 1)) -> dict[str, Any]:
    """Compares the files of a checkpoint with its manifest.

    Args:
        folder: Folder of a step.
        share: ``(process, processes)``: this process compares the bytes of its share of the files, and the sizes of
            all; ``None`` for sizes alone.

    Returns:
        The manifest.

    Raises:
        CheckpointError: Naming the file that is missing, cut, changed or not the checkpoint's own.
    """
    if folder.is_symlink():
        raise CheckpointError(str(folder), "expected the folder of a checkpoint, found a link.")
    manifest = _manifest_of(folder)
    files = manifest["files"]
    foreign = sorted(path.name for path in folder.glob(f"*{TENSORS}") if path.name not in files)
    if foreign:
        raise CheckpointError(str(folder / foreign[0]), "expected the checkpoint's own files, found this one besides.")
    own = sorted(files)[share[0] :: share[1]] if share else []
    for name, facts in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(str(path), "expected a file of the checkpoint, found none.")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(str(path), f"expected {facts['bytes']} bytes, found {path.stat().st_size}.")
        if name in own and digest_of_file(path) != facts["sha256"]:
            raise CheckpointError(str(path), "expected the bytes that were written, found others (SHA-256 differs).")
    return manifest


def _manifest_of(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(str(path), "expected the manifest of a checkpoint, found none.")
    written = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(written)
        del manifest["checksum"]
        whole = _sealed(manifest) == written
        names, found = list(manifest["files"]), manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(str(path), "expected a manifest, found something unreadable.") from error
    if not whole:
        raise CheckpointError(str(path), "expected the manifest as it was written, found a changed one.")
    if found != FORMAT:
        raise CheckpointError(
            str(path), f"expected format {FORMAT}, found {found}.", "Use the version of this package that wrote it."
        )
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(str(path), f"expected plain file names, found {name[:60]!r}.")
    return manifest


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's one canonical text, with a digest of itself, so that no byte of it can change unseen."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "checksum": digest}, indent=1, sort_keys=True) + "\n").encode()
