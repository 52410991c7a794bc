"""Records of one JSON document: an array of them, an object of them by id, or a single one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from bco_lightning.data.files import open_unpacked
from bco_lightning.data.records.record_file import Place, Read, RecordFile
from bco_lightning.data.records.strict_json import HALF_PAIR, NESTED, SURROGATE, decode, parse_line
from bco_lightning.errors import FeedbackRowError

# The text of one emoji makes Python hold four bytes per character: 1 GiB for this.
MAX_DOCUMENT_BYTES = 256 * 2**20
_MORE = "more than one value"
# Under which Dify, MLflow and APIs (Phoenix, Langfuse, TensorZero) have the array of what was asked for.
_ENVELOPES = ("feedback_data", "traces", "data", "inferences")
_Part = tuple[str | None, int, int]  # key (of an object), first and last index of a value
_SPACE = re.compile(r"[ \t\r\n]*")
# Where a value ends is all that is asked of this one; the values are parsed by the strict parser, one at a time.
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)


def document_records(file: RecordFile) -> Read:
    """The records of a ``.json`` file, which is held in memory whole; places are their numbers.

    They are each object of an array, which may stand in an object as the answers of many an API do; of an object whose
    values are all objects these, with their key as ``id`` unless they have one; else the object itself.
    """
    with open_unpacked(file.path) as opened:
        content = opened.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        found = f"expected a JSON document of at most {MAX_DOCUMENT_BYTES / 2**20:g} MiB, found a larger one."
        raise FeedbackRowError(file.name, found, "Write one object per line, as .jsonl, which is read line by line.")
    text = decode(content, file.name)
    del content
    for number, (key, first, end) in enumerate(_records_in(text, file.name)):
        place = f"{file.name}:{number + 1}"
        record = parse_line(text[first:end].encode(), place) or {}
        if key is not None and isinstance(record, dict):
            record = FeedbackRowError(place, SURROGATE) if HALF_PAIR.search(key) else {"id": key, **record}
        yield Place(number, number + 1), record


def _records_in(text: str, name: str) -> Iterable[_Part]:
    """Where the records are."""
    start = _next(text, 0)
    if text[start : start + 1] == "[":
        return _parts(text, start, name)
    if text[start : start + 1] != "{":
        found = "an empty file" if start == len(text) else "neither"
        raise FeedbackRowError(name, f"expected a JSON array or object, found {found}.")
    parts = list(_parts(text, start, name))
    array = next((first for key, first, _ in parts if key in _ENVELOPES and text[first] == "["), None)
    if array is not None:
        return _parts(text, array, name, whole=False)
    if not all(text[first] == "{" for _, first, _ in parts):
        return [(None, start, len(text.rstrip(" \t\r\n")))]
    if len({key for key, _, _ in parts}) < len(parts):
        raise FeedbackRowError(name, "expected each key once, found one twice in the outermost object.")
    return parts


def _parts(text: str, start: int, name: str, whole: bool = True) -> Iterator[_Part]:
    """Where the values of an array or object are; if ``whole``, nothing follows."""
    key, closing = None, {"[": "]", "{": "}"}[text[start]]
    try:
        at = _next(text, start + 1)
        while text[at : at + 1] != closing:
            if closing == "}":
                key, at = _LENIENT.raw_decode(text, _past('"', text, at) - 1)
                at = _next(text, _past(":", text, _next(text, at)))
            _, end = _LENIENT.raw_decode(text, at)
            yield key, at, end
            at = _next(text, end)
            if text[at : at + 1] != closing:
                at = _next(text, _past(",", text, at))
                if text[at : at + 1] == closing:
                    raise json.JSONDecodeError("a comma before the end", text, at)
        rest = _next(text, at + 1)
        if whole and rest < len(text):
            raise json.JSONDecodeError(_MORE, text, rest)
    except json.JSONDecodeError as error:
        remedy = "If it has one object per line, name it .jsonl." if error.msg == _MORE else ""
        if error.pos >= len(text) or error.msg.startswith("Unterminated"):
            remedy = "It may have been cut off."
        found = f"malformed JSON ({error.msg}, line {error.lineno})"
        raise FeedbackRowError(name, f"expected one JSON document, found {found}.", remedy) from None
    except RecursionError:
        raise FeedbackRowError(name, NESTED) from None


def _past(character: str, text: str, at: int) -> int:
    if text[at : at + 1] != character:
        raise json.JSONDecodeError(f"Expecting {character!r}", text, at)
    return at + 1


def _next(text: str, at: int) -> int:
    """Where the next character is that is no white space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at
