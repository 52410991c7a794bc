"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, BinaryIO

from bco_lightning.data.files import open_unpacked, suffixes_of
from bco_lightning.data.records.record_file import Place, Read, RecordFile
from bco_lightning.data.records.strict_json import (
    HALF_PAIR,
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
_NUL = "\udc00"
_BOM, _QUOTED = b"\xef\xbb\xbf", re.compile(r'"(?:[^"]|"")*(?:"|$)')
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_IN_EXCEL = 'Save it as UTF-8; in Excel, as "CSV UTF-8".'


def csv_rows(file: RecordFile, cells: Cells) -> Read:
    """The rows of a ``.csv`` or ``.tsv`` file, delimited as its header is; a place is a row's last line."""
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
                line = line.removeprefix(_BOM)  # which Excel writes
                refuse_other_encodings(line, f"{file.name}:1", _IN_EXCEL)
            yield line.decode("utf-8", "surrogateescape").replace("\x00", _NUL)

    with open_unpacked(file.path) as opened:
        first = next(given := lines(opened), "")
        rows = csv.reader(chain([first], given), delimiter=_delimiter_of(first, file), strict=True)
        try:
            header = next(rows, [])
            _check_header(header, f"{file.name}:{rows.line_num or 1}")
            for number, row in enumerate(rows):
                bytes_of_row = 0
                if row:
                    yield Place(number, rows.line_num), _record(header, row, cells, f"{file.name}:{rows.line_num}")
        except csv.Error as error:
            raise FeedbackRowError(f"{file.name}:{rows.line_num}", f"expected CSV, found {error}.") from error


def _delimiter_of(header: str, file: RecordFile) -> str:
    """What stands between the names of the columns: the one of the three that is there, outside quotation marks."""
    found, place = [each for each in _DELIMITERS if each in _QUOTED.sub("", header)], f"{file.name}:1"
    if "\t" in found and suffixes_of(file.path)[0] == ".tsv":
        return "\t"
    if header.lower().startswith("sep="):  # a word to Excel
        raise FeedbackRowError(place, "expected the names of the columns, found a delimiter.", "Remove this line.")
    if len(found) > 1:
        words = " and ".join(_DELIMITERS[delimiter] for delimiter in found)
        expected = "expected one kind of delimiter in the header"
        raise FeedbackRowError(place, f"{expected}, found {words}.", "Put names that hold one in quotation marks.")
    return found[0] if found else ","


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
    odd = HALF_PAIR.search("".join(cells))
    if odd is None:
        return None
    if odd[0] == _NUL:
        return FeedbackRowError(place, *NUL)
    byte = bytes([ord(odd[0]) & 0xFF])
    windows = byte.decode("cp1252", "ignore")
    found = f"byte 0x{byte.hex()}{f', as Windows-1252 writes {windows!r}' if windows else ''}"
    return not_utf8(place, found, _IN_EXCEL)
