"""Parquet files and Arrow folders, read from the middle."""

from __future__ import annotations

import hashlib
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, BinaryIO

import pyarrow as pa

from bco_lightning.data.files import open_file, size_of
from bco_lightning.data.records import Record
from bco_lightning.data.records.parquet import batch_rows
from bco_lightning.data.records.tables import _record_of as record_of
from bco_lightning.data.records.tables import _records_of as records_of
from bco_lightning.data.records.tables import _saved_dataset as saved_dataset
from bco_lightning.data.records.tables import in_one_line
from bco_lightning.data.remote import public_name
from bco_lightning.data.streaming.blocks import BLOCK_BYTES, BLOCK_ROWS, Content, Piece, cut_evenly
from bco_lightning.errors import FeedbackRowError

# A row group can only be decoded from its beginning. Its rows are therefore shuffled in runs, of at most an eighth of
# it but not less than these; in the mean a pass then decodes each row group about five times.
_UNIT_ROWS, _UNITS = 4096, 8
_KEPT_CURSORS, _KEPT_BLOCKS, _KEPT_BYTES = 16, 64, 2**24
_ARROW_PIECE_ROWS = 2**14


class ArrowRows:
    """Rows of a block as an Arrow batch.

    Args:
        batch: Its rows.
        numbers: The place of each in the block; all of them in order if left out.
    """

    check = 0

    def __init__(self, batch: pa.RecordBatch, numbers: list[int] | None = None) -> None:
        self._batch, self._places = batch, None if numbers is None else {n: place for place, n in enumerate(numbers)}

    @classmethod
    def of(cls, table: pa.Table) -> ArrowRows:
        """The rows of a table."""
        [batch] = table.combine_chunks().to_batches()
        return cls(batch)

    def __len__(self) -> int:
        return len(self._batch)

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        return int(self._batch.nbytes) + 4096

    def line(self, number: int) -> int:
        """Place of a record in the block."""
        return number

    def record(self, number: int, place: str) -> Record:
        """One record."""
        return _raised(record_of(self._batch.slice(self._places[number] if self._places else number, 1), place))

    def records(self) -> Iterator[tuple[int, Callable[[str], Record]]]:
        """Every record, as its place and a function that takes the place in the log and gives it."""
        for number, record in enumerate(records_of(self._batch, "", 0)):
            if isinstance(record, FeedbackRowError):
                yield number, partial(self.record, number)
            else:
                yield number, partial(_given, record)

    def only(self, numbers: list[int]) -> ArrowRows:
        """Some of the rows, under the numbers that they had."""
        return ArrowRows(self._batch.take(pa.array(numbers, pa.int64())), numbers)


class ParquetRows:
    """A ``.parquet`` file, on a disk or wherever fsspec reads.

    Args:
        path: As :func:`~bco_lightning.data.files.expand` gives it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._cursors: list[_Cursor] = []  # the one used last comes last

    def borders(self) -> list[int]:
        """Where row groups that hold rows begin, and the number of rows."""
        return sorted(set(self._borders))

    def piece(self, start: int, stop: int) -> Piece:
        """The blocks of one row group."""
        unit_rows = max(_UNIT_ROWS, -(-(stop - start) // _UNITS))
        blocks = cut_evenly(start, stop, self._block_rows(start), unit_rows)

        def contents() -> Iterator[Content]:
            for block in blocks:
                yield self.content(int(block["start"]), int(block["stop"]))

        return Piece(blocks, stop - start, b"", contents)

    def content(self, start: int, stop: int) -> Content:
        """The rows of one block; the decoder stays there for the next."""
        group = bisect_right(self._borders, start) - 1
        cursor = self._cursor(group, start)
        try:
            return ArrowRows.of(cursor.block(start))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _unreadable(self.path, "a Parquet file", error) from error

    def fingerprint(self) -> str:
        """Of its size and its footer, which has counts, sizes and mostly the limits of each column chunk."""
        return hashlib.sha256(f"{size_of(self.path)} {self._file.metadata.to_dict()}".encode()).hexdigest()

    @cached_property
    def _source(self) -> BinaryIO:
        file = open_file(self.path)
        weakref.finalize(self, file.close)
        return file

    @cached_property
    def _file(self) -> Any:
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(self._source, pre_buffer=False, buffer_size=2**20)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, "a Parquet file", error) from error

    @cached_property
    def _borders(self) -> list[int]:
        borders = [0]
        for group in range(self._file.metadata.num_row_groups):
            borders.append(borders[-1] + self._file.metadata.row_group(group).num_rows)
        return borders

    def _block_rows(self, start: int) -> int:
        group = self._file.metadata.row_group(bisect_right(self._borders, start) - 1)
        fitting = BLOCK_BYTES * int(group.num_rows) // max(1, int(group.total_byte_size))
        return max(1, min(BLOCK_ROWS, fitting, batch_rows(self._source, group)))

    def _cursor(self, group: int, start: int) -> _Cursor:
        """A decoder that stands before a block and not far from it, or a new one."""
        known = next((cursor for cursor in self._cursors if cursor.can_give(group, start)), None)
        if known is None:
            known = _Cursor(self._file, group, self._borders[group], self._block_rows(start))
            known.skip_to(start)
        else:
            self._cursors.remove(known)
        self._cursors = [*self._cursors, known][-_KEPT_CURSORS:]
        return known


class _Cursor:
    """Decodes a row group block by block; blocks that it has passed are kept for a while."""

    def __init__(self, file: Any, group: int, first: int, block_rows: int) -> None:
        self._group, self._next, self._block_rows = group, first, block_rows
        self._batches = file.iter_batches(batch_size=block_rows, row_groups=[group])
        self._rest: list[pa.RecordBatch] = []
        self._passed: OrderedDict[int, pa.Table] = OrderedDict()

    def can_give(self, group: int, start: int) -> bool:
        near = self._next <= start < self._next + _KEPT_BLOCKS * self._block_rows
        return group == self._group and (near or start in self._passed)

    def skip_to(self, start: int) -> None:
        while self._next < start:
            self._advance()

    def block(self, start: int) -> pa.Table:
        while start not in self._passed:
            first, table = self._advance()
            self._passed[first] = table
            while len(self._passed) > _KEPT_BLOCKS or (len(self._passed) > 1 and self._kept_bytes() > _KEPT_BYTES):
                self._passed.popitem(last=False)
        return self._passed.pop(start)

    def _kept_bytes(self) -> int:
        return sum(int(table.nbytes) for table in self._passed.values())

    def _advance(self) -> tuple[int, pa.Table]:
        """The next block; a batch may have fewer rows than asked for."""
        rows = sum(len(batch) for batch in self._rest)
        while rows < self._block_rows and (batch := next(self._batches, None)) is not None:
            self._rest.append(batch)
            rows += len(batch)
        if not rows:
            raise pa.ArrowInvalid("fewer rows than its footer says")
        table = pa.Table.from_batches(self._rest)
        first, self._next = self._next, self._next + min(rows, self._block_rows)
        self._rest = table.slice(self._block_rows).to_batches()
        return first, table.slice(0, self._block_rows)


class ArrowFolder:
    """A folder that ``Dataset.save_to_disk`` has written; it is mapped, not read.

    Args:
        path: The folder, with ``@SPLIT`` if it has several.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def borders(self) -> list[int]:
        """Every few thousand rows."""
        return [*range(0, len(self._rows), _ARROW_PIECE_ROWS), len(self._rows)]

    def piece(self, start: int, stop: int) -> Piece:
        """The blocks between two rows."""
        rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES * len(self._rows) // max(1, size_of(self.path))))
        blocks = cut_evenly(start, stop, rows, rows)

        def contents() -> Iterator[Content]:
            for block in blocks:
                yield self.content(int(block["start"]), int(block["stop"]))

        return Piece(blocks, stop - start, b"", contents)

    def content(self, start: int, stop: int) -> Content:
        """The rows of one block."""
        try:
            table = self._rows[start:stop]
            table.validate(full=True)  # damaged offsets would end the process
            return ArrowRows.of(table)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, "an Arrow folder", error) from error

    def fingerprint(self) -> str:
        """The one that the data set was saved with."""
        return str(self._rows._fingerprint)

    @cached_property
    def _rows(self) -> Any:
        return saved_dataset(self.path).with_format("arrow")


def _raised(record: Record | FeedbackRowError) -> Record:
    try:
        if isinstance(record, FeedbackRowError):
            raise record
        return record
    finally:
        del record  # an error that holds itself by its traceback would hold its block until the next collection


def _given(record: Record, _: str) -> Record:
    return record


def _unreadable(path: str, expected: str, error: Exception) -> FeedbackRowError:
    return FeedbackRowError(public_name(path), f"expected {expected}, found {in_one_line(error)}.")
