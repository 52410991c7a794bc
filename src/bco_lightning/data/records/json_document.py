"""Records of one JSON document: an array of them, an object of them by id, or a single one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from bco_lightning.data.files import open_unpacked
from bco_lightning.data.records.record_file import Place, Read, Record, RecordFile
from bco_lightning.data.records.strict_json import decode, parse_line
from bco_lightning.errors import FeedbackRowError

# The text of one emoji makes Python hold four bytes per character: 1 GiB for this.
MAX_DOCUMENT_BYTES = 256 * 2**20
_MORE = "more than one value"
_SPACE = re.compile(r"[ \t\r\n]*")
# Where a value ends is all that is asked of this one; the values are parsed by the strict parser, one at a time.
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)


class JsonDocument(RecordFile):
    """A ``.json`` file, which is held in memory whole.

    Its records are each object of an array; of an object whose values are all objects these, with their key as ``id``
    unless they have one; else the object itself.
    """

    def __iter__(self) -> Read:
        """Reads it through; places are numbers of records."""
        with open_unpacked(self.path) as file:
            content = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(content) > MAX_DOCUMENT_BYTES:
            found = f"expected a JSON document of at most {MAX_DOCUMENT_BYTES / 2**20:g} MiB, found a larger one."
            raise FeedbackRowError(
                self.name, found, "Write one object per line, as .jsonl, which is read line by line."
            )
        text = decode(content, self.name)
        del content
        start = _next(text, 0)
        if text[start : start + 1] not in ("[", "{"):
            found = "an empty file" if start == len(text) else "neither"
            raise FeedbackRowError(self.name, f"expected a JSON array or object, found {found}.")
        for number, (key, first, end) in enumerate(_records_in(text, start, self.name)):
            place = f"{self.name}:{number + 1}"
            try:
                yield Place(number, number + 1), _record(key, text[first:end], place)
            except FeedbackRowError as error:
                yield Place(number, number + 1), error.without_cause()


def _record(key: str | None, text: str, place: str) -> Record:
    record = parse_line(text.encode(), place) or {}
    if key is None:
        return record
    try:
        key.encode()
    except UnicodeEncodeError:
        raise FeedbackRowError(place, "expected Unicode text, found half of a surrogate pair.") from None
    return {"id": key, **record}


def _records_in(text: str, start: int, name: str) -> Iterator[tuple[str | None, int, int]]:
    """Key, first and last index of each record."""
    if text[start] == "[":
        yield from _parts(text, start, name)
        return
    parts = list(_parts(text, start, name))
    if not all(text[first] == "{" for _, first, _ in parts):
        yield None, start, len(text.rstrip(" \t\r\n"))
        return
    if len({key for key, _, _ in parts}) < len(parts):
        raise FeedbackRowError(name, "expected each key once, found one twice in the outermost object.")
    yield from parts


def _parts(text: str, start: int, name: str) -> Iterator[tuple[str | None, int, int]]:
    """Key (of an object), first and last index of each value of an array or object, which must be all of the text."""
    closing = {"[": "]", "{": "}"}[text[start]]
    try:
        at = _next(text, start + 1)
        while text[at : at + 1] != closing:
            key, at = _key(text, at) if closing == "}" else (None, at)
            _, end = _LENIENT.raw_decode(text, at)
            yield key, at, end
            at = _next(text, end)
            if text[at : at + 1] == closing:
                break
            at = _past(",", text, at)
            if text[at : at + 1] == closing:
                raise json.JSONDecodeError("a comma before the end", text, at)
        rest = _next(text, at + 1)
    except json.JSONDecodeError as error:
        raise _malformed(name, text, error.pos, error.msg) from None
    except RecursionError:
        raise FeedbackRowError(name, "expected plain JSON values, found brackets nested too deeply.") from None
    if rest < len(text):
        raise _malformed(name, text, rest, _MORE)


def _key(text: str, at: int) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("Expecting '\"'", text, at)
    key, end = _LENIENT.raw_decode(text, at)
    return key, _past(":", text, _next(text, end))


def _past(character: str, text: str, at: int) -> int:
    if text[at : at + 1] != character:
        raise json.JSONDecodeError(f"Expecting {character!r}", text, at)
    return _next(text, at + 1)


def _next(text: str, at: int) -> int:
    """Where the next character is that is no white space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _malformed(name: str, text: str, at: int, message: str) -> FeedbackRowError:
    line = text.count("\n", 0, at) + 1
    remedy = "If it has one object per line, name it .jsonl." if message == _MORE else ""
    if at >= len(text) or message.startswith("Unterminated"):
        remedy = "It may have been cut off."
    return FeedbackRowError(name, f"expected one JSON document, found malformed JSON ({message}, line {line}).", remedy)
