"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from bco_lightning.data.files import open_unpacked, suffixes_of
from bco_lightning.data.records.record_file import Place, Read, RecordFile
from bco_lightning.data.records.strict_json import (
    MAX_INTEGER_DIGITS,
    MAX_LINE_BYTES,
    NUL,
    TOO_LONG,
    not_utf8,
    numbered_lines,
    refuse_other_encodings,
)
from bco_lightning.data.values import Record
from bco_lightning.errors import FeedbackRowError

# What a cell means, by the name of its column.
Cells = Mapping[str, Callable[[str], Any]]
# CSV has no types; these cells are what spreadsheets and pandas write for numbers and booleans.
_THUMBS = {"1": 1, "0": 0, "-1": -1, "True": True, "False": False, "TRUE": True, "FALSE": False}
_THUMBS |= {"1.0": 1, "0.0": 0, "-1.0": -1}  # of integers beside gaps
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SURROGATE, _NUL = re.compile("[\ud800-\udfff]"), "\udc00"


def csv_rows(file: RecordFile, cells: Cells) -> Read:
    """The rows of a ``.csv`` file, or of a ``.tsv`` file, which is delimited by tabs; a place is a row's last line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    bytes_of_row = 0

    def lines(opened: BinaryIO) -> Iterator[str]:
        # The CSV reader cannot go on after an error, so bytes that are no text come as surrogates.
        nonlocal bytes_of_row
        for number, line, _ in numbered_lines(opened, file.name):
            bytes_of_row += len(line)
            if bytes_of_row > MAX_LINE_BYTES:
                raise FeedbackRowError(f"{file.name}:{number}", TOO_LONG)
            if number == 1:
                refuse_other_encodings(line, f"{file.name}:1")
            yield line.decode("utf-8", "surrogateescape").replace("\x00", _NUL)

    with open_unpacked(file.path) as opened:
        delimiter = "\t" if suffixes_of(file.path)[0] == ".tsv" else ","
        rows = csv.reader(lines(opened), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            _check_header(header, f"{file.name}:{rows.line_num or 1}")
            for number, row in enumerate(rows):
                bytes_of_row = 0
                if row:
                    yield Place(number, rows.line_num), _record(header, row, cells, f"{file.name}:{rows.line_num}")
        except csv.Error as error:
            raise FeedbackRowError(f"{file.name}:{rows.line_num}", f"expected CSV, found {error}.") from error


def thumb_in(cell: str) -> int | str:
    """The thumb that a cell holds, if it looks like one of spreadsheets, else the cell."""
    return _THUMBS.get(cell, cell)


def number_in(cell: str) -> float | str:
    """The finite decimal number that a cell holds, or the cell."""
    digits = cell.strip()
    if len(digits) > MAX_INTEGER_DIGITS or not _NUMBER.fullmatch(digits):
        return cell
    if digits.lstrip("+-").isdigit():
        return int(digits)
    return number if math.isfinite(number := float(digits)) else cell


def _record(header: list[str], row: list[str], cells: Cells, place: str) -> Record | FeedbackRowError:
    if (problem := _problem_of(row, place)) is not None:
        return problem
    if len(row) != len(header):
        return FeedbackRowError(place, f"expected {len(header)} cells as in the header, found {len(row)}.")
    record: Record = dict(zip(header, row, strict=True))
    return record | {name: read(record[name]) for name, read in cells.items() if name in record}


def _check_header(header: list[str], place: str) -> None:
    if (problem := _problem_of(header, place)) is not None:
        raise problem
    if not any(name.strip() for name in header):
        found = "expected a header with the names of the columns, found an empty line or file."
        raise FeedbackRowError(place, found)
    times = Counter(header)
    if twice := [str(number) for number, name in enumerate(header, 1) if times[name] > 1]:
        found = f"expected each column name once, found the same one in columns {', '.join(twice[:10])}."
        raise FeedbackRowError(place, found, "Rename or remove one.")


def _problem_of(cells: list[str], place: str) -> FeedbackRowError | None:
    odd = _SURROGATE.search("".join(cells))
    if odd is None:
        return None
    return FeedbackRowError(place, *NUL) if odd[0] == _NUL else not_utf8(place, f"byte 0x{ord(odd[0]) & 0xFF:02x}")
