"""Rows of Parquet and Arrow files, of folders that ``save_to_disk`` wrote, and of data sets of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bco_lightning.data.readers.files import HUB, arrow_folder, open_file
from bco_lightning.data.readers.strict_json import MAX_LINE_BYTES, Record, not_utf8, too_long
from bco_lightning.errors import FeedbackRowError
from bco_lightning.places import resolve_packaged

Rows = Iterator[tuple[str, "Record | FeedbackRowError"]]

_BATCH_ROWS = 256
# What a batch may take in memory at most, where the encoding lets a value of a few bytes stand for a long text.
_BATCH_BYTES = 32 * 2**20
_AS_LONG_AS_STORED = {"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"}
_OF_DICTIONARY = {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}
_USUAL_DICTIONARY = 2**20  # what writers limit it to
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_FILE_MAGIC = b"ARROW1"


def read_parquet(file: BinaryIO, name: str) -> Rows:
    """The rows of a Parquet file with the place of each, ``name:row``.

    Raises:
        FeedbackRowError: If it is none, or is damaged; its place then is the row reached.
    """
    from pyarrow.parquet import ParquetFile

    # Without a buffer, whole column chunks are read, which may be as large as the file.
    def batches() -> Iterator[Any]:
        table = ParquetFile(file, buffer_size=2**20)
        for number in range(table.num_row_groups):
            rows = batch_rows(file, table.metadata.row_group(number))
            yield from table.iter_batches(batch_size=rows, row_groups=[number])

    return _rows(batches(), name, "a Parquet file")


def batch_rows(file: BinaryIO, group: Any) -> int:
    """Rows of a row group that are decoded at a time, so few that their texts cannot fill the memory.

    Args:
        file: The Parquet file; where it stands does not matter, and changes.
        group: What the footer says of the row group, a ``pyarrow.parquet.RowGroupMetaData``.
    """
    columns = [group.column(number) for number in range(group.num_columns)]
    longest = sum(_longest_text(file, column) for column in columns if column.physical_type == "BYTE_ARRAY")
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, longest)))


def _longest_text(file: BinaryIO, column: Any) -> int:
    """Bytes that every text of a column may have, although next to none are stored of it; 0 where all are stored."""
    shared, stored = set(column.encodings) - _AS_LONG_AS_STORED, int(column.total_uncompressed_size)
    if not shared or stored <= _USUAL_DICTIONARY or not shared <= _OF_DICTIONARY:
        return stored if shared else 0
    # The page begins with its kind and its size, each a byte for the field and a number in the varints of Thrift.
    file.seek(column.dictionary_page_offset or column.data_page_offset)
    head = re.match(rb"\x15\x04\x15([\x80-\xff]*[\x00-\x7f])", file.read(16))
    return stored if head is None else sum((byte & 127) << 7 * place for place, byte in enumerate(head[1])) // 2


def read_arrow(file: BinaryIO, name: str) -> Rows:
    """The rows of an Arrow file, of the streaming or the random access format, with the place of each, ``name:row``.

    Raises:
        FeedbackRowError: If it is none, or is truncated or damaged; its place then is the row reached.
    """
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            reader = pa.ipc.open_file(file)
            yield from (_whole(reader.get_batch(number)) for number in range(reader.num_record_batches))
            return
        yield from _stream(file)

    return _rows(batches(), name, "an Arrow file")


def read_arrow_folder(path: str) -> Rows:
    """The rows of ``folder@SPLIT`` that ``save_to_disk`` has written, with the place of each, ``path:row``.

    Raises:
        FeedbackRowError: If there is no such split, or a file is missing or damaged.
    """
    return _rows(_batches_of(saved_dataset(path)), path, "a data set")


def saved_dataset(path: str) -> Any:
    """The data set in ``folder@SPLIT`` that ``save_to_disk`` has written; it is mapped, not read.

    Raises:
        FeedbackRowError: If there is no such split, or a file is missing, cut off or no such description.
    """
    from datasets import load_from_disk

    folder, split = arrow_folder(path) or (Path(path), "")
    splits = sorted(inner.parent.name for inner in folder.glob("*/state.json"))
    if split not in (splits or [""]):
        found = f"those of {', '.join(splits)}" if splits else "one without splits"
        raise FeedbackRowError(
            path, f"expected one data set, found {found}.", f"Name it as {folder}@SPLIT if it has any."
        )
    try:
        for shard in (folder / split).glob("*.arrow"):
            with open_file(str(shard)) as file:
                _check_end(file)
        return load_from_disk(str(folder / split))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_loaded(path, error) from None


def read_hub(source: str) -> Rows:
    """The rows of ``hub:OWNER/NAME@SPLIT`` with the place of each, ``source:row``; the split is ``train`` if left out.

    Raises:
        FeedbackRowError: If it cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, split = source.removeprefix(HUB).partition("@")
    try:
        dataset = load_dataset(resolve_packaged(name), split=split or "train")
    except (OSError, ValueError, DatasetsError) as error:
        raise _not_loaded(source, error) from error
    return _rows(_batches_of(dataset), source, "a data set")


def _stream(file: BinaryIO) -> Iterator[Any]:
    import pyarrow as pa

    size = _check_end(file)
    file.seek(0)
    yield from map(_whole, pa.ipc.open_stream(file))
    if file.tell() < size:
        raise pa.ArrowInvalid("more behind the end of the stream")


def _check_end(file: BinaryIO) -> int:
    """Bytes of a stream. It may end anywhere between two batches; that this is no loss, only its last bytes tell."""
    from pyarrow import ArrowInvalid

    size = file.seek(0, 2)
    if not size:
        raise ArrowInvalid("an empty one")
    file.seek(-min(len(_END_OF_STREAM), size), 2)
    if file.read() != _END_OF_STREAM:
        raise ArrowInvalid("no end of the stream; it may have been cut off")
    return size


def _batches_of(dataset: Any) -> Iterator[Any]:
    # As Arrow, not decoded: images and sounds stay what they are, and need no package to open them.
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        yield from map(_whole, table.to_batches())


def _whole(batch: Any) -> Any:
    # Arrow takes the offsets of a file as they are; damaged ones would end the process.
    batch.validate(full=True)
    return batch


def _rows(batches: Iterable[Any], name: str, kind: str) -> Rows:
    """The rows of Arrow batches as Python values, a few hundred in memory at a time."""
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in batches:
            _check_columns(batch.schema.names, name)
            for start in range(0, len(batch), _BATCH_ROWS):
                for record in records_of(batch.slice(start, _BATCH_ROWS), name, number):
                    number += 1
                    yield f"{name}:{number}", record
    except FeedbackRowError:
        raise
    except (ArrowException, OSError, ValueError, MemoryError) as error:  # the last one where a length is damaged
        place = f"{name}:{number + 1}" if number else name
        raise FeedbackRowError(place, f"expected {kind}, found {in_one_line(error)}.") from error


def records_of(batch: Any, name: str, before: int) -> Iterable[Record | FeedbackRowError]:
    """The rows of an Arrow batch, of which ``before`` others of the file ``name`` come first."""
    if batch.nbytes <= MAX_LINE_BYTES:
        try:
            records: list[Record] = batch.to_pylist()
        except (ValueError, OverflowError, ArithmeticError):
            pass  # as for single rows below
        else:
            return records
    return [record_of(batch.slice(at, 1), f"{name}:{before + at + 1}") for at in range(len(batch))]


def record_of(batch: Any, place: str) -> Record | FeedbackRowError:
    """The row of an Arrow batch of one row; it is measured before it becomes Python values."""
    if batch.nbytes > MAX_LINE_BYTES:
        return too_long(place)
    try:
        [record] = batch.to_pylist()
    except UnicodeDecodeError as error:
        return not_utf8(place, f"byte 0x{error.object[error.start]:02x}")
    except (ValueError, OverflowError, ArithmeticError) as error:
        return FeedbackRowError(
            place, f"expected values that Python can hold, found one that it cannot ({type(error).__name__})."
        )
    return record  # type: ignore[no-any-return]


def _check_columns(names: list[str], name: str) -> None:
    if len(set(names)) < len(names):
        raise FeedbackRowError(name, "expected each column name once, found one twice.", "Rename or remove one.")


def _not_loaded(source: str, error: Exception) -> FeedbackRowError:
    return FeedbackRowError(source, f"expected a data set, but it could not be loaded ({in_one_line(error)}).")


def in_one_line(error: Exception) -> str:
    """What a library says of a file; what the operating system says comes without the path, which may be a long one."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    return "".join(character if character.isprintable() else "?" for character in line)
