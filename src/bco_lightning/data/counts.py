"""What became of the rows, and what they look like as a whole, to be shown before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from bco_lightning.batch import LeftOut
from bco_lightning.data.labels import NO_FEEDBACK
from bco_lightning.errors import FeedbackRowError

NUM_PLACES = 3


@dataclass
class Counted:
    """A number of rows, and where the first three of them stand."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def take(self, count: int, places: Iterable[str]) -> None:
        """Counts more rows, of which the first stand at ``places``."""
        self.count += count
        self.places = [*self.places, *places][:NUM_PLACES]

    def __str__(self) -> str:
        return f"for instance {', '.join(self.places)}" if self.places else ""


@dataclass
class RowCounts:
    """What became of the rows of one data set.

    ``read`` is always ``used``, plus those left out for some reason, plus ``malformed`` ones.
    """

    name: str
    read: int = 0
    up: int = 0
    down: int = 0
    left_out: dict[str, Counted] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    malformed: Counted = field(default_factory=Counted)
    by_source: dict[str, tuple[int, int]] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)  # of a source, those to know about, in words

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> RowCounts:
        """Made of what ``dataclasses.asdict`` made of another, also by way of JSON."""
        return cls(
            **{
                **values,
                "left_out": {reason: Counted(**counted) for reason, counted in values["left_out"].items()},
                "malformed": Counted(**values["malformed"]),
                "by_source": {name: (up, down) for name, (up, down) in values["by_source"].items()},
            }
        )

    @property
    def num_left_out(self) -> int:
        """Rows left out for any reason; malformed ones are counted apart."""
        return sum(counted.count for counted in self.left_out.values())

    @property
    def used(self) -> int:
        """Rows that are trained on or scored."""
        return self.read - self.num_left_out - self.malformed.count

    def require_used(self) -> None:
        """Raises a FeedbackRowError with the reasons for which rows were left out, if none can be used."""
        if not self.used:
            reasons = "; ".join(f"{reason}: {counted.count}" for reason, counted in self.left_out.items())
            raise FeedbackRowError(
                self.name,
                f"expected rows to use, found none ({self.num_left_out} left out, {self.malformed.count} malformed).",
                reasons,
            )

    def warn_of_one_class(self) -> None:
        """Warns where rows to measure by have thumbs of one kind."""
        if bool(self.up) != bool(self.down):
            kind = "thumbs-up" if self.up else "thumbs-down"
            rank_zero_warn(
                f"{self.name}: all {self.used} rows are {kind}. val/loss is that of one class; what compares the two, "
                "such as val/auroc and val/margin, is not known (nan). Give data.validation_files with both."
            )

    def take(self, row: LeftOut | FeedbackRowError) -> None:
        """Counts a row that gets no place in a table: a malformed one, or one that its record or a rule leaves out."""
        self.read += 1
        if isinstance(row, LeftOut):
            self.left_out.setdefault(row.reason, Counted()).take(1, [row.place])
        else:
            self.malformed.take(1, [row.where])

    def add(self, others: RowCounts) -> None:
        """Adds such rows, and what else is known of how the sources were read."""
        self.formats, self.columns, self.read = others.formats, others.columns, self.read + others.read
        self.malformed.take(others.malformed.count, others.malformed.places)
        for reason, counted in others.left_out.items():
            self.left_out.setdefault(reason, Counted()).take(counted.count, counted.places)

    def __str__(self) -> str:
        cut = ", ".join(f"{count} {what}" for what, count in self.cut.items() if count) or "nothing cut"
        text = (
            f"{self.name}: {self.read} rows read, {self.used} used ({self.up} up, {self.down} down), "
            f"{self.num_left_out} left out"
        )
        if self.cut:  # nobody knows yet where rows are tokenized later
            text += f", {cut}"
        if len(self.by_source) > 1 or set(self.formats.values()) - {"unpaired"}:
            for name, (up, down) in self.by_source.items():
                text += f"\n  {name}: {up} up, {down} down, read as {self.formats.get(name, 'unknown')}"
        for name, (up, down) in self.by_source.items():
            if up and not down and NO_FEEDBACK in self.left_out:
                text += f"\n  every thumb of {name} is up: perhaps its export leaves out scores of 0 (Langfuse's did)"
        for name, said in self.columns.items():
            text += f"\n  columns of {name}: {said}"
        for reason, counted in self.left_out.items():
            text += f"\n  {counted.count} left out: {reason} ({counted})"
        if self.malformed.count:
            text += f"\n  {self.malformed.count} malformed and left out ({self.malformed})"
        return text


@dataclass
class FeedbackSummary:
    """What should make one look twice at a log: repeated rows, answers with both thumbs, one source that prevails.

    ``duplicates`` have the prompt, completion and label of an earlier row; ``contradictions`` are prompts with one
    completion that have thumbs of both kinds. Only valid rows count.
    """

    rows: int
    duplicates: int
    contradictions: int
    sources: Mapping[str, int]
    validation_prompts_in_training: int = 0

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
        if len(self.sources) > 1 and self.rows:
            name, share = self.largest_source
            text += f", {share:.0%} of the rows are from {name}"
        if self.validation_prompts_in_training:
            text += f"\n{self.validation_prompts_in_training} validation rows have a prompt that is trained on too"
        return text
