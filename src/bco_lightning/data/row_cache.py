"""Rows as they were read and tokenized before, found again by the content of everything that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info

from bco_lightning.data.row_counts import FeedbackSummary, RowCounts
from bco_lightning.data.row_table import RowSet

_DAYS_UNUSED = 30
_MANIFEST = "manifest.json"


@dataclass
class ReadRows:
    """What reading has found.

    Args:
        row_sets: Rows by the name of their data set.
        summary: What the log looks like, where it is one to train on.
    """

    row_sets: dict[str, RowSet]
    summary: FeedbackSummary | None = None


class RowCache:
    """A folder with one folder for each content, which only its owner can look into.

    Entries hold what users wrote, as tokens and prompts. One that nobody used for 30 days is removed.

    Args:
        root: The folder; it is made when it is needed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, key: str, read: Callable[[Path | None], ReadRows]) -> ReadRows:
        """The rows of that key, read now if they are not there.

        Args:
            key: Digest of all that the rows depend on.
            read: Reads them, and leaves the file of each row set in the folder that it is given.
        """
        entry = self._root / key
        found = self._find(entry)
        if found is not None:
            rank_zero_info(f"rows: found as they were tokenized before, in {entry} (data.cache_rows)")
            os.utime(entry)
            return found
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self._root))  # for its owner alone
        except OSError as error:
            rank_zero_info(f"rows: not kept for the next start ({error.strerror}: {self._root})")
            return read(None)
        try:
            rows = read(draft)
            _write_manifest(draft, rows)
            self._put(draft, entry)
            self._remove_unused()
            return self._find(entry) or rows
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _put(self, draft: Path, entry: Path) -> None:
        try:
            draft.rename(entry)
        except OSError:  # another process was faster, or there is a damaged one
            if self._find(entry) is None:
                with contextlib.suppress(OSError):
                    shutil.rmtree(entry, ignore_errors=True)
                    draft.rename(entry)

    def _find(self, entry: Path) -> ReadRows | None:
        try:
            manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
            row_sets = {name: _row_set(entry, values) for name, values in manifest["row_sets"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        summary = manifest["summary"]
        return ReadRows(row_sets, FeedbackSummary(**summary) if summary else None)

    def _remove_unused(self) -> None:
        for entry in self._root.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _DAYS_UNUSED * 24 * 3600:
                    shutil.rmtree(entry, ignore_errors=True)


def _write_manifest(folder: Path, rows: ReadRows) -> None:
    manifest = {
        "row_sets": {
            name: {
                "counts": asdict(row_set.counts),
                "digest": row_set.digest,
                "sha256": _digest_of(_file_of(folder, name)) if row_set.dataset is not None else None,
            }
            for name, row_set in rows.row_sets.items()
        },
        "summary": rows.summary and asdict(rows.summary),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _row_set(folder: Path, values: Mapping[str, Any]) -> RowSet:
    """One of an entry.

    Raises:
        ValueError: If its file is not what was written.
    """
    row_set = RowSet(RowCounts.from_values(values["counts"]), digest=values["digest"])
    if values["sha256"] is not None:
        file = _file_of(folder, row_set.counts.name)
        if _digest_of(file) != values["sha256"]:
            raise ValueError(file)
        row_set.dataset = Dataset.from_file(str(file))
    return row_set


def _file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.arrow"


def _digest_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
