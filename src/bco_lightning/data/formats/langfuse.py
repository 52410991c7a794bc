"""Traces and observations of Langfuse with their scores.

Two layouts: the export of the table of traces or observations, in which each score is a column of its own with a list
of values; and what the API and the download of a single trace give, in which ``scores`` is a list of objects.

Source: langfuse/langfuse v3, ``worker/src/features/database-read-stream/{trace,observation}-stream.ts`` and
``getDatabaseReadStream.ts`` (``getChunkWithFlattenedScores``, ``prepareScoresForOutput``); data types of scores from
the Python package langfuse 5.0.4, ``langfuse/api/commons/types``; https://langfuse.com/docs/api-and-data-platform.
The scheduled export to blob storage keeps scores in files apart, which have to be joined before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bco_lightning.data.formats.record_format import Origin, Rows
from bco_lightning.data.formats.scores import USUAL_NAMES, by_name, rated_by
from bco_lightning.data.formats.traces import traced_row
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, from_json_text, is_blank, unpacked

_OF_LANGFUSE = ("traceId", "observationCount", "bookmarked", "htmlPath", "parentObservationId")
# Columns that can hold lists and are no scores.
_NO_SCORES = frozenset({
    "input", "output", "metadata", "tags", "traceTags", "comments", "observations", "toolCalls", "toolCallNames",
})  # fmt: skip


def matches(record: Record, columns: Columns) -> bool:
    """Whether there are an input, an output, and a column that only Langfuse has."""
    return "input" in record and "output" in record and any(name in record for name in _OF_LANGFUSE)


def candidates(record: Record, origin: Origin) -> Rows:
    """The rows of one trace or observation."""
    make_row = partial(traced_row, record, ("input", "output"), origin)
    yield from rated_by(_scores(record, origin.place), make_row, origin)


def _scores(record: Record, place: str) -> dict[str, list[Any]]:
    given = from_json_text(record.get("scores"), "scores", place)
    if isinstance(given, list):
        return by_name(given, "name", _value)
    # The table has a column for each score of the project, so one that was not given is known all the same.
    columns = {name: unpacked(value) for name, value in record.items() if name not in _NO_SCORES}
    lists = {name: value for name, value in columns.items() if isinstance(value, list)}
    scores = {name: value for name, value in lists.items() if all(isinstance(one, (int, float, str)) for one in value)}
    usual = {name: columns[name] for name in USUAL_NAMES if name in columns}
    return {**{name: [] if is_blank(value) else [value] for name, value in usual.items()}, **scores}


def _value(score: Record) -> Any:
    kind, value, text = score.get("dataType"), score.get("value"), score.get("stringValue")
    if kind == "BOOLEAN" and value in (0, 1):
        return bool(value)
    return text if kind == "CATEGORICAL" and text is not None else value
