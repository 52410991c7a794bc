"""Folders of files by the content of everything that they depend on: made once, then found again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bco_lightning.identity import digest_of_file
from bco_lightning.places import is_private

_Make = Callable[[Path], Mapping[str, Any]]
_Opened = TypeVar("_Opened")
_DAYS_UNUSED, _DAYS_UNFINISHED = 30, 1
_MANIFEST, _DRAFT = "manifest.json", ".draft-"


def kept_folder(
    root: Path | None, key_of: Callable[[], str | None], make: _Make, open_: Callable[[Path, Any], _Opened]
) -> _Opened:
    """What the folder of a key holds, a digest of all that it depends on, if known; it is made if there is none.

    Only its owner can look into it, and one that nobody used for 30 days is removed. Without a ``root`` to keep it in,
    it goes with what was opened of it. ``make`` leaves files in a folder and returns plain values to be kept with them,
    by which ``open_`` opens them.
    """
    if root is None or (key := key_of()) is None:
        return _temporary(make, open_)
    entry = root / key
    found = _opened(entry, open_)
    if found is not None:
        rank_zero_info(f"rows: found as they were tokenized before, in {entry} (data.cache_rows)")
        with contextlib.suppress(OSError):
            os.utime(entry)
        return found
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        # For its owner alone, as the root; it is gone once it is renamed.
        with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=root, ignore_cleanup_errors=True) as draft:
            _fill(Path(draft), make)
            if key_of() == key:
                found = _put(Path(draft), entry, open_)
                _remove_unused(root)
                return found
        rank_zero_warn("rows: files changed while they were read; they are read once more, and not kept.")
    except OSError as error:
        rank_zero_info(f"rows: not kept for the next start ({error.strerror or type(error).__name__}: {root})")
    return _temporary(make, open_)


def _remove_unused(root: Path) -> None:
    """Removes what was made here, and nothing else that may lie there."""
    for path in root.iterdir():
        is_entry = re.fullmatch(r"[0-9a-f]{64}", path.name) is not None and (path / _MANIFEST).is_file()
        if not is_entry and not path.name.startswith(_DRAFT):
            continue
        days = _DAYS_UNUSED if is_entry else _DAYS_UNFINISHED
        with contextlib.suppress(OSError):
            if not path.is_symlink() and time.time() - path.stat().st_mtime > days * 24 * 3600:
                shutil.rmtree(path, ignore_errors=True)


def values_in(folder: Path) -> Any:
    """The values that were kept with the files of a folder; an OSError if there are none."""
    return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["values"]


def _temporary(make: _Make, open_: Callable[[Path, Any], _Opened]) -> _Opened:
    folder = Path(tempfile.mkdtemp(prefix="bco_lightning-"))
    try:
        (folder / _MANIFEST).write_text(json.dumps({"values": make(folder)}), encoding="utf-8")
        opened = open_(folder, values_in(folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(opened, remove_own, folder, os.getpid())
    return opened


def _fill(folder: Path, make: _Make) -> None:
    values = make(folder)
    files = {path.name: digest_of_file(path) for path in folder.iterdir()}
    (folder / _MANIFEST).write_text(json.dumps({"values": values, "files": files}), encoding="utf-8")


def _put(draft: Path, entry: Path, open_: Callable[[Path, Any], _Opened]) -> _Opened:
    try:
        draft.rename(entry)
    except OSError:
        if (found := _opened(entry, open_)) is not None:  # another process was faster
            return found
        shutil.rmtree(entry)  # a damaged one
        draft.rename(entry)
    return open_(entry, values_in(entry))


def _opened(entry: Path, open_: Callable[[Path, Any], _Opened]) -> _Opened | None:
    """The folder if it is as it was written, and nobody else can have put it there to be trained on."""
    try:
        if not is_private(entry):
            return None
        files = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))["files"]
        whole = all(Path(name).name == name and digest_of_file(entry / name) == known for name, known in files.items())
        return open_(entry, values_in(entry)) if whole else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):  # of another shape than ours
        return None


def remove_own(folder: Path, process: int) -> None:
    """Removes a folder in the process that made it."""
    if os.getpid() == process:  # a forked loader worker has the same files, and must not take them from the others
        shutil.rmtree(folder, ignore_errors=True)
