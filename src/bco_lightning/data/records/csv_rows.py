"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Collection
from typing import Any, BinaryIO

from bco_lightning.data.files import open_unpacked, suffix_of
from bco_lightning.data.records.record_file import Place, Read, RecordFile
from bco_lightning.data.records.strict_json import (
    MAX_INTEGER_DIGITS,
    MAX_LINE_BYTES,
    not_utf8,
    numbered_lines,
    refuse_other_encodings,
    too_long,
)
from bco_lightning.errors import FeedbackRowError

# CSV has no types; these cells are what spreadsheets and pandas write for numbers and booleans.
_THUMBS = {"1": 1, "0": 0, "-1": -1, "True": True, "False": False, "TRUE": True, "FALSE": False}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
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
        self._label_column, self._numeric = label_column, numeric

    def __iter__(self) -> Read:
        """Reads it through; the place of a row is its last line."""
        csv.field_size_limit(MAX_LINE_BYTES)
        with open_unpacked(self.path) as file:
            lines = _CsvLines(file, self.name)
            rows = csv.reader(lines, delimiter=_DELIMITERS[suffix_of(self.path)], strict=True)
            try:
                header = next(rows, [])
                if lines.problem is not None:
                    raise lines.problem
                _check_header(header, f"{self.name}:{rows.line_num or 1}")
                for number, cells in enumerate(rows):
                    place, problem = Place(number, rows.line_num), lines.take_problem()
                    if problem is None and len(cells) != len(header):
                        expected = f"expected {len(header)} cells as in the header, found {len(cells)}."
                        problem = FeedbackRowError(f"{self.name}:{rows.line_num}", expected)
                    if problem is None:
                        yield place, self._typed(dict(zip(header, cells, strict=True)))
                    elif cells:
                        yield place, problem
            except csv.Error as error:
                raise FeedbackRowError(f"{self.name}:{rows.line_num}", f"expected CSV, found {error}.") from error

    def _typed(self, record: dict[str, Any]) -> dict[str, Any]:
        if self._label_column in record:
            record[self._label_column] = _THUMBS.get(record[self._label_column], record[self._label_column])
        for column in self._numeric:
            if isinstance(cell := record.get(column), str):
                record[column] = _number_of(cell)
        return record


class _CsvLines:
    """Lines for the CSV reader, which could not go on after an error of its source.

    What is wrong with the bytes of a row is therefore kept until the row is there.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._lines, self._name, self._bytes_of_row = numbered_lines(file, name), name, 0
        self.problem: FeedbackRowError | None = None

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        number, line, _ = next(self._lines)
        place = f"{self._name}:{number}"
        self._bytes_of_row += len(line)
        if self._bytes_of_row > MAX_LINE_BYTES:
            raise too_long(place)
        if number == 1:
            refuse_other_encodings(line, place)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.problem = not_utf8(place, f"byte 0x{line[error.start]:02x}")
            text = line.decode("utf-8", errors="replace")
        if "\x00" in text:
            self.problem = FeedbackRowError(place, "expected text, found a NUL byte.", "Convert the file to UTF-8.")
            text = text.replace("\x00", "�")  # which the reader of Python 3.10 would stop at
        return text

    def take_problem(self) -> FeedbackRowError | None:
        """What is wrong with the row that has just been read; the next one begins."""
        problem, self.problem, self._bytes_of_row = self.problem, None, 0
        return problem


def _check_header(header: list[str], place: str) -> None:
    if not any(name.strip() for name in header):
        raise FeedbackRowError(place, "expected a header with the names of the columns, found an empty line or file.")
    times = Counter(header)
    if twice := [number for number, name in enumerate(header, 1) if times[name] > 1]:
        numbers = ", ".join(map(str, twice[:10]))
        raise FeedbackRowError(
            place, f"expected each column name once, found the same one in columns {numbers}.", "Rename or remove one."
        )


def _number_of(cell: str) -> int | float | str:
    """The number that a cell holds, or the cell."""
    digits = cell.strip()
    if len(digits) > MAX_INTEGER_DIGITS or not _NUMBER.fullmatch(digits):
        return cell
    if digits.lstrip("+-").isdigit():
        return int(digits)
    return number if math.isfinite(number := float(digits)) else cell
