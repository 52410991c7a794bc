"""What stands in files: records, one at a time, from the front to the end or by their place."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from bco_lightning.data.files import HUB, arrow_folder, expand, is_packed, size_of, suffix_of
from bco_lightning.data.records.csv_rows import CsvRows
from bco_lightning.data.records.json_document import JsonDocument
from bco_lightning.data.records.json_lines import JsonLines, PackedLines
from bco_lightning.data.records.parquet import ParquetRows
from bco_lightning.data.records.record_file import Place, Record, RecordFile, SeekableFile, changed
from bco_lightning.data.records.record_store import RecordStore
from bco_lightning.data.records.strict_json import MAX_LINE_BYTES, parse_line
from bco_lightning.data.records.tables import ArrowFile, ArrowFolder, HubRows
from bco_lightning.data.remote import HTTP, is_remote, protocol_of, require_ranges
from bco_lightning.errors import FeedbackRowError

__all__ = [
    "MAX_LINE_BYTES",
    "Place",
    "Record",
    "RecordFile",
    "RecordStore",
    "SeekableFile",
    "changed",
    "parse_line",
    "read_records",
    "record_file",
    "seekable_file",
    "seekable_files",
]

_LINES = (".jsonl", ".ndjson")


def record_file(path: str, label_column: str | None = None, numeric: Collection[str] = ()) -> RecordFile:
    """The file of a path, as :func:`~bco_lightning.data.files.expand` gives it, by its suffix.

    Args:
        path: A file, a folder of ``save_to_disk``, or a data set of the hub.
        label_column: Name of the column with the thumbs; a CSV's cells there are read as numbers and booleans.
            ``None`` leaves every cell of a CSV the text that it is.
        numeric: Names of further columns of a CSV, such as ratings, whose cells are read as numbers where they are
            finite decimal ones.
    """
    suffix = suffix_of(path)
    if path.startswith(HUB):
        return HubRows(path)
    if not is_remote(path) and arrow_folder(path) is not None:
        return ArrowFolder(path)
    if suffix in (".csv", ".tsv"):
        return CsvRows(path, label_column, numeric)
    if suffix in _LINES:
        return PackedLines(path) if is_packed(path) else JsonLines(path)
    if suffix == ".json":
        return JsonDocument(path)
    return ParquetRows(path) if suffix == ".parquet" else ArrowFile(path)


def read_records(
    source: str, label_column: str | None = None, numeric: Collection[str] = ()
) -> Iterator[tuple[str, Record | FeedbackRowError]]:
    """Reads all files of a source, lazily.

    Args:
        source: One or more files, a folder or a data set, as :func:`~bco_lightning.data.files.expand` takes them.
        label_column: As :func:`record_file` takes it.
        numeric: As :func:`record_file` takes it.

    Yields:
        The place (``file:line`` for lines of text, else ``file:row``, from 1) and the record, or what is wrong with
        it; reading can go on after a malformed row.

    Raises:
        FeedbackRowError: If there is no such source, or a file of it is of no known kind or malformed as a whole.
    """
    for path in expand(source):
        file = record_file(path, label_column, numeric)
        for place, record in file:
            yield f"{file.name}:{place.line}", record


def seekable_files(source: str) -> list[SeekableFile]:
    """The files of a source, whose records are found again by their place.

    Raises:
        FeedbackRowError: If there are none, or one of them is of another kind.
    """
    if source.startswith(HUB):
        name = source.removeprefix(HUB).partition("@")[0]
        raise FeedbackRowError(
            source,
            "expected files with data.streaming, found a data set of the hub.",
            f"Name its Parquet files, for instance hf://datasets/{name}/**/*.parquet.",
        )
    return [seekable_file(path) for path in expand(source)]


def seekable_file(path: str) -> SeekableFile:
    """The file of a path, if its records are found again by their place.

    Raises:
        FeedbackRowError: If they are not.
    """
    file = record_file(path)
    if isinstance(file, SeekableFile):
        if protocol_of(path) in HTTP:
            require_ranges(path, size_of(path))
        return file
    packed = is_packed(path)
    raise FeedbackRowError(
        file.name,
        "expected a file that can be read from the middle with data.streaming, found "
        f"{'a packed one' if packed else f'a {suffix_of(path)} file'}.",
        "Unpack it, or convert it to Parquet, which is packed inside."
        if packed
        else "Convert it to JSON lines or Parquet.",
    )
