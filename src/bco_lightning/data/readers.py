"""Read feedback logs: JSON lines, CSV, Parquet and data sets of the Hugging Face hub, one record at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from bco_lightning.errors import FeedbackRowError
from bco_lightning.packaged import resolve_packaged

Record = Mapping[str, Any]
_HUB = "hub:"
# CSV has no types; these cells are what spreadsheets and pandas write for numbers and booleans.
_CSV_CELLS = {"1": 1, "0": 0, "-1": -1, "True": True, "False": False, "TRUE": True, "FALSE": False}


def read_records(source: str, label_column: str) -> Iterator[tuple[str, Record]]:
    """Reads one source, lazily.

    Args:
        source: A ``.jsonl``, ``.csv`` or ``.parquet`` file, ``package:NAME/path``, or ``hub:OWNER/NAME@SPLIT``
            (split ``train`` if left out).
        label_column: Name of the column with the thumbs; a CSV's cells there are read as numbers and booleans.

    Yields:
        The place (``file:line``; for Parquet and hub data sets ``source:row``, from 1) and the record.

    Raises:
        FeedbackRowError: If the source does not exist, has an unknown suffix, or holds a malformed line.
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
        if path.suffix == ".csv" and label_column in record:
            record = {**record, label_column: _CSV_CELLS.get(record[label_column], record[label_column])}
        yield place, record


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            text = _decode(line, place)
            if not text.strip():
                continue
            try:
                record = json.loads(text, parse_constant=_refuse_constant)
            except json.JSONDecodeError as error:
                raise FeedbackRowError(
                    place,
                    f"expected one JSON object per line, found malformed JSON ({error.msg}, column {error.colno}).",
                ) from error
            except (RecursionError, ValueError) as error:
                raise FeedbackRowError(place, f"expected plain JSON values, found {error}.") from error
            if not isinstance(record, dict):
                raise FeedbackRowError(place, f"expected a JSON object, found a {type(record).__name__}.")
            yield place, record


def _read_csv(path: Path) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(2**31 - 1)
    with path.open("rb") as file:
        lines = (_decode(line, f"{path}:{number}") for number, line in enumerate(file, 1))
        reader = csv.DictReader(lines, strict=True)
        try:
            for record in reader:
                place = f"{path}:{reader.line_num}"
                if None in record or None in record.values():
                    raise FeedbackRowError(
                        place, f"expected {len(reader.fieldnames or [])} cells as in the header, found another number."
                    )
                yield place, record
        except csv.Error as error:
            raise FeedbackRowError(f"{path}:{reader.line_num}", f"expected CSV, found {error}.") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except ArrowException as error:
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
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FeedbackRowError(
            place,
            f"expected UTF-8, found byte 0x{line[error.start]:02x} at column {error.start + 1}.",
            "Convert the file.",
        ) from error
    if text.startswith("\ufeff"):
        raise FeedbackRowError(
            place, "expected UTF-8 without a byte order mark, found one.", "Save the file without it."
        )
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"the constant {name}, which is no JSON")
