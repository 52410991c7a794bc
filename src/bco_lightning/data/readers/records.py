"""Read feedback logs of every kind, local or remote, packed or not, one record at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from bco_lightning.data.readers.csv_reading import read_csv
from bco_lightning.data.readers.files import HUB, arrow_folder, expand, open_file, open_unpacked, suffix_of
from bco_lightning.data.readers.json_reading import read_json
from bco_lightning.data.readers.remote import is_remote, public_name
from bco_lightning.data.readers.strict_json import MAX_LINE_BYTES, Record, numbered_lines, parse_line, refuse_binary
from bco_lightning.data.readers.table_reading import read_arrow, read_arrow_folder, read_hub, read_parquet
from bco_lightning.errors import FeedbackRowError

__all__ = ["MAX_LINE_BYTES", "Record", "parse_line", "read_file", "read_records"]

_TABLES = {".parquet": read_parquet, ".arrow": read_arrow}


def read_records(
    source: str, label_column: str | None, numeric: Collection[str] = ()
) -> Iterator[tuple[str, Record | FeedbackRowError]]:
    """Reads one source, lazily.

    Args:
        source: One or more files, a folder or a data set, as
            :func:`~bco_lightning.data.readers.files.expand` takes them.
        label_column: Name of the column with the thumbs; a CSV's cells there are read as numbers and booleans.
            ``None`` leaves every cell of a CSV the text that it is.
        numeric: Names of further columns of a CSV, such as ratings, whose cells are read as numbers where they are
            finite decimal ones.

    Yields:
        The place (``file:line`` for lines of text, else ``file:row``, from 1) and the record, or what is wrong with
        it; reading can go on after a malformed row.

    Raises:
        FeedbackRowError: If there is no such source, or a file of it is of no known kind or malformed as a whole.
    """
    for path in expand(source):
        yield from read_file(path, label_column, numeric)


def read_file(
    path: str, label_column: str | None, numeric: Collection[str] = ()
) -> Iterator[tuple[str, Record | FeedbackRowError]]:
    """Reads one of the files of a source as :func:`read_records` does.

    Raises:
        FeedbackRowError: If the file is malformed as a whole.
    """
    if path.startswith(HUB):
        yield from read_hub(path)
    elif not is_remote(path) and arrow_folder(path) is not None:
        yield from read_arrow_folder(path)
    elif suffix_of(path) in _TABLES:
        with open_file(path) as file:
            yield from _TABLES[suffix_of(path)](file, public_name(path))
    else:
        yield from _read_text(path, label_column, numeric)


def _read_text(
    path: str, label_column: str | None, numeric: Collection[str]
) -> Iterator[tuple[str, Record | FeedbackRowError]]:
    name, suffix = public_name(path), suffix_of(path)
    with open_unpacked(path) as file:
        if suffix == ".json":
            yield from read_json(file, name)
            return
        if suffix in (".csv", ".tsv"):
            yield from read_csv(file, name, suffix, label_column, numeric)
            return
        for number, line in numbered_lines(file, name):
            place = f"{name}:{number}"
            if number == 1:
                refuse_binary(line, place)
            try:
                record: Record | FeedbackRowError | None = parse_line(line, place)
            except FeedbackRowError as error:
                record = error.without_cause()
            if record is not None:
                yield place, record
