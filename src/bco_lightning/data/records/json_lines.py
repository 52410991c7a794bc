"""JSON lines: packed ones from the front to the end, others also by place."""

from __future__ import annotations

import zlib
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bco_lightning.data.files import open_unpacked, size_of
from bco_lightning.data.records.record_file import Block, Place, Read, RecordFile, SeekableFile, changed
from bco_lightning.data.records.strict_json import MAX_LINE_BYTES, numbered_lines, parse_line, refuse_binary
from bco_lightning.data.remote import place_in, read_range
from bco_lightning.data.values import Record
from bco_lightning.errors import FeedbackRowError

_BLOCK_BYTES, _MORE_BYTES = 2**18, 2**16


def line_records(file: RecordFile) -> Read:
    """The records of a file of JSON lines, packed or not; over HTTP in one request."""
    offset = 0
    with open_unpacked(file.path) as opened:
        for number, line, size in numbered_lines(opened, file.name):
            if number == 1:
                refuse_binary(line, place_in(file.name, 1))
            if (record := parse_line(line, place_in(file.name, number))) is not None:
                yield Place(offset, number, zlib.crc32(line)), record
            offset += size


class JsonLines(SeekableFile):
    """A ``.jsonl`` file, on a disk or wherever fsspec reads; a line is found by its first byte."""

    def __init__(self, path: str) -> None:
        super().__init__(path, line_records)

    @cached_property
    def _size(self) -> int:
        return size_of(self.path)

    def units(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Runs of 256 KiB."""
        return offsets // _BLOCK_BYTES

    def block(self, unit: int) -> Block:
        """The run, up to the end of the line that begins last in it; mostly in one request."""
        start = unit * _BLOCK_BYTES
        longest = min(self._size, start + _BLOCK_BYTES + MAX_LINE_BYTES + 1)
        data = read_range(self.path, start, min(longest, start + _BLOCK_BYTES + _MORE_BYTES))
        while data.find(b"\n", _BLOCK_BYTES - 1) < 0 and start + len(data) < longest:
            more = read_range(self.path, start + len(data), min(longest, start + len(data) + _BLOCK_BYTES))
            if not more:  # the file has become shorter
                break
            data += more

        def at(place: Place) -> Record | FeedbackRowError:
            begin = place.offset - start
            end = data.find(b"\n", begin) + 1 or len(data)
            line = data[begin : min(end, begin + MAX_LINE_BYTES + 1)]
            if zlib.crc32(line) != place.check:
                raise changed(self.name)
            record = parse_line(line, place_in(self.name, place.line))
            return changed(self.name) if record is None else record

        return Block(len(data), at)
