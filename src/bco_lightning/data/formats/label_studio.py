"""Tasks of Label Studio with the annotations of its JSON export; the flat one (JSON_MIN, CSV) is rows in columns.

What the task holds is the row, as in ``unpaired``; each control of an annotation is a rating under its name.

Source: the Python package label-studio-sdk 2.1.2, ``types/annotation.py`` and ``label_interface/control_tags.py``;
https://labelstud.io/guide/task_format.
"""

from __future__ import annotations

from typing import Any

from bco_lightning.data.formats.record_format import Origin, Rows
from bco_lightning.data.formats.scores import rated_by
from bco_lightning.data.formats.unpaired import unrated_row
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, objects_in

_VALUES = ("choices", "rating", "number")


def matches(record: Record, columns: Columns) -> bool:
    """Whether there are the data of a task and annotations."""
    return isinstance(record.get("data"), dict) and isinstance(record.get("annotations"), list)


def candidates(record: Record, origin: Origin) -> Rows:
    """A row for each annotation; those that were skipped are none."""
    scores: dict[str, list[Any]] = {}
    users: dict[str, list[Any]] = {}
    for number, annotation in enumerate(objects_in(record.get("annotations"))):
        for result in objects_in(annotation.get("result")) if not annotation.get("was_cancelled") else ():
            name, given = result.get("from_name"), result.get("value")
            value = next((given[key] for key in _VALUES if key in given), None) if isinstance(given, dict) else None
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            if isinstance(name, str) and value is not None:
                scores.setdefault(name, []).append(value)
                users.setdefault(name, []).append(number)
    data = record["data"] if isinstance(record.get("data"), dict) else {}
    yield from rated_by(scores, lambda: unrated_row(data, origin), origin, users)
