"""Records of Argilla with the responses of annotators.

A row for each response to the question that ``columns.label`` or the rule of ratings names. Two layouts: that of
``Dataset.records.to_json`` and ``to_list``, in which ``responses`` holds, for each question, a list of ``{"value",
"user_id"}``; and the flat one of ``to_list(flatten=True)`` and ``to_datasets``, in which the fields are columns and
those of a question end in ``.responses``, ``.responses.users`` and ``.responses.status``. Only the flat one knows
drafts and discarded responses, of which neither is used.

Source: the Python package argilla 2.8.0, ``argilla/records/_resource.py`` (``Record.to_dict``) and
``argilla/records/_io/_generic.py``; https://docs.argilla.io.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bco_lightning.batch import LeftOut
from bco_lightning.data.formats.record_format import Candidate, Origin
from bco_lightning.data.formats.scores import rated_by
from bco_lightning.data.formats.unpaired import unrated_row
from bco_lightning.data.options import Columns

_FLAT, _USERS, _STATUS = ".responses", ".users", ".status"
Response = tuple[Any, Any]  # user and value


def matches(record: Mapping[str, Any], columns: Columns) -> bool:
    """Whether there are fields and responses, or flat responses."""
    nested = isinstance(record.get("fields"), Mapping) and "responses" in record
    return nested or any(name.endswith(_FLAT) for name in record)


def candidates(record: Mapping[str, Any], origin: Origin) -> Iterator[Candidate | LeftOut]:
    """A row for each response."""
    fields, nested = record.get("fields"), record.get("responses")
    columns = fields if isinstance(fields, Mapping) else record
    if isinstance(nested, Mapping):
        given = {question: _nested(responses) for question, responses in nested.items() if isinstance(responses, list)}
    else:
        given = {name.removesuffix(_FLAT): _flat(record, name) for name in record if name.endswith(_FLAT)}
    scores = {question: [value for _, value in responses] for question, responses in given.items()}
    users = {question: [user for user, _ in responses] for question, responses in given.items()}
    yield from rated_by(scores, lambda: unrated_row(columns, origin), origin, users)


def _nested(responses: list[Any]) -> list[Response]:
    return [
        (response.get("user_id"), response["value"])
        for response in responses
        if isinstance(response, Mapping)
        and response.get("value") is not None
        and response.get("status", "submitted") == "submitted"
    ]


def _flat(record: Mapping[str, Any], name: str) -> list[Response]:
    values = record[name] if isinstance(record[name], list) else []
    users, states = (
        column if isinstance(column, list) and len(column) == len(values) else [None] * len(values)
        for column in (record.get(name + _USERS), record.get(name + _STATUS))
    )
    return [
        (user, value)
        for user, value, state in zip(users, values, states, strict=True)
        if value is not None and state in (None, "submitted")
    ]
