"""One record of JSON text, trusting nothing about it; and the lines of a file, none longer than allowed."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from bco_lightning.data.files import damage
from bco_lightning.data.remote import place_in
from bco_lightning.data.values import Record, shown
from bco_lightning.errors import FeedbackRowError

# A million tokens of English are four of these MiB; a parsed line can take 24 times its bytes in memory.
MAX_LINE_BYTES = 4 * 2**20
# As many as the largest float has; longer ones take time that grows with the square of their length.
MAX_INTEGER_DIGITS = 309
_MOST_EMPTY = 100_000  # a megabyte of gzip could hold a thousand million of them
NESTED = "expected plain JSON values, found brackets nested too deeply."
HALF_PAIR = re.compile("[\ud800-\udfff]")
SURROGATE = "expected Unicode text, found half of a surrogate pair."
TOO_LONG = f"expected a row of at most {MAX_LINE_BYTES / 2**20:g} MiB, found a longer one."
NUL = ("expected text, found a NUL byte.", "Convert the file to UTF-8.")
_BINARY = {
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
}
_MARKS = (*_BINARY, b"\xef\xbb\xbf")


def parse_line(line: bytes, place: str) -> Record | FeedbackRowError | None:
    """The record in one line of JSON, or what is wrong with it; ``None`` for white space."""
    if len(line) > MAX_LINE_BYTES:
        return FeedbackRowError(place, TOO_LONG)
    try:
        text = decode(line, place)
        if not text or text.isspace():
            return None
        record = _STRICT.decode(text.rstrip("\r\n"))  # or a text cut off would be said to hold a line break
        escaped = "\\" in text and ("\\ud" in text or "\\uD" in text)  # the first alone is found in no time
        if escaped and HALF_PAIR.search(json.dumps(record, ensure_ascii=False)):
            return FeedbackRowError(place, SURROGATE)
    except FeedbackRowError as error:
        return error.without_cause()
    except json.JSONDecodeError as error:
        found = f"malformed JSON ({error.msg}, column {error.colno})"
        remedy = "" if text.endswith("\n") else "The file ends within this line; it may have been cut off."
        return FeedbackRowError(place, f"expected one JSON object per line, found {found}.", remedy)
    except RecursionError:
        return FeedbackRowError(place, NESTED)
    except ValueError as error:
        return FeedbackRowError(place, f"expected {error}.")
    if not isinstance(record, dict):
        return FeedbackRowError(place, f"expected a JSON object, found {shown(record)}.")
    return record


def numbered_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes, int]]:
    """Number from 1, bytes and length of each line of a file; of bytes, no more than one over the limit.

    An error for a file that breaks off or cannot be read on names the line reached.
    """
    number = empty = 0
    try:
        while line := file.readline(MAX_LINE_BYTES + 1):
            size, rest = len(line), line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
                size += len(rest)
            number += 1
            empty = empty + 1 if line.isspace() else 0
            if empty > _MOST_EMPTY:
                raise FeedbackRowError("", f"expected records, found {_MOST_EMPTY:,} empty lines one after the other.")
            yield number, line, size
    except FeedbackRowError as error:
        raise FeedbackRowError(place_in(name, number + 1), error.problem, error.remedy) from None
    except (EOFError, OSError, zlib.error) as error:
        raise damage(name, place_in(name, number + 1), error) from None


def decode(content: bytes, place: str) -> str:
    """The text of UTF-8 bytes; an error if they are something else."""
    refuse_other_encodings(content, place)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise not_utf8(place, f"byte 0x{content[error.start]:02x} at column {column}") from error


def refuse_other_encodings(content: bytes, place: str, remedy: str = "Unpack or convert the file.") -> None:
    """Raises a FeedbackRowError if bytes begin like a known binary file, or with a mark, or hold a NUL."""
    if content.startswith(_MARKS):
        refuse_binary(content, place, remedy)
        found = "expected UTF-8 without a byte order mark, found one."
        raise FeedbackRowError(place, found, "Save the file without it.")
    if b"\x00" in content:
        raise FeedbackRowError(place, *NUL)


def refuse_binary(content: bytes, place: str, remedy: str = "Unpack or convert the file.") -> None:
    """Raises a FeedbackRowError if a file that begins with these bytes is no text at all."""
    for magic, name in _BINARY.items():
        if content.startswith(magic):
            raise FeedbackRowError(place, f"expected UTF-8 text, found {name}.", remedy)


def not_utf8(place: str, found: str, remedy: str = "Convert the file.") -> FeedbackRowError:
    """The error for bytes that are no UTF-8."""
    return FeedbackRowError(place, f"expected UTF-8, found {found}.", remedy)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
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


_STRICT = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_finite, parse_constant=_refuse_constant
)
parse_value = _STRICT.decode  # raises a ValueError or RecursionError for a text that is no JSON
