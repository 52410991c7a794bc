"""Rows of Parquet files."""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bco_lightning.data.files import open_file, size_of
from bco_lightning.data.records.record_file import Block, Read, SeekableFile
from bco_lightning.data.records.tables import BATCH_ROWS, RowBlock, RowPiece, in_one_line, rows_of
from bco_lightning.errors import FeedbackRowError

_KIND = "a Parquet file"
# What a batch may take in memory at most, where the encoding lets a value of a few bytes stand for a long text.
_BATCH_BYTES = 32 * 2**20
_BLOCK_BYTES = 2**18
_AS_LONG_AS_STORED = {"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"}
_OF_DICTIONARY = {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}
_USUAL_DICTIONARY = 2**20  # what writers limit it to
# A row group can only be decoded from its beginning. Its rows are therefore shuffled in runs, of at most an eighth of
# it but not less than these; in the mean a pass then decodes each row group about five times.
_UNIT_ROWS, _UNITS = 4096, 8
_NEAR_BLOCKS, _KEPT_CURSORS = 64, 16


class ParquetRows(SeekableFile):
    """A ``.parquet`` file, on a disk or wherever fsspec reads."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._cursors: list[_Cursor] = []  # the one used last comes last

    def __iter__(self) -> Read:
        """Reads it through."""
        yield from rows_of(self._batches(0, self._num_groups), self.name, _KIND)

    def pieces(self) -> list[tuple[int, int]]:
        """The row groups that hold rows."""
        borders = self._borders.tolist()
        return [(start, stop) for start, stop in pairwise(borders) if start < stop]

    def piece(self, start: int, stop: int) -> RowPiece:
        """The rows of one row group."""
        group = self._group_of(start)
        return RowPiece(self._batches(group, group + 1), self.name, _KIND, start)

    def units(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Parts of row groups."""
        sizes = np.diff(self._borders)
        unit_rows = np.maximum(_UNIT_ROWS, -(-sizes // _UNITS))
        firsts = np.concatenate([[0], np.cumsum(-(-sizes // unit_rows))])
        groups = np.searchsorted(self._borders, offsets, side="right") - 1
        return np.asarray(firsts[groups] + (offsets - self._borders[groups]) // unit_rows[groups], np.int64)

    def block_of(self, offset: int) -> int:
        """First row of the block."""
        first, rows = self._grid(self._group_of(offset))
        return first + (offset - first) // rows * rows

    def blocks(self, key: int) -> dict[int, Block]:
        """The block, and those that the decoder has passed since it stood near before it."""
        from pyarrow import ArrowException

        group = self._group_of(key)
        cursor = next((known for known in self._cursors if known.is_near(group, key)), None)
        try:
            if cursor is None:
                cursor = _Cursor(self._file, group, *self._grid(group))
                cursor.skip_to(key)
            else:
                self._cursors.remove(cursor)
            self._cursors = [*self._cursors, cursor][-_KEPT_CURSORS:]
            return {first: RowBlock(table, first, self.name) for first, table in cursor.up_to(key)}
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error

    def mark(self) -> str:
        """A digest of its size and its footer, which has counts, sizes and mostly the limits of each column chunk."""
        return hashlib.sha256(f"{size_of(self.path)} {self._file.metadata.to_dict()}".encode()).hexdigest()

    @cached_property
    def _source(self) -> BinaryIO:
        file = open_file(self.path)
        weakref.finalize(self, file.close)
        return file

    @cached_property
    def _file(self) -> Any:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            # Without a buffer, whole column chunks are read, which may be as large as the file.
            return ParquetFile(self._source, pre_buffer=False, buffer_size=2**20)
        except FeedbackRowError:
            raise
        except (ArrowException, OSError, ValueError, MemoryError) as error:
            raise self._unreadable(error) from error

    @cached_property
    def _borders(self) -> NDArray[np.int64]:
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._num_groups)]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @property
    def _num_groups(self) -> int:
        return int(self._file.metadata.num_row_groups)

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._borders, row, side="right")) - 1

    def _batches(self, start: int, stop: int) -> Iterator[Any]:
        for group in range(start, stop):
            rows = batch_rows(self._source, self._file.metadata.row_group(group))
            yield from self._file.iter_batches(batch_size=rows, row_groups=[group])

    def _grid(self, number: int) -> tuple[int, int]:
        """First row of a row group, and rows of its blocks."""
        group = self._file.metadata.row_group(number)
        fitting = _BLOCK_BYTES * int(group.num_rows) // max(1, int(group.total_byte_size))
        return int(self._borders[number]), max(1, min(fitting, batch_rows(self._source, group)))

    def _unreadable(self, error: Exception) -> FeedbackRowError:
        return FeedbackRowError(self.name, f"expected {_KIND}, found {in_one_line(error)}.")


class _Cursor:
    """Decodes a row group block by block, forwards."""

    def __init__(self, file: Any, group: int, first: int, block_rows: int) -> None:
        self._group, self._next, self._block_rows = group, first, block_rows
        self._batches = file.iter_batches(batch_size=block_rows, row_groups=[group])
        self._rest: list[Any] = []

    def is_near(self, group: int, first: int) -> bool:
        """Whether it stands at or shortly before a block."""
        return group == self._group and self._next <= first < self._next + _NEAR_BLOCKS * self._block_rows

    def skip_to(self, first: int) -> None:
        """Goes to a block."""
        while self._next < first:
            self._advance()

    def up_to(self, first: int) -> list[tuple[int, Any]]:
        """The blocks up to one, each with its first row."""
        blocks = []
        while self._next <= first:
            blocks.append((self._next, self._advance()))
        return blocks

    def _advance(self) -> Any:
        """The next block; a batch may have fewer rows than asked for."""
        import pyarrow as pa

        rows = sum(len(batch) for batch in self._rest)
        while rows < self._block_rows and (batch := next(self._batches, None)) is not None:
            self._rest.append(batch)
            rows += len(batch)
        if not rows:
            raise pa.ArrowInvalid("fewer rows than its footer says")
        table = pa.Table.from_batches(self._rest)
        self._next += min(rows, self._block_rows)
        self._rest = table.slice(self._block_rows).to_batches()
        return table.slice(0, self._block_rows)


def batch_rows(file: BinaryIO, group: Any) -> int:
    """Rows of a row group that are decoded at a time, so few that their texts cannot fill the memory.

    Args:
        file: The Parquet file; where it stands does not matter, and changes.
        group: What the footer says of the row group, a ``pyarrow.parquet.RowGroupMetaData``.
    """
    columns = [group.column(number) for number in range(group.num_columns)]
    longest = sum(_longest_text(file, column) for column in columns if column.physical_type == "BYTE_ARRAY")
    return max(1, min(BATCH_ROWS, _BATCH_BYTES // max(1, longest)))


def _longest_text(file: BinaryIO, column: Any) -> int:
    """Bytes that every text of a column may have, although next to none are stored of it; 0 where all are stored."""
    shared, stored = set(column.encodings) - _AS_LONG_AS_STORED, int(column.total_uncompressed_size)
    if not shared or stored <= _USUAL_DICTIONARY or not shared <= _OF_DICTIONARY:
        return stored if shared else 0
    # The page begins with its kind and its size, each a byte for the field and a number in the varints of Thrift.
    file.seek(column.dictionary_page_offset or column.data_page_offset)
    head = re.match(rb"\x15\x04\x15([\x80-\xff]*[\x00-\x7f])", file.read(16))
    return stored if head is None else sum((byte & 127) << 7 * place for place, byte in enumerate(head[1])) // 2
