"""What stands in files: records, one at a time, from the front to the end or by their place."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from bco_lightning.data.files import HUB, arrow_folder, expand, size_of, suffixes_of
from bco_lightning.data.records.csv_rows import Cells, csv_rows
from bco_lightning.data.records.json_document import document_records
from bco_lightning.data.records.json_lines import JsonLines, line_records
from bco_lightning.data.records.parquet import ParquetRows
from bco_lightning.data.records.record_file import Block, Place, RecordFile, SeekableFile, changed
from bco_lightning.data.records.tables import ArrowFolder, arrow_rows, hub_rows
from bco_lightning.data.remote import HTTP, is_remote, protocol_of, require_ranges
from bco_lightning.data.values import Record
from bco_lightning.errors import FeedbackRowError

_OPEN_FILES = 64
_NO_CELLS: Cells = {}


def record_file(path: str, cells: Cells = _NO_CELLS) -> RecordFile:
    """The file of a path, as :func:`~bco_lightning.data.files.expand` gives it, by its suffix.

    Of a CSV, ``cells`` says what those of a column mean; every other one is the text that it is.
    """
    suffix, packed = suffixes_of(path)
    if path.startswith(HUB):
        return RecordFile(path, hub_rows)
    if not is_remote(path) and arrow_folder(path) is not None:
        return ArrowFolder(path)
    if suffix in (".csv", ".tsv"):
        return RecordFile(path, partial(csv_rows, cells=cells))
    if suffix in (".jsonl", ".ndjson"):
        return RecordFile(path, line_records) if packed else JsonLines(path)
    if suffix == ".json":
        return RecordFile(path, document_records)
    return ParquetRows(path) if suffix == ".parquet" else RecordFile(path, arrow_rows)


def seekable_files(source: str) -> list[SeekableFile]:
    """The files of a source, whose records are found again by their place; an error if one is of another kind."""
    return [seekable_file(path) for path in expand(source)]


def seekable_file(path: str) -> SeekableFile:
    """The file of a path; an error if its records cannot be found again by their place."""
    file = record_file(path)
    if not isinstance(file, SeekableFile):
        suffix, packed = suffixes_of(path)
        found, remedy = f"a {suffix} file", "Convert it to JSON lines or Parquet."
        if path.startswith(HUB):
            name = path.removeprefix(HUB).partition("@")[0]
            found = "a data set of the hub"
            remedy = f"Name its Parquet files, for instance hf://datasets/{name}/**/*.parquet."
        elif packed:
            found, remedy = "a packed one", "Unpack it, or convert it to Parquet, which is packed inside."
        expected = f"expected a file that can be read from the middle with data.streaming, found {found}."
        raise FeedbackRowError(file.name, expected, remedy)
    if protocol_of(path) in HTTP:
        require_ranges(path, size_of(path))
    return file


class RecordStore:
    """Finds records again, and keeps the blocks used last. It pickles to loader workers without these.

    Args:
        paths: Files as :func:`seekable_file` takes them.
        marks: Of each file its :meth:`SeekableFile.mark` when its places were taken.
        num_bytes: About how much memory blocks may take; one is kept in any case.
    """

    def __init__(self, paths: Sequence[str], marks: Sequence[str], num_bytes: int = 2**26) -> None:
        self._paths, self._marks, self._num_bytes = list(paths), list(marks), num_bytes
        self._file = lru_cache(_OPEN_FILES)(partial(_opened, self._paths, self._marks))
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()

    def __reduce__(self) -> tuple[type[RecordStore], tuple[Any, ...]]:
        return type(self), (self._paths, self._marks, self._num_bytes)

    @property
    def bytes_kept(self) -> int:
        """About how much memory blocks take."""
        return sum(block.num_bytes for block in self._blocks.values())

    def at(self, number: int, place: Place) -> Record | FeedbackRowError:
        """The record at a place in the file with that number, or what is wrong with it; raises if the file changed."""
        file = self._file(number, os.getpid())  # an open file has one position for a process and those forked from it
        key = number, int(file.units(np.array([place.offset]))[0])
        if key not in self._blocks:
            self._blocks[key] = file.block(key[1])
            while self.bytes_kept > self._num_bytes and len(self._blocks) > 1:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key].at(place)


def _opened(paths: Sequence[str], marks: Sequence[str], number: int, process: int) -> SeekableFile:
    file = seekable_file(paths[number])
    if file.mark() != marks[number]:
        raise changed(file.name)
    return file
