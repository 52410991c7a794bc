"""Rows of Parquet files."""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bco_lightning.data.files import open_file, size_of
from bco_lightning.data.records.record_file import Block, SeekableFile
from bco_lightning.data.records.swelling import refuse_swelling
from bco_lightning.data.records.tables import BATCH_ROWS, block_of, rows_of, whole

_KIND = "a Parquet file"
# A row group can only be decoded from its beginning. Its rows are therefore shuffled in runs, of at most an eighth of
# it but not less than these, unless these are long; in the mean a pass then decodes each row group about five times.
_UNIT_ROWS, _UNITS, _UNIT_BYTES = 4096, 8, 2**26
# What a batch may take in memory at most, where the encoding lets a value of a few bytes stand for a long text.
_BATCH_BYTES = 32 * 2**20
_AS_LONG_AS_STORED = {"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"}
_OF_DICTIONARY = {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}
_USUAL_DICTIONARY = 2**20  # what writers limit it to


class ParquetRows(SeekableFile):
    """A ``.parquet`` file, on a disk or wherever fsspec reads."""

    def __init__(self, path: str) -> None:
        super().__init__(path, lambda file: rows_of(file._batches(), file.name, _KIND))

    def units(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Parts of row groups."""
        return np.searchsorted(self._units, offsets, side="right") - 1

    def block(self, unit: int) -> Block:
        """One part; where its texts would fill the memory, rows are decoded anew when they are asked for."""
        from pyarrow import Table

        start, stop = self._units[unit : unit + 2].tolist()
        batches: list[Any] = []
        for batch in self._between(start, stop):
            batches.append(batch)
            if sum(held.nbytes for held in batches) > 2 * _UNIT_BYTES:
                break
        return block_of(Table.from_batches(batches), start, self.name, lambda row: next(self._between(row, row + 1)))

    def mark(self) -> str:
        """A digest of size and footer, which has counts, sizes and mostly the limits of each column chunk."""
        return hashlib.sha256(f"{size_of(self.path)} {self._file.metadata.to_dict()}".encode()).hexdigest()

    @cached_property
    def _source(self) -> BinaryIO:
        file = open_file(self.path)
        weakref.finalize(self, file.close)
        return file

    @cached_property
    def _file(self) -> Any:
        from pyarrow.parquet import ParquetFile

        with whole(self.name, _KIND):
            # Without a buffer, whole column chunks are read, which may be as large as the file.
            file = ParquetFile(self._source, pre_buffer=False, buffer_size=2**20)
        refuse_swelling(self.path, 8 * file.metadata.num_rows, size_of(self.path))
        return file

    @cached_property
    def _groups(self) -> NDArray[np.int64]:
        """First row of each row group, and the number of rows."""
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @cached_property
    def _units(self) -> NDArray[np.int64]:
        """First row of each unit, and the number of rows."""
        firsts: list[int] = []
        for group, (start, stop) in enumerate(pairwise(self._groups.tolist())):
            known = self._file.metadata.row_group(group)
            fitting = _UNIT_BYTES * (stop - start) // max(1, int(known.total_byte_size))
            firsts += range(start, stop, max(1, min(fitting, max(_UNIT_ROWS, -(-(stop - start) // _UNITS)))))
        return np.array([*firsts, self._groups[-1]], np.int64)

    def _batches(self, groups: Iterable[int] | None = None) -> Iterator[Any]:
        """The batches of some row groups, or of all."""
        for group in range(self._file.metadata.num_row_groups) if groups is None else groups:
            known = self._file.metadata.row_group(group)
            for number in range(known.num_columns):
                column, extra = known.column(number), known.column(number).num_values - known.num_rows
                size = max(int(column.total_uncompressed_size), extra * max(8, _longest_text(self._source, column)))
                refuse_swelling(self.path, size, int(column.total_compressed_size))
            yield from self._file.iter_batches(batch_size=batch_rows(self._source, known), row_groups=[group])

    def _between(self, start: int, stop: int) -> Iterator[Any]:
        """Batches of the rows from one to another of the same row group."""
        from pyarrow import ArrowInvalid

        group = int(np.searchsorted(self._groups, start, side="right")) - 1
        row = int(self._groups[group])
        with whole(self.name, _KIND):
            for batch in self._batches([group]):
                if row + len(batch) > start:
                    yield batch.slice(max(0, start - row), stop - max(start, row))
                row += len(batch)
                if row >= stop:
                    return
            raise ArrowInvalid("fewer rows than its footer says")


def batch_rows(file: BinaryIO, group: Any) -> int:
    """Rows of a row group, by what the footer says of it, that are decoded at a time: their texts fit the memory."""
    longest = sum(_longest_text(file, group.column(number)) for number in range(group.num_columns))
    return max(1, min(BATCH_ROWS, _BATCH_BYTES // max(1, longest)))


def _longest_text(file: BinaryIO, column: Any) -> int:
    """Bytes that every text of a column may have, although next to none are stored of it; 0 where all are stored."""
    if column.physical_type != "BYTE_ARRAY":
        return 0
    shared, stored = set(column.encodings) - _AS_LONG_AS_STORED, int(column.total_uncompressed_size)
    if not shared or stored <= _USUAL_DICTIONARY or not shared <= _OF_DICTIONARY:
        return stored if shared else 0
    # The page begins with its kind and its size, each a byte for the field and a number in the varints of Thrift.
    file.seek(column.dictionary_page_offset or column.data_page_offset)
    head = re.match(rb"\x15\x04\x15([\x80-\xff]*[\x00-\x7f])", file.read(16))
    return stored if head is None else sum((byte & 127) << 7 * place for place, byte in enumerate(head[1])) // 2
