"""Records of an index by the number of a row; blocks are kept while they fit."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from bco_lightning.data.records import Record
from bco_lightning.data.remote import public_name
from bco_lightning.data.streaming.blocks import Content, RecordFile, changed
from bco_lightning.data.streaming.index import StreamIndex
from bco_lightning.data.streaming.record_files import record_file
from bco_lightning.data.streaming.scanning import rows_per_record

_OPEN_FILES = 64


@dataclass(frozen=True)
class FoundRow:
    """Where a row is.

    Args:
        content: Its block, or what is kept of it.
        record: Number of its record there.
        part: Which row of the record it is.
        place: File and line.
        source: Number of its source.
    """

    content: Content
    record: int
    part: int
    place: str
    source: int

    def read(self) -> Record:
        """Its record.

        Raises:
            FeedbackRowError: If that is malformed.
        """
        return self.content.record(self.record, self.place)


class BlockCache:
    """Reads blocks, and keeps those used last; where classes are drawn apart, only their rows of one class.

    Args:
        index: Where the rows are.
        by_class: Whether classes are drawn apart.
        num_bytes: About how much memory blocks may take; one is kept in any case.
    """

    def __init__(self, index: StreamIndex, by_class: bool, num_bytes: int) -> None:
        self._index, self._num_bytes = index, num_bytes
        self._flags = index.flags if by_class else None
        self._rows_per_record = [rows_per_record(dialect.parser()) for dialect in index.dialects]
        self._files: OrderedDict[tuple[int, int], RecordFile] = OrderedDict()
        self.contents: OrderedDict[tuple[int, int], Content] = OrderedDict()
        self.bytes_kept = 0

    def find(self, number: int) -> FoundRow:
        """The row of a number.

        Raises:
            FeedbackRowError: If its file cannot be read, or has changed.
        """
        block = self._index.block_of(number)
        known = self._index.blocks[block]
        key = block, 0 if self._flags is None else int(self._flags[number])
        if key not in self.contents:
            self._keep(key, self._read(known, key[1]))
        self.contents.move_to_end(key)
        content, source = self.contents[key], int(known["source"])
        record, part = divmod(number - int(known["first_row"]), self._rows_per_record[source])
        line = int(known["line"]) + content.line(record) + 1
        return FoundRow(content, record, part, f"{self._name(known)}:{line}", source)

    def _read(self, known: Any, flag: int) -> Content:
        content = self._file(int(known["file"])).content(int(known["start"]), int(known["stop"]))
        per_record, rows = self._rows_per_record[int(known["source"])], int(known["rows"])
        if len(content) != rows // per_record or content.check != int(known["check"]):
            raise changed(self._name(known))
        if self._flags is None:
            return content
        flags = self._flags[int(known["first_row"]) : int(known["first_row"]) + rows]
        return content.only(np.unique(np.flatnonzero(flags == flag) // per_record).tolist())

    def _keep(self, key: tuple[int, int], content: Content) -> None:
        self.contents[key] = content
        self.bytes_kept += content.num_bytes
        while self.bytes_kept > self._num_bytes and len(self.contents) > 1:
            self.bytes_kept -= self.contents.popitem(last=False)[1].num_bytes

    def _file(self, number: int) -> RecordFile:
        # An open file has one position for a process and those forked from it.
        key = os.getpid(), number
        if key not in self._files:
            self._files[key] = record_file(self._index.files[number])
        self._files.move_to_end(key)
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)
        return self._files[key]

    def _name(self, known: Any) -> str:
        return public_name(self._index.files[int(known["file"])])
