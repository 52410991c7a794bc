"""Feedback that a tool keeps in a file of its own, found by what it is about."""

from __future__ import annotations

from typing import Any

from bco_lightning.data.files import expand
from bco_lightning.data.records import record_file
from bco_lightning.data.records.csv_rows import number_in, thumb_in
from bco_lightning.data.values import Record, keys_of
from bco_lightning.errors import FeedbackRowError

# TensorZero's, Phoenix's and Weave's names for the answer that feedback is about.
_TARGETS = ("target_id", "span_id", "weave_ref")
_CELLS = {"value": thumb_in, "result.score": number_in}


class FeedbackBeside:
    """The feedback of a file, a glob or a URL; none without one. It pickles to loader workers."""

    def __init__(self, path: str | None = None) -> None:
        self._by_target: dict[str, list[Record]] = {}
        self._found: set[str] = set()
        for file in (record_file(name, _CELLS) for name in (expand(path) if path else ())):
            for place, record in file:
                if isinstance(record, FeedbackRowError):
                    raise record
                target = next((record[name] for name in _TARGETS if isinstance(record.get(name), str)), None)
                if target is None:
                    found = f"expected feedback with one of {', '.join(map(repr, _TARGETS))}, found {keys_of(record)}."
                    raise FeedbackRowError(f"{file.name}:{place.line}", found)
                self._by_target.setdefault(target.rpartition("/")[2], []).append(record)

    def on(self, target: Any) -> list[Record]:
        """The feedback on the answer of that id."""
        found = self._by_target.get(target, []) if isinstance(target, str) else []
        self._found.update([target] if found else ())
        return found

    @property
    def lost(self) -> int:
        """Number of those that are about no answer asked for so far."""
        return sum(len(entries) for target, entries in self._by_target.items() if target not in self._found)
