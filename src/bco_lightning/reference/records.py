"""Reference log-probs on disk: hashes of rows and one number each, nothing that users wrote.

Files are never changed and are named after their own SHA-256. So processes and runs can write at the same time without
a lock, and a damaged file shows by its name.
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
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn

KEY_BYTES = 16
RECORD = np.dtype([("key", f"S{KEY_BYTES}"), ("value", "<f4")])
_MOST_FILES = 16
_ROWS_AT_A_TIME = 1000
_Array = np.ndarray[Any, Any]


def keys_and_lengths(dataset: Dataset) -> tuple[_Array, _Array]:
    """The key of each row, the first 128 bits of SHA-256 over its tokens and which carry loss, and its length."""
    keys, lengths = bytearray(), [np.empty(0, np.int32)]
    for table in dataset.select_columns(["input_ids", "completion_mask"]).with_format("arrow").iter(_ROWS_AT_A_TIME):
        ids, masks = (table.column(name).combine_chunks() for name in ("input_ids", "completion_mask"))
        lengths.append(ids.value_lengths().to_numpy())
        ends = np.cumsum(lengths[-1])[:-1]
        tokens = np.split(ids.flatten().to_numpy().astype("<i4", copy=False), ends)
        scored = np.split(masks.flatten().to_numpy(zero_copy_only=False), ends)
        for row, mask in zip(tokens, scored, strict=True):
            keys += hashlib.sha256(row.tobytes() + mask.tobytes()).digest()[:KEY_BYTES]
    return np.frombuffer(bytes(keys), dtype=RECORD["key"]), np.concatenate(lengths)


def read_records(folder: Path) -> _Array:
    """All values in a folder, in nats; of a row that is there twice, every process finds the same one first.

    A damaged file is passed over with a warning, one that goes meanwhile in silence: they are computed again.
    """
    found = [np.empty(0, RECORD)]
    for file in sorted(folder.glob("*.npy")):
        with contextlib.suppress(FileNotFoundError):
            content = file.read_bytes()
            if _name_of(content) != file.name:
                rank_zero_warn(
                    f"{file}: expected a whole file of reference log-probs, found a damaged one; it is passed over, "
                    "and what it held is computed again where it is needed."
                )
                continue
            found.append(np.load(io.BytesIO(content), allow_pickle=False))
    return np.concatenate(found)


def write_records(folder: Path, records: _Array) -> None:
    """Adds records; the file is flushed when this returns.

    A folder that cannot be written to is worth a warning: the run has its values, only the next one will not.
    """
    if not len(records):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_whole(folder, records)
        files = sorted(folder.glob("*.npy"))
        if len(files) > _MOST_FILES:
            records = read_records(folder)
            whole = _write_whole(folder, records[np.unique(records["key"], return_index=True)[1]])
            for file in files:
                if file != whole:
                    file.unlink(missing_ok=True)
    except OSError as error:
        rank_zero_warn(
            f"{folder}: reference log-probs could not be written ({error.strerror}); this run goes on with them, a "
            "later one will compute them again. model.cache_folder names another place."
        )


def _write_whole(folder: Path, records: _Array) -> Path:
    content = io.BytesIO()
    np.save(content, np.sort(records, order="key", kind="stable"), allow_pickle=False)
    target = folder / _name_of(content.getvalue())
    descriptor, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.getvalue())
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def _name_of(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:32]}.npy"
