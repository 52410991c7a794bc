"""JSON lines: packed ones from the front to the end, others also from the middle."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from bco_lightning.data.files import open_file, open_unpacked, size_of
from bco_lightning.data.records.record_file import Block, Place, Read, Record, RecordFile, SeekableFile, changed
from bco_lightning.data.records.strict_json import MAX_LINE_BYTES, numbered_lines, parse_line, refuse_binary
from bco_lightning.data.remote import HTTP, protocol_of, read_range, require_ranges
from bco_lightning.errors import FeedbackRowError

PIECE_BYTES, BLOCK_BYTES = 2**22, 2**18
_MORE_BYTES = 2**16


class PackedLines(RecordFile):
    """A file of JSON lines that gzip or zstd has packed."""

    def __iter__(self) -> Read:
        """Reads it through."""
        yield from Lines(partial(open_unpacked, self.path), self.name)


class JsonLines(SeekableFile):
    """A ``.jsonl`` file, on a disk or wherever fsspec reads."""

    @cached_property
    def _size(self) -> int:
        size = size_of(self.path)
        if protocol_of(self.path) in HTTP:
            require_ranges(self.path, size)
        return size

    def __iter__(self) -> Read:
        """Reads it through; over HTTP in one request."""
        yield from Lines(partial(open_file, self.path), self.name)

    def pieces(self) -> list[tuple[int, int]]:
        """Every four MiB, wherever lines end; a piece has the lines that begin in it."""
        return [(start, min(start + PIECE_BYTES, self._size)) for start in range(0, self._size, PIECE_BYTES)]

    def piece(self, start: int, stop: int) -> Lines:
        """The lines that begin between two bytes."""
        return Lines(partial(open_file, self.path, in_parts=True), self.name, start, stop)

    def units(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Runs of 256 KiB."""
        return offsets // BLOCK_BYTES

    def block_of(self, offset: int) -> int:
        """Number of the run."""
        return offset // BLOCK_BYTES

    def blocks(self, key: int) -> dict[int, Block]:
        """The run, up to the end of the line that begins last in it; mostly in one request."""
        start = key * BLOCK_BYTES
        longest = min(self._size, start + BLOCK_BYTES + MAX_LINE_BYTES + 1)
        data = read_range(self.path, start, min(longest, start + BLOCK_BYTES + _MORE_BYTES))
        while data.find(b"\n", BLOCK_BYTES - 1) < 0 and start + len(data) < longest:
            more = read_range(self.path, start + len(data), min(longest, start + len(data) + BLOCK_BYTES))
            if not more:  # the file has become shorter
                break
            data += more
        return {key: _Bytes(data, start, self.name)}

    def mark(self) -> str:
        """Nothing: each line has a checksum."""
        return ""


class Lines:
    """The lines of a file, or those that begin in a part of it.

    Args:
        open: Opens the file.
        name: What to call it.
        start: Where the part begins; the file has to seek then.
        stop: Where it ends; with the file if left out.
    """

    def __init__(self, open: Callable[[], BinaryIO], name: str, start: int = 0, stop: int | None = None) -> None:  # noqa: A002
        self._open, self._name, self._start, self._stop, self.num_lines = open, name, start, stop, 0

    def __iter__(self) -> Read:
        """The records, or what is wrong with a line."""
        for place, line in self._lines():
            record: Record | FeedbackRowError | None
            try:
                record = parse_line(line, f"{self._name}:{place.line}")
            except FeedbackRowError as error:
                record = error.without_cause()
            if record is not None:
                yield place, record

    def _lines(self) -> Iterator[tuple[Place, bytes]]:
        self.num_lines, offset = 0, self._start
        with self._open() as file:
            if self._start:
                file.seek(self._start - 1)  # the byte before tells whether a line begins at once
                offset += next((size for _, _, size in numbered_lines(file, self._name)), 1) - 1
            for number, line, size in numbered_lines(file, self._name):
                if self._stop is not None and offset >= self._stop:
                    return
                if not offset:
                    refuse_binary(line, f"{self._name}:1")
                self.num_lines = number
                yield Place(offset, number, zlib.crc32(line)), line
                offset += size


class _Bytes:
    """Bytes of a file, up to the end of the line that begins last in a block of it."""

    def __init__(self, data: bytes, start: int, name: str) -> None:
        self._data, self._start, self._name, self.num_bytes = data, start, name, len(data)

    def at(self, place: Place) -> Record | FeedbackRowError:
        """The record in the line that begins at a place."""
        begin = place.offset - self._start
        end = self._data.find(b"\n", begin) + 1 or len(self._data)
        line = self._data[begin : min(end, begin + MAX_LINE_BYTES + 1)]
        if zlib.crc32(line) != place.check:
            raise changed(self._name)
        try:
            return parse_line(line, f"{self._name}:{place.line}") or changed(self._name)
        except FeedbackRowError as error:
            return error.without_cause()
