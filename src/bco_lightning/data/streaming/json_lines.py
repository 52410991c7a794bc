"""JSON lines, read from the middle."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from bco_lightning.data.files import size_of
from bco_lightning.data.records.strict_json import MAX_LINE_BYTES, Record, parse_line, refuse_binary
from bco_lightning.data.remote import HTTP, errors_named, file_system, is_remote, protocol_of, public_name
from bco_lightning.data.streaming.blocks import BLOCK, BLOCK_BYTES, BLOCK_ROWS, Blocks, Content, Piece
from bco_lightning.errors import FeedbackRowError

# No line within a piece can be over the limit then; only the last one, which may go on after it.
PIECE_BYTES = MAX_LINE_BYTES
_MORE_BYTES = 2**16
_BRACE, _LINE_BREAK = b"{"[0], b"\n"[0]


class Lines:
    """Lines of a block that are not blank.

    Args:
        lines: By their number: the line, from 0 at the first of the block, and its bytes.
        check: CRC-32 of the whole block.
    """

    def __init__(self, lines: dict[int, tuple[int, bytes]], check: int) -> None:
        self._lines, self.check = lines, check

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        return sum(len(line) + 160 for _, line in self._lines.values())

    def line(self, number: int) -> int:
        """Line of a record, from 0 at the first line of the block."""
        return self._lines[number][0]

    def record(self, number: int, place: str) -> Record:
        """One record; what it raises is what :func:`parse_line` raises."""
        return _parsed(self._lines[number][1], place)

    def records(self) -> Iterator[tuple[int, Callable[[str], Record]]]:
        """Every record, as its line and a function that takes the place and gives it."""
        return ((line, partial(_parsed, text)) for line, text in self._lines.values())

    def only(self, numbers: list[int]) -> Lines:
        """Some of the lines, under the numbers that they had."""
        return Lines({number: self._lines[number] for number in numbers}, self.check)


class JsonLines:
    """A ``.jsonl`` file, on a disk or wherever fsspec reads.

    Args:
        path: As :func:`~bco_lightning.data.files.expand` gives it.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @cached_property
    def _size(self) -> int:
        size = size_of(self.path)
        if protocol_of(self.path) in HTTP:
            _require_parts(self.path, size)
        return size

    def borders(self) -> list[int]:
        """Every four MiB, wherever lines end; a piece has the lines that begin in it."""
        return [*range(0, self._size, PIECE_BYTES), self._size]

    def piece(self, start: int, stop: int) -> Piece:
        """The lines that begin between two places of the file, in blocks."""
        begin, data = self._lines_from(start, stop)
        lines = _Lines(data)
        blocks = lines.blocks()
        spans = list(zip(blocks["start"].tolist(), blocks["stop"].tolist(), strict=True))
        blocks["check"] = [zlib.crc32(memoryview(data)[first:last]) for first, last in spans]
        blocks["start"] += begin
        blocks["stop"] += begin

        def contents() -> Iterator[Content]:
            for first, last in spans:
                yield _content(data[first:last])

        return Piece(blocks, len(lines.starts), hashlib.sha256(data).digest() if data else b"", contents)

    def content(self, start: int, stop: int) -> Content:
        """The lines of one block."""
        return _content(read_range(self.path, start, stop))

    def fingerprint(self) -> str:
        """Nothing: its bytes are read in any case."""
        return ""

    def _lines_from(self, start: int, stop: int) -> tuple[int, bytes]:
        """Where the first line begins that does so between two places, and the bytes to the end of the last."""
        before = min(start, 1)  # the byte before tells whether a line begins at once
        data = read_range(self.path, start - before, stop)
        if not start:
            refuse_binary(data, f"{public_name(self.path)}:1")
        first = data.find(b"\n") + 1 if before else 0
        if first >= len(data) or (before and not first):
            return start, b""
        data = data[first:]
        return start - before + first, data + self._rest(stop, len(data) - data.rfind(b"\n") - 1)

    def _rest(self, place: int, length: int) -> bytes:
        """What is left of a line of which ``length`` bytes are known; of one over the limit not more than tells it."""
        rest = b""
        end = min(self._size, place + MAX_LINE_BYTES + 1 - length)
        while length and place < end:
            more = read_range(self.path, place, min(place + _MORE_BYTES, end))
            if not more:  # the file has become shorter
                break
            line_end = more.find(b"\n") + 1
            if line_end:
                return rest + more[:line_end]
            rest += more
            place += len(more)
        return rest


class _Lines:
    """Where the lines of some bytes are."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._bytes = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(self._bytes == _LINE_BREAK) + 1
        if len(data) and not data.endswith(b"\n"):
            ends = np.append(ends, len(data))
        self._ends = ends
        self.starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends

    def blocks(self) -> Blocks:
        lines = self._not_blank()
        starts, ends = self.starts[lines], self._ends[lines]
        borders, first = [0], 0
        while first < len(lines):
            within = int(np.searchsorted(ends, starts[first] + BLOCK_BYTES, side="right"))
            first = max(first + 1, min(within, first + BLOCK_ROWS, len(lines)))
            borders.append(first)
        firsts, lasts = np.array(borders[:-1], np.int64), np.array(borders[1:], np.int64)
        blocks = np.zeros(len(firsts), BLOCK)
        blocks["start"], blocks["stop"] = starts[firsts], ends[lasts - 1]
        blocks["line"], blocks["rows"], blocks["apart"] = lines[firsts], lasts - firsts, 1
        return blocks

    def _not_blank(self) -> np.ndarray[Any, Any]:
        wanted = self._bytes[self.starts] == _BRACE
        for number in np.flatnonzero(~wanted).tolist():
            wanted[number] = not is_blank(self._data[self.starts[number] : self._ends[number]])
        return np.flatnonzero(wanted)


def is_blank(line: bytes) -> bool:
    r"""Whether a line is no row, as :func:`parse_line` sees it.

    Example:
        >>> [is_blank(line) for line in (b" \r\n", "\u3000\n".encode(), b"null", b"\xff")]
        [True, True, False, False]
    """
    if not line.strip():
        return True
    try:
        return len(line) <= MAX_LINE_BYTES and not line.decode().strip()
    except UnicodeDecodeError:
        return False


def read_range(path: str, start: int, stop: int) -> bytes:
    """The bytes of a file between two places, fewer where a local one ends before; of a remote one in one request.

    Raises:
        FeedbackRowError: If they cannot be read, or a server gives others than were asked for.
    """
    if start >= stop:
        return b""
    with errors_named(path):
        if is_remote(path):
            system, inside = file_system(path)
            data = bytes(system.cat_file(inside, start=start, end=stop))
            if len(data) != stop - start:
                raise _no_parts(path, f"{len(data)} bytes instead of {stop - start}")
            return data
        with Path(path).open("rb", buffering=0) as file:
            file.seek(start)
            return _read_all(file, stop - start)


def _require_parts(url: str, size: int) -> None:
    """Refuses a web server that gives whole files alone, before it sends one that may be larger than memory."""
    if not size:
        raise _no_parts(url, "an empty file, or one whose size it does not tell")
    with errors_named(url):
        system, inside = file_system(url)
        try:
            with system.open(inside, "rb", cache_type="none") as file:
                file.seek(size - 1)
                file.read(1)
        except ValueError:  # of fsspec, where a server answers with all of it
            raise _no_parts(url, "one that gives whole files") from None


def _no_parts(path: str, found: str) -> FeedbackRowError:
    return FeedbackRowError(
        public_name(path),
        f"expected a server that gives parts of files with data.streaming, found {found}.",
        "Download the file, or set data.streaming: false.",
    )


def _read_all(file: io.FileIO, size: int) -> bytes:
    data = file.read(size) or b""
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def _content(data: bytes) -> Lines:
    lines = ((number, line) for number, line in enumerate(io.BytesIO(data)) if line[0] == _BRACE or not is_blank(line))
    return Lines(dict(enumerate(lines)), zlib.crc32(data))


def _parsed(line: bytes, place: str) -> Record:
    record = parse_line(line, place)
    if record is None:
        raise FeedbackRowError(place, "expected a record, found white space.")
    return record
