"""Rows as they were read and tokenized before, found again by the content of everything that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
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

_DAYS_UNUSED, _DAYS_UNFINISHED = 30, 1
_MANIFEST, _DRAFT = "manifest.json", ".draft-"


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
            key: Digest of all that the rows depend on, in hexadecimal digits.
            read: Reads them, and leaves the file of each row set in the folder that it is given.
        """
        entry = self._root / key
        found = _find(entry)
        if found is not None:
            rank_zero_info(f"rows: found as they were tokenized before, in {entry} (data.cache_rows)")
            with contextlib.suppress(OSError):
                os.utime(entry)
            return found
        draft = None
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=self._root))  # for its owner alone
            rows = read(draft)
            _write_manifest(draft, rows)
            _put(draft, entry)
            self._remove_unused()
            return _find(entry) or rows
        except OSError as error:
            rank_zero_info(
                f"rows: not kept for the next start ({error.strerror or type(error).__name__}: {self._root})"
            )
        finally:
            if draft is not None:
                shutil.rmtree(draft, ignore_errors=True)
        return read(None)

    def _remove_unused(self) -> None:
        """Removes what this class has made, and nothing else that may lie there."""
        for path in self._root.iterdir():
            is_entry = re.fullmatch(r"[0-9a-f]{64}", path.name) is not None and (path / _MANIFEST).is_file()
            if not is_entry and not path.name.startswith(_DRAFT):
                continue
            days = _DAYS_UNUSED if is_entry else _DAYS_UNFINISHED
            with contextlib.suppress(OSError):
                if not path.is_symlink() and time.time() - path.stat().st_mtime > days * 24 * 3600:
                    shutil.rmtree(path, ignore_errors=True)


def _put(draft: Path, entry: Path) -> None:
    try:
        draft.rename(entry)
    except OSError:  # another process was faster, or there is a damaged one
        if _find(entry) is None:
            with contextlib.suppress(OSError):
                shutil.rmtree(entry, ignore_errors=True)
                draft.rename(entry)


def _find(entry: Path) -> ReadRows | None:
    try:
        if not _is_private(entry):
            return None
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        row_sets = {
            name: _row_set(_file_of(entry, name), name, values) for name, values in manifest["row_sets"].items()
        }
        summary = FeedbackSummary(**manifest["summary"]) if manifest["summary"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return ReadRows(row_sets, summary)


def _is_private(entry: Path) -> bool:
    """Whether only this user can have put it there; rows of a stranger would be trained on in place of the log's."""
    status = entry.lstat()
    return stat.S_ISDIR(status.st_mode) and (
        not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
    )


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


def _row_set(file: Path, name: str, values: Mapping[str, Any]) -> RowSet:
    """One of an entry.

    Raises:
        ValueError: If its file is not what was written.
    """
    row_set = RowSet(RowCounts.from_values(values["counts"]), digest=values["digest"])
    if row_set.counts.name != name or not name.isidentifier():
        raise ValueError(name)
    if values["sha256"] is not None:
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
