"""Small files that would fill the memory: what is packed in them is measured before it is unpacked."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

from bco_lightning.data.remote import public_name
from bco_lightning.errors import FeedbackRowError

# Texts are packed to a tenth, often repeated ones to a hundredth.
_ALWAYS_BYTES, _MOST_TIMES = 64 * 2**20, 300
_FILE_MAGIC, _CONTINUES = b"ARROW1\0\0", b"\xff\xff\xff\xff"
_RECORDS, _DICTIONARY = 3, 2


def refuse_swelling(path: str, size: int, stored: int) -> None:
    """Refuses what would take many times the bytes of memory that are stored of it."""
    if size > _ALWAYS_BYTES and size > _MOST_TIMES * stored:
        problem = (
            f"expected at most {_MOST_TIMES} bytes in memory for one that is stored, found {size // max(1, stored):,}."
        )
        raise FeedbackRowError(public_name(path), problem)


def check_arrow(path: str, file: BinaryIO) -> None:
    """Refuses an Arrow file or stream of packed batches that swell; reads what says how large they are, and no more."""
    from pyarrow import ArrowInvalid

    file.seek(0)
    file.seek(8 if file.read(8) == _FILE_MAGIC else 0)
    try:
        while file.read(4) == _CONTINUES and (length := struct.unpack("<i", file.read(4))[0]) > 0:
            message, body = file.read(length), file.tell()
            told = struct.unpack_from("<I", message)[0]
            kind = message[_field(message, told, 1)]
            records = _table(message, told, 2)
            records = _table(message, records, 1) if kind == _DICTIONARY else records
            stored = struct.unpack_from("<q", message, end)[0] if (end := _field(message, told, 3)) else 0
            if kind in (_RECORDS, _DICTIONARY):
                rows = _field(message, records, 0)
                size = 8 * struct.unpack_from("<q", message, rows)[0] if rows else 0
                buffers = _table(message, records, 2) if _field(message, records, 3) else 0
                for number in range(struct.unpack_from("<I", message, buffers)[0] if buffers else 0):
                    start, packed = struct.unpack_from("<qq", message, buffers + 4 + 16 * number)
                    file.seek(body + start)
                    size += max(0, struct.unpack("<q", file.read(8))[0]) if packed else 0
                refuse_swelling(path, size, stored)
            file.seek(body + stored)
    except FeedbackRowError:
        raise
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise ArrowInvalid("a damaged one") from error
    file.seek(0)


def _field(message: bytes, table: int, number: int) -> int:
    """Where a field of a table of FlatBuffers lies; 0 if it is not there."""
    fields = table - struct.unpack_from("<i", message, table)[0]
    known = struct.unpack_from("<H", message, fields)[0]
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", message, fields + place)[0] if place < known else 0
    return table + offset if offset else 0


def _table(message: bytes, table: int, number: int) -> int:
    place = _field(message, table, number)
    return place + struct.unpack_from("<I", message, place)[0] if place else 0


def size_of_rows(rows: Any) -> int:
    """Bytes of an Arrow table or batch, and of what its values take as Python values where that is far more."""
    return sum(_size(part) for column in rows.columns for part in getattr(column, "chunks", [column]))


def _size(array: Any) -> int:
    from pyarrow import compute, types

    kind = array.type
    if hasattr(array, "storage"):
        return _size(array.storage)
    if types.is_dictionary(kind):
        values = array.dictionary
        if types.is_string(values.type) or types.is_large_string(values.type) or types.is_binary(values.type):
            return 8 * len(array) + int(compute.sum(compute.binary_length(values).take(array.indices)).as_py() or 0)
        return (8 + int(values.nbytes)) * len(array)
    if types.is_run_end_encoded(kind):
        return (8 + int(array.values.nbytes)) * len(array)
    if types.is_struct(kind):
        return 8 * len(array) + sum(_size(array.field(number)) for number in range(kind.num_fields))
    if types.is_fixed_size_list(kind):
        return _size(array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[len(array)].as_py()
        return 8 * len(array) + _size(array.values.slice(first, last - first))
    return int(array.nbytes) + (8 * len(array) if types.is_null(kind) or types.is_boolean(kind) else 0)
