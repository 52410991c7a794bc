"""Reference log-probabilities on disk: hashes of rows and one number each, in files that are never changed.

A file is named after its own SHA-256. So processes and runs can write at the same time without a lock, a damaged file
shows by its name, and writing the same values twice leaves one file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

KEY_BYTES = 16
RECORD = np.dtype([("key", f"S{KEY_BYTES}"), ("value", "<f4")])
_MOST_FILES = 16
_TRIES = 10  # one more is needed whenever others have put files together meanwhile


class ReferenceStore:
    """The values of one reference, computed in one way.

    Args:
        root: As :func:`~bco_lightning.places.cache_root` gives it.
        key: Digest of everything that the values depend on besides the row.
    """

    def __init__(self, root: Path, key: str) -> None:
        self.key = key
        self.folder = root / "reference_log_probs" / key[:32]

    def read(self) -> np.ndarray[Any, Any]:
        """All values, as records of ``key`` (the first 128 bits of the row's SHA-256) and ``value`` (nats, float32).

        Of a row that is there twice, every process finds the same value first. A damaged file is passed over with a
        warning that names it.
        """
        return self._read()[1]

    def append(self, records: np.ndarray[Any, Any]) -> None:
        """Adds records, those that are not finite left out; the file is on the disk when this returns.

        A folder that cannot be written to is worth a warning: the run has its values, only the next one will not.
        """
        records = records[np.isfinite(records["value"])]
        if not len(records):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._write(records)
            if len(self._files()) > _MOST_FILES:
                self._put_together()
        except OSError as error:
            rank_zero_warn(
                f"{self.folder}: reference log-probs could not be written ({error.strerror}); this run goes on with "
                "them, a later one will compute them again. model.cache_folder names another place."
            )

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.npy"))

    def _read(self) -> tuple[list[Path], np.ndarray[Any, Any]]:
        for last in [*[False] * (_TRIES - 1), True]:
            files, found = self._files(), []
            try:
                for file in files:
                    with contextlib.suppress(*([FileNotFoundError] if last else [])):
                        found.append(_records_of(file))
            except FileNotFoundError:
                continue
            break
        return files, np.concatenate([np.empty(0, RECORD), *found])

    def _write(self, records: np.ndarray[Any, Any]) -> Path:
        content = io.BytesIO()
        np.save(content, np.sort(records, order="key", kind="stable"), allow_pickle=False)
        target = self.folder / _name_of(content.getvalue())
        descriptor, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content.getvalue())
                file.flush()
                os.fsync(file.fileno())
            Path(partial).replace(target)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        _flush_folder(self.folder)
        return target

    def _put_together(self) -> None:
        """Writes what many files hold into one, then removes them; whoever reads meanwhile lists the folder again."""
        files, records = self._read()
        _, first = np.unique(records["key"], return_index=True)
        whole = self._write(records[first])
        for file in files:
            if file != whole:
                file.unlink(missing_ok=True)


def _records_of(file: Path) -> np.ndarray[Any, Any]:
    content = file.read_bytes()
    if _name_of(content) != file.name:
        rank_zero_warn(
            f"{file}: expected a whole file of reference log-probs, found a damaged one; it is passed over, and what "
            "it held is computed again where it is needed."
        )
        return np.empty(0, RECORD)
    records = np.load(io.BytesIO(content), allow_pickle=False)
    return records[np.isfinite(records["value"])]  # type: ignore[no-any-return]


def _name_of(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:32]}.npy"


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
