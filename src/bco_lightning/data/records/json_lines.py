"""JSON lines: packed ones from the front to the end, others also by place."""

from __future__ import annotations

import zlib
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bco_lightning.data.files import open_unpacked, size_of
from bco_lightning.data.records.record_file import Place, Read, Record, RecordFile, SeekableFile, changed
from bco_lightning.data.records.strict_json import MAX_LINE_BYTES, numbered_lines, parse_line, refuse_binary
from bco_lightning.data.remote import read_range
from bco_lightning.errors import FeedbackRowError

_BLOCK_BYTES, _MORE_BYTES = 2**18, 2**16


class PackedLines(RecordFile):
    """A file of JSON lines that is read from the front to the end, packed or not."""

    def __iter__(self) -> Read:
        """Reads it through; over HTTP in one request."""
        offset = 0
        with open_unpacked(self.path) as file:
            for number, line, size in numbered_lines(file, self.name):
                if number == 1:
                    refuse_binary(line, f"{self.name}:1")
                if (record := _parsed(line, f"{self.name}:{number}")) is not None:
                    yield Place(offset, number, zlib.crc32(line)), record
                offset += size


class JsonLines(PackedLines, SeekableFile):
    """A ``.jsonl`` file, on a disk or wherever fsspec reads; a line is found by its first byte."""

    @cached_property
    def _size(self) -> int:
        return size_of(self.path)

    def units(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Runs of 256 KiB."""
        return offsets // _BLOCK_BYTES

    def block(self, unit: int) -> LineBlock:
        """The run, up to the end of the line that begins last in it; mostly in one request."""
        start = unit * _BLOCK_BYTES
        longest = min(self._size, start + _BLOCK_BYTES + MAX_LINE_BYTES + 1)
        data = read_range(self.path, start, min(longest, start + _BLOCK_BYTES + _MORE_BYTES))
        while data.find(b"\n", _BLOCK_BYTES - 1) < 0 and start + len(data) < longest:
            more = read_range(self.path, start + len(data), min(longest, start + len(data) + _BLOCK_BYTES))
            if not more:  # the file has become shorter
                break
            data += more
        return LineBlock(data, start, self.name)

    def mark(self) -> str:
        """Nothing: each line has a checksum."""
        return ""


class LineBlock:
    """Bytes of a file with the lines that begin in some part of it.

    Args:
        data: They.
        start: Where in the file they begin.
        name: What to call the file.
    """

    def __init__(self, data: bytes, start: int, name: str) -> None:
        self._data, self._start, self._name, self.num_bytes = data, start, name, len(data)

    def at(self, place: Place) -> Record | FeedbackRowError:
        """The record in the line that begins at a place."""
        begin = place.offset - self._start
        end = self._data.find(b"\n", begin) + 1 or len(self._data)
        line = self._data[begin : min(end, begin + MAX_LINE_BYTES + 1)]
        if zlib.crc32(line) != place.check:
            raise changed(self._name)
        record = _parsed(line, f"{self._name}:{place.line}")
        return changed(self._name) if record is None else record


def _parsed(line: bytes, place: str) -> Record | FeedbackRowError | None:
    try:
        return parse_line(line, place)
    except FeedbackRowError as error:
        return error.without_cause()
