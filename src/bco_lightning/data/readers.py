"""Read feedback logs: JSON lines, CSV, Parquet and data sets of the Hugging Face hub, one record at a time."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from bco_lightning.data.feedback_row import shown
from bco_lightning.errors import FeedbackRowError
from bco_lightning.packaged import resolve_packaged

Record = Mapping[str, Any]

# A million tokens of English are four of these MiB; a parsed line can take 24 times its bytes in memory.
MAX_LINE_BYTES = 4 * 2**20
# As many as the largest float has; longer ones take time that grows with the square of their length.
MAX_INTEGER_DIGITS = 309
_HUB = "hub:"
_BINARY = {b"\x1f\x8b": "a gzip file", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PAR1": "a Parquet file"}
# CSV has no types; these cells are what spreadsheets and pandas write for numbers and booleans.
_CSV_CELLS = {"1": 1, "0": 0, "-1": -1, "True": True, "False": False, "TRUE": True, "FALSE": False}


def read_records(source: str, label_column: str | None) -> Iterator[tuple[str, Record | FeedbackRowError]]:
    """Reads one source, lazily.

    Args:
        source: A ``.jsonl``, ``.csv`` or ``.parquet`` file, ``package:NAME/path``, or ``hub:OWNER/NAME@SPLIT``
            (split ``train`` if left out).
        label_column: Name of the column with the thumbs; a CSV's cells there are read as numbers and booleans.
            ``None`` leaves every cell of a CSV the text that it is.

    Yields:
        The place (``file:line``; for Parquet and hub data sets ``source:row``, from 1) and the record, or what is
        wrong with it; reading can go on after a malformed row.

    Raises:
        FeedbackRowError: If the source does not exist, has an unknown suffix, or is malformed as a whole.
    """
    if source.startswith(_HUB):
        yield from _read_hub(source)
        return
    path = Path(resolve_packaged(source)).expanduser()
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise FeedbackRowError(
            source,
            f"expected a file ending in {', '.join(readers)}, or hub:OWNER/NAME; found {path.suffix or 'neither'!r}.",
        )
    if not path.is_file():
        raise FeedbackRowError(source, "expected a feedback log, found no such file.")
    for place, record in readers[path.suffix](path):
        if path.suffix == ".csv" and label_column is not None and isinstance(record, dict) and label_column in record:
            record = {**record, label_column: _CSV_CELLS.get(record[label_column], record[label_column])}
        yield place, record


def parse_line(line: bytes, place: str) -> Record | None:
    """Reads one line of a JSON Lines file, trusting nothing about it.

    Args:
        line: Its bytes, with or without the line break.
        place: File and line, for messages.

    Returns:
        The record; ``None`` for a line of white space.

    Raises:
        FeedbackRowError: If it is anything but one JSON object in UTF-8.

    Example:
        >>> parse_line(b'{"label": true}', "log.jsonl:1")
        {'label': True}
        >>> parse_line(b'{"label": true, "label": false}', "log.jsonl:2")
        Traceback (most recent call last):
        ...
        bco_lightning.errors.FeedbackRowError: log.jsonl:2: expected each key once, found "label" twice in one object.
    """
    if len(line) > MAX_LINE_BYTES:
        raise _too_long(place)
    text = _decode(line, place)
    if not text.strip():
        return None
    try:
        record = json.loads(text, **_STRICT_JSON)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise FeedbackRowError(
            place,
            f"expected one JSON object per line, found malformed JSON ({error.msg}, column {error.colno}).",
            "" if line.endswith(b"\n") else "The file ends within this line; it may have been cut off.",
        ) from error
    except UnicodeEncodeError as error:
        raise FeedbackRowError(place, "expected Unicode text, found half of a surrogate pair.") from error
    except RecursionError as error:
        raise FeedbackRowError(place, "expected plain JSON values, found brackets nested too deeply.") from error
    except ValueError as error:
        raise FeedbackRowError(place, f"expected {error}.") from error
    if not isinstance(record, dict):
        raise FeedbackRowError(place, f"expected a JSON object, found a {type(record).__name__}.")
    return record


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record | FeedbackRowError]]:
    with path.open("rb") as file:
        for number, line in enumerate(_bounded_lines(file), 1):
            place = f"{path}:{number}"
            try:
                record: Record | FeedbackRowError | None = parse_line(line, place)
            except FeedbackRowError as error:
                record = error.without_cause()
            if record is not None:
                yield place, record


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, of one that is over the limit no more than a byte over it."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)


def _read_csv(path: Path) -> Iterator[tuple[str, Record | FeedbackRowError]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open("rb") as file:
        lines = _CsvLines(path, file)
        reader = csv.DictReader(lines, strict=True)
        try:
            _require_utf8(list(reader.fieldnames or []), f"{path}:1")
            for record in reader:
                lines.bytes_of_row = 0
                place = f"{path}:{reader.line_num}"
                try:
                    _require_all_cells(record, len(reader.fieldnames or []), place)
                except FeedbackRowError as error:
                    yield place, error.without_cause()
                else:
                    yield place, record
        except csv.Error as error:
            raise FeedbackRowError(f"{path}:{reader.line_num}", f"expected CSV, found {error}.") from error


class _CsvLines:
    """Lines for the CSV reader, which could not go on after an error of its source.

    Bytes that are no UTF-8 therefore come as lone surrogates, and a row of many lines is bounded here.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._lines, self._number = path, _bounded_lines(file), 0
        self.bytes_of_row = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        self.bytes_of_row += len(line)
        place = f"{self._path}:{self._number}"
        if self.bytes_of_row > MAX_LINE_BYTES:
            raise _too_long(place)
        if self._number == 1:
            _refuse_other_encodings(line, place)
        return line.decode("utf-8", errors="surrogateescape")


def _require_all_cells(record: dict[str | None, Any], expected: int, place: str) -> None:
    if None in record or None in record.values():
        raise FeedbackRowError(place, f"expected {expected} cells as in the header, found another number.")
    _require_utf8(list(record.values()), place)


def _require_utf8(cells: list[str], place: str) -> None:
    for cell in cells:
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            raise _not_utf8(place, f"byte 0x{ord(cell[error.start]) & 0xFF:02x}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(path).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except (ArrowException, UnicodeDecodeError) as error:
        raise FeedbackRowError(str(path), f"expected a Parquet file, found {error}.") from error


def _read_hub(source: str) -> Iterator[tuple[str, Record]]:
    from datasets import load_dataset

    name, _, split = source.removeprefix(_HUB).partition("@")
    try:
        dataset = load_dataset(resolve_packaged(name), split=split or "train")
    except (OSError, ValueError) as error:
        raise FeedbackRowError(
            source, f"expected a data set, but it could not be loaded ({str(error).strip().splitlines()[0]})."
        ) from error
    for number, record in enumerate(dataset, 1):
        yield f"{source}:{number}", record


def _decode(line: bytes, place: str) -> str:
    _refuse_other_encodings(line, place)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(place, f"byte 0x{line[error.start]:02x} at column {error.start + 1}") from error


def _refuse_other_encodings(line: bytes, place: str) -> None:
    for magic, name in _BINARY.items():
        if line.startswith(magic):
            raise FeedbackRowError(place, f"expected UTF-8 text, found {name}.", "Unpack or convert the file.")
    if line.startswith(b"\xef\xbb\xbf"):
        raise FeedbackRowError(
            place, "expected UTF-8 without a byte order mark, found one.", "Save the file without it."
        )
    if b"\x00" in line:
        raise FeedbackRowError(place, "expected text, found a NUL byte.", "Convert the file to UTF-8.")


def _not_utf8(place: str, found: str) -> FeedbackRowError:
    return FeedbackRowError(place, f"expected UTF-8, found {found}.", "Convert the file.")


def _too_long(place: str) -> FeedbackRowError:
    return FeedbackRowError(place, f"expected a row of at most {MAX_LINE_BYTES / 2**20:g} MiB, found a longer one.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"each key once, found {shown(twice)} twice in one object")
    return record


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"numbers of at most {MAX_INTEGER_DIGITS} digits, found one of {len(digits)}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("finite numbers, found one beyond 1.8e308")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"plain JSON values, found the constant {name}, which is no JSON")


_STRICT_JSON: dict[str, Any] = {
    "parse_constant": _refuse_constant,
    "parse_int": _integer,
    "parse_float": _finite,
    "object_pairs_hook": _object,
}
