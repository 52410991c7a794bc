"""Rows of Arrow files, of folders that ``save_to_disk`` wrote, and of data sets of the hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from huggingface_hub import hf_hub_download
from numpy.typing import NDArray

from bco_lightning.data.files import HUB, arrow_folder, files_of, open_file, size_of
from bco_lightning.data.records.record_file import Block, Place, Read, RecordFile, SeekableFile
from bco_lightning.data.records.strict_json import MAX_LINE_BYTES, TOO_LONG, not_utf8, parse_value
from bco_lightning.data.records.swelling import check_arrow, size_of_rows
from bco_lightning.data.remote import place_in
from bco_lightning.data.values import Record, unpacked, value_at
from bco_lightning.errors import FeedbackRowError
from bco_lightning.places import resolve_packaged

BATCH_ROWS = 256
_UNIT_BYTES = 2**18
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_FILE_MAGIC = b"ARROW1"


def arrow_rows(file: RecordFile) -> Read:
    """The rows of an ``.arrow`` file, of the streaming or the random access format."""
    with open_file(file.path) as opened:
        yield from rows_of(_batches_in(file.path, opened), file.name, "an Arrow file")


def hub_rows(file: RecordFile) -> Read:
    """The rows of a data set of the hub, ``hub:OWNER/NAME@SPLIT``; the split is ``train`` if left out."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, split = file.path.removeprefix(HUB).partition("@")
    place = resolve_packaged(name)
    _refuse_files_elsewhere(file.path, place)
    own = os.umask(0o077)  # what is fetched and converted stays in the library's cache
    try:
        dataset = load_dataset(place, split=split or "train")
        for kept in dataset.cache_files:
            with suppress(OSError):
                Path(kept["filename"]).chmod(0o600)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _not_loaded(file.path, error) from error
    finally:
        os.umask(own)
    yield from _rows_in(dataset, file.name)


def _refuse_files_elsewhere(source: str, place: str) -> None:
    """Refuses a data set whose card names files of others: the library fetches them, even where it is offline."""
    for name in ("README.md", ".huggingface.yaml"):
        card = Path(place, name)
        if not Path(place).is_dir():
            with suppress(OSError, ValueError):  # it has none, or none is known here
                card = Path(hf_hub_download(place, name, repo_type="dataset"))
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        header = text if name.endswith("yaml") else text.lstrip().removeprefix("---").partition("\n---")[0]
        with suppress(yaml.YAMLError):  # the library's to tell
            root, seen = yaml.compose(header, Loader=yaml.SafeLoader), set[int]()
            pairs = root.value if isinstance(root, yaml.MappingNode) else []
            configs = [value for key, value in pairs if key.value == "configs"]
            while configs:
                node = configs.pop()
                if isinstance(node, yaml.ScalarNode):
                    path = node.value.removeprefix(f"hf://datasets/{place}/")
                    if "://" in path or "::" in path or ".." in path or path.startswith(("/", "~")):
                        found = "found a card that names others"
                        raise FeedbackRowError(source, f"expected a data set of its own files, {found}.")
                elif id(node) not in seen:
                    seen.add(id(node))
                    configs += (each for pair in node.value for each in (pair if isinstance(pair, tuple) else [pair]))


class ArrowFolder(SeekableFile):
    """A folder that ``save_to_disk`` has written, with ``@SPLIT`` if it has several; it is mapped, not read."""

    def __init__(self, path: str) -> None:
        super().__init__(path, lambda file: _rows_in(file._rows, file.name))

    def units(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Runs of at most 256 rows."""
        return offsets // self._unit_rows

    def block(self, unit: int) -> Block:
        """The rows of one run."""
        start = unit * self._unit_rows
        with whole(self.name, "a data set"):
            return block_of(_validated(self._rows[start : start + self._unit_rows]), start, self.name)

    def mark(self) -> str:
        """A digest of the names and sizes of its files, and of what they say about the others."""
        files = files_of(self.path)
        told = [[file.name, file.stat().st_size, file.suffix == ".json" and file.read_text()] for file in files]
        return hashlib.sha256(repr(told).encode()).hexdigest()

    @cached_property
    def _unit_rows(self) -> int:
        return max(1, min(BATCH_ROWS, _UNIT_BYTES * len(self._rows) // max(1, size_of(self.path))))

    @cached_property
    def _rows(self) -> Any:
        return _saved_dataset(self.path).with_format("arrow")


def block_of(table: Any, first: int, name: str, rest: Callable[[int], Any] | None = None) -> Block:
    """Neighbouring rows of a file, given as a table and the number of its first; ``rest`` gives one that it lacks."""

    def at(place: Place) -> Record | FeedbackRowError:
        row = table.slice(place.offset - first, 1)
        if not len(row) and rest is not None:
            row = rest(place.offset)
        return _record_of(row, place_in(name, place.line))

    return Block(int(table.nbytes) + 4096, at)


def rows_of(batches: Iterable[Any], name: str, kind: str) -> Read:
    """The rows of Arrow batches as Python values, a few hundred in memory at a time.

    The error for damaged ones names the row reached and the ``kind`` of file expected.
    """
    number = 0
    with whole(lambda: place_in(name, number + 1) if number else name, kind):
        for batch in batches:
            if len(set(batch.schema.names)) < len(batch.schema.names):
                found = "expected each column name once, found one twice."
                raise FeedbackRowError(name, found, "Rename or remove one.")
            for start in range(0, len(batch), BATCH_ROWS):
                for record in _records_of(batch.slice(start, BATCH_ROWS), name, number):
                    yield Place(number, number + 1), record
                    number += 1


@contextmanager
def whole(place: str | Callable[[], str], kind: str) -> Iterator[None]:
    """Makes a FeedbackRowError of what Arrow raises for a file that is damaged or of another kind."""
    from pyarrow import ArrowException

    try:
        yield
    except FeedbackRowError:
        raise
    except (ArrowException, OSError, ValueError, MemoryError) as error:  # the last one where a length is damaged
        where = place if isinstance(place, str) else place()
        raise FeedbackRowError(where, f"expected {kind}, found {_in_one_line(error)}.") from error


def _records_of(batch: Any, name: str, before: int) -> Iterable[Record | FeedbackRowError]:
    with suppress(ValueError, ArithmeticError, RecursionError):  # which are told of single rows
        if size_of_rows(batch) <= MAX_LINE_BYTES:
            return _values_of(batch)
    return [_record_of(batch.slice(at, 1), place_in(name, before + at + 1)) for at in range(len(batch))]


def _record_of(row: Any, place: str) -> Record | FeedbackRowError:
    """One row, which is measured before it becomes Python values."""
    if size_of_rows(row) > MAX_LINE_BYTES:
        return FeedbackRowError(place, TOO_LONG)
    try:
        [record] = _values_of(row)
    except UnicodeDecodeError as error:
        return not_utf8(place, f"byte 0x{error.object[error.start]:02x}")
    except (ValueError, ArithmeticError, RecursionError) as error:
        found = f"one that it cannot ({type(error).__name__})"
        return FeedbackRowError(place, f"expected values that Python can hold, found {found}.")
    return record


def _values_of(rows: Any) -> list[Record]:
    records: list[Record] = rows.to_pylist()
    for field in rows.schema:
        for record in records if "extension<arrow.json>" in str(field.type) else ():
            record[field.name] = _parsed(record[field.name], field.type)
    for name, names in _class_names((rows.schema.metadata or {}).get(b"huggingface", b"")).items():
        for record in records:
            if isinstance(number := record.get(name), int) and number in (0, 1):
                record[name] = names[number]
    return records


@lru_cache(maxsize=16)
def _class_names(metadata: bytes) -> dict[str, list[str]]:
    """Of columns with two classes, which `datasets` stores by number, the names, unless these are the numbers."""
    told = unpacked(metadata.decode(errors="replace"))
    features = value_at(told, "info.features") if isinstance(told, dict) else None
    known = features.items() if isinstance(features, dict) else ()
    named = ((name, feature.get("names")) for name, feature in known if isinstance(feature, dict))
    return {name: names for name, names in named if isinstance(names, list) and len(names) == 2 and names[0] != "0"}


def _parsed(value: Any, kind: Any) -> Any:
    """A value of an Arrow type with the JSON texts in it parsed, as which `datasets` stores its ``Json()``."""
    from pyarrow import JsonType, types

    if isinstance(kind, JsonType):
        return value if value is None else parse_value(value)
    if types.is_struct(kind):
        return value and {field.name: _parsed(value[field.name], field.type) for field in kind}
    listed = types.is_list(kind) or types.is_large_list(kind)
    return [_parsed(part, kind.value_type) for part in value] if listed and value else value


def _in_one_line(error: Exception) -> str:
    """What a library says of a file; what the operating system says comes without the path, which may be a long one."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    return "".join(character if character.isprintable() else "?" for character in line)


def _rows_in(dataset: Any, name: str) -> Read:
    # As Arrow, not decoded: images and sounds stay what they are, and need no package to open them.
    tables = dataset.with_format("arrow").iter(batch_size=BATCH_ROWS)
    yield from rows_of((_validated(batch) for table in tables for batch in table.to_batches()), name, "a data set")


def _batches_in(path: str, file: BinaryIO) -> Iterator[Any]:
    import pyarrow as pa

    check_arrow(path, file)
    if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
        reader = pa.ipc.open_file(file)
        yield from (_validated(reader.get_batch(number)) for number in range(reader.num_record_batches))
        return
    size = _check_end(file)
    file.seek(0)
    yield from map(_validated, pa.ipc.open_stream(file))
    if file.tell() < size:
        raise pa.ArrowInvalid("more behind the end of the stream")


def _validated(rows: Any) -> Any:
    # Arrow takes the offsets of a file as they are; damaged ones would end the process.
    rows.validate(full=True)
    return rows


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


def _saved_dataset(path: str) -> Any:
    """The data set in a folder; an error if there is no such split, or a file is missing, cut off or damaged."""
    from datasets import load_from_disk

    folder, split = arrow_folder(path) or (Path(path), "")
    splits = sorted(inner.parent.name for inner in folder.glob("*/state.json"))
    if split not in (splits or [""]):
        found = f"those of {', '.join(splits)}" if splits else "one without splits"
        remedy = f"Name it as {folder}@SPLIT if it has any."
        raise FeedbackRowError(path, f"expected one data set, found {found}.", remedy)
    try:
        for shard in (folder / split).glob("*.arrow"):
            with open_file(str(shard)) as file:
                _check_end(file)
                check_arrow(str(shard), file)
        return load_from_disk(str(folder / split))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_loaded(path, error) from None


def _not_loaded(source: str, error: Exception) -> FeedbackRowError:
    return FeedbackRowError(source, f"expected a data set, but it could not be loaded ({_in_one_line(error)}).")
