"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from bco_lightning.data.files import open_unpacked, suffix_of
from bco_lightning.data.records.record_file import Place, Read, RecordFile
from bco_lightning.data.records.strict_json import (
    MAX_INTEGER_DIGITS,
    MAX_LINE_BYTES,
    no_nul,
    not_utf8,
    numbered_lines,
    refuse_other_encodings,
    too_long,
)
from bco_lightning.errors import FeedbackRowError

# CSV has no types; these cells are what spreadsheets and pandas write for numbers and booleans.
_THUMBS = {"1": 1, "0": 0, "-1": -1, "True": True, "False": False, "TRUE": True, "FALSE": False}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SURROGATE, _NUL = re.compile("[\ud800-\udfff]"), "\udc00"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class CsvRows(RecordFile):
    """A ``.csv`` file, or a ``.tsv`` file, which is delimited by tabs.

    Args:
        path: The file.
        label_column: Column whose cells are read as thumbs where they look like it.
        numeric: Columns whose cells are read as numbers where they look like it.
    """

    def __init__(self, path: str, label_column: str | None = None, numeric: Collection[str] = ()) -> None:
        super().__init__(path)
        self._label_column, self._numeric, self._bytes_of_row = label_column, numeric, 0

    def __iter__(self) -> Read:
        """Reads it through; the place of a row is its last line."""
        csv.field_size_limit(MAX_LINE_BYTES)
        with open_unpacked(self.path) as file:
            rows = csv.reader(self._texts(file), delimiter=_DELIMITERS[suffix_of(self.path)], strict=True)
            self._bytes_of_row = 0
            try:
                header = next(rows, [])
                self._check_header(header, f"{self.name}:{rows.line_num or 1}")
                for number, cells in enumerate(rows):
                    self._bytes_of_row, place = 0, f"{self.name}:{rows.line_num}"
                    problem = _problem_of(cells, place)
                    if problem is None and len(cells) != len(header):
                        expected = f"expected {len(header)} cells as in the header, found {len(cells)}."
                        problem = FeedbackRowError(place, expected)
                    if cells:
                        record = problem or self._typed(dict(zip(header, cells, strict=True)))
                        yield Place(number, rows.line_num), record
            except csv.Error as error:
                raise FeedbackRowError(f"{self.name}:{rows.line_num}", f"expected CSV, found {error}.") from error

    def _texts(self, file: BinaryIO) -> Iterator[str]:
        """The lines. The CSV reader cannot go on after an error, so bytes that are no text come as surrogates."""
        for number, line, _ in numbered_lines(file, self.name):
            self._bytes_of_row += len(line)
            if self._bytes_of_row > MAX_LINE_BYTES:
                raise too_long(f"{self.name}:{number}")
            if number == 1:
                refuse_other_encodings(line, f"{self.name}:1")
            yield line.decode("utf-8", "surrogateescape").replace("\x00", _NUL)

    def _check_header(self, header: list[str], place: str) -> None:
        if (problem := _problem_of(header, place)) is not None:
            raise problem
        if not any(name.strip() for name in header):
            found = "expected a header with the names of the columns, found an empty line or file."
            raise FeedbackRowError(place, found)
        times = Counter(header)
        if twice := [number for number, name in enumerate(header, 1) if times[name] > 1]:
            found = f"found the same one in columns {', '.join(map(str, twice[:10]))}."
            raise FeedbackRowError(place, f"expected each column name once, {found}", "Rename or remove one.")

    def _typed(self, record: dict[str, Any]) -> dict[str, Any]:
        if self._label_column in record:
            record[self._label_column] = _THUMBS.get(record[self._label_column], record[self._label_column])
        for column in self._numeric:
            if isinstance(cell := record.get(column), str):
                record[column] = _number_of(cell)
        return record


def _problem_of(cells: list[str], place: str) -> FeedbackRowError | None:
    odd = _SURROGATE.search("".join(cells))
    if odd is None:
        return None
    return no_nul(place) if odd[0] == _NUL else not_utf8(place, f"byte 0x{ord(odd[0]) & 0xFF:02x}")


def _number_of(cell: str) -> int | float | str:
    """The number that a cell holds, or the cell."""
    digits = cell.strip()
    if len(digits) > MAX_INTEGER_DIGITS or not _NUMBER.fullmatch(digits):
        return cell
    if digits.lstrip("+-").isdigit():
        return int(digits)
    return number if math.isfinite(number := float(digits)) else cell
