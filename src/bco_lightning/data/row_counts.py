"""What became of the rows, and what they look like as a whole, to be shown before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class RowCounts:
    """What became of the rows of one data set; ``read`` is always ``used`` plus ``dropped`` plus ``malformed``."""

    name: str
    read: int = 0
    up: int = 0
    down: int = 0
    dropped: int = 0
    dropped_places: list[str] = field(default_factory=list)
    prompt_cut: int = 0
    completion_cut: int = 0
    malformed: int = 0
    malformed_places: list[str] = field(default_factory=list)

    @property
    def used(self) -> int:
        """Rows that are trained on or scored."""
        return self.read - self.dropped - self.malformed

    def __str__(self) -> str:
        places = f" (over data.max_length, for instance {', '.join(self.dropped_places)})" if self.dropped else ""
        text = (
            f"{self.name}: {self.read} rows read, {self.used} used ({self.up} up, {self.down} down), "
            f"{self.dropped} dropped{places}, {self.prompt_cut} prompts cut, {self.completion_cut} completions cut"
        )
        if not self.malformed:
            return text
        return f"{text}, {self.malformed} malformed and left out (for instance {', '.join(self.malformed_places)})"


@dataclass
class FeedbackSummary:
    """What should make one look twice at a log: repeated rows, answers with both thumbs, one source that prevails.

    Args:
        rows: Valid rows.
        duplicates: Rows with the prompt, completion and label of an earlier row.
        contradictions: Prompts with one completion that have thumbs of both kinds.
        sources: Valid rows of each source.
    """

    rows: int
    duplicates: int
    contradictions: int
    sources: Mapping[str, int]

    @classmethod
    def of(
        cls, answer_keys: np.ndarray[Any, Any], thumbs_up: np.ndarray[Any, Any], sources: Mapping[str, int]
    ) -> FeedbackSummary:
        """Counts from a key of prompt and completion and the thumb of each row."""
        up, down = np.unique(answer_keys[thumbs_up]), np.unique(answer_keys[~thumbs_up])
        return cls(
            rows=len(answer_keys),
            duplicates=len(answer_keys) - len(up) - len(down),
            contradictions=len(np.intersect1d(up, down, assume_unique=True)),
            sources=dict(sources),
        )

    @property
    def largest_source(self) -> tuple[str, float]:
        """The source with most rows, and its share of all rows."""
        name = max(self.sources, key=lambda source: self.sources[source])
        return name, self.sources[name] / self.rows

    def __str__(self) -> str:
        text = (
            f"feedback: {self.duplicates} rows repeat an earlier one, "
            f"{self.contradictions} answers have thumbs of both kinds"
        )
        if len(self.sources) < 2 or not self.rows:
            return text
        name, share = self.largest_source
        return f"{text}, {share:.0%} of the rows are from {name}"
