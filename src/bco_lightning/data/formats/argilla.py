"""Records of Argilla with the responses of annotators.

Two layouts: that of ``Dataset.records.to_json`` and ``to_list``, in which ``responses`` holds, for each question, a
list of ``{"value", "user_id"}``; and the flat one of ``to_list(flatten=True)`` and ``to_datasets``, in which the fields
are columns and those of a question end in ``.responses``, ``.responses.users`` and ``.responses.status``. Only the flat
one knows drafts and discarded responses, of which neither is used.

Source: the Python package argilla 2.8.0, ``argilla/records/_resource.py`` (``Record.to_dict``) and
``argilla/records/_io/_generic.py``; https://docs.argilla.io.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.formats.record_format import Candidate
from bco_lightning.data.formats.scores import rated_by
from bco_lightning.data.formats.unpaired import unrated_row
from bco_lightning.data.source import RowFormat

_FLAT, _USERS, _STATUS = ".responses", ".users", ".status"


class Argilla:
    """A row for each response to the question that ``columns.label`` or the rule of ratings names."""

    rows_per_record: int | None = None

    def matches(self, record: Mapping[str, Any], options: RowFormat) -> bool:
        """Whether there are fields and responses, or flat responses."""
        nested = isinstance(record.get("fields"), Mapping) and "responses" in record
        return nested or any(name.endswith(_FLAT) for name in record)

    def candidates(
        self, record: Mapping[str, Any], place: str, options: RowFormat, *, labelled: bool
    ) -> Iterator[Candidate | LeftOut]:
        """The rows of one record; see :class:`RecordFormat`."""
        fields = record.get("fields")
        columns: Mapping[str, Any] = fields if isinstance(fields, Mapping) else record

        def row() -> FeedbackRow:
            return unrated_row(columns, place, options)

        responses = _responses(record)
        scores = {question: [value for _, value in given] for question, given in responses.items()}
        users = {question: [user for user, _ in given] for question, given in responses.items()}
        yield from rated_by(scores, row, place, options, labelled=labelled, users=users)


def _responses(record: Mapping[str, Any]) -> dict[str, list[tuple[Any, Any]]]:
    """User and value of each response that counts, by question."""
    nested = record.get("responses")
    if isinstance(nested, Mapping):
        return {
            question: [
                (response.get("user_id"), response["value"]) for response in responses if _is_submitted(response)
            ]
            for question, responses in nested.items()
            if isinstance(responses, list)
        }
    return {
        name.removesuffix(_FLAT): _submitted(values, record.get(name + _USERS), record.get(name + _STATUS))
        for name, values in record.items()
        if name.endswith(_FLAT)
    }


def _is_submitted(response: Any) -> bool:
    given = isinstance(response, Mapping) and response.get("value") is not None
    return given and response.get("status", "submitted") == "submitted"


def _submitted(values: Any, users: Any, status: Any) -> list[tuple[Any, Any]]:
    given = values if isinstance(values, list) else []
    givers, states = (
        column if isinstance(column, list) and len(column) == len(given) else [None] * len(given)
        for column in (users, status)
    )
    return [
        (user, value)
        for user, value, state in zip(givers, given, states, strict=True)
        if value is not None and state in (None, "submitted")
    ]
