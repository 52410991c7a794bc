"""Records of Argilla with the responses of annotators.

Two layouts: that of ``Dataset.records.to_json`` and ``to_list``, and the flat one of ``to_list(flatten=True)`` and
``to_datasets``. Only the flat one knows drafts and discarded responses, of which neither is used.

Source: the Python package argilla 2.8.0, ``argilla/records/_resource.py`` (``Record.to_dict``) and
``argilla/records/_io/_generic.py``; https://docs.argilla.io.
"""

from __future__ import annotations

from typing import Any

from bco_lightning.data.formats.record_format import Origin, Rows
from bco_lightning.data.formats.scores import rated_by
from bco_lightning.data.formats.unpaired import unrated_row
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, objects_in

_FLAT, _USERS, _STATUS = ".responses", ".users", ".status"


def matches(record: Record, columns: Columns) -> bool:
    """Whether there are fields and responses, or flat responses."""
    nested = isinstance(record.get("fields"), dict) and "responses" in record
    return nested or any(name.endswith(_FLAT) for name in record)


def candidates(record: Record, origin: Origin) -> Rows:
    """A row for each response."""
    fields, nested = record.get("fields"), record.get("responses")
    columns = fields if isinstance(fields, dict) else record
    if isinstance(nested, dict):
        given = {question: objects_in(listed) for question, listed in nested.items() if isinstance(listed, list)}
    else:
        given = {name.removesuffix(_FLAT): _flat(record, name) for name in record if name.endswith(_FLAT)}
    scores: dict[str, list[Any]] = {question: [] for question in given}
    users: dict[str, list[Any]] = {question: [] for question in given}
    for question, responses in given.items():
        for response in responses:
            if response.get("value") is not None and response.get("status") in (None, "submitted"):
                scores[question].append(response["value"])
                users[question].append(response.get("user_id"))
    yield from rated_by(scores, lambda: unrated_row(columns, origin), origin, users)


def _flat(record: Record, name: str) -> list[Record]:
    """The responses of a flat question as objects; users and states only where there is one for each."""
    values: list[Any] = record[name] if isinstance(record[name], list) else []
    users, states = (
        column if isinstance(column, list) and len(column) == len(values) else [None] * len(values)
        for column in (record.get(name + _USERS), record.get(name + _STATUS))
    )
    parts = zip(values, users, states, strict=True)
    return [{"value": value, "user_id": user, "status": state} for value, user, state in parts]
