"""What a user says about a feedback log: where it is, its format, and what its ratings mean."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from bco_lightning.batch import LeftOut
from bco_lightning.data.feedback_row import Columns, shown, value_at
from bco_lightning.data.readers.remote import public_name
from bco_lightning.errors import ConfigError, FeedbackRowError, check_choice

FormatName = Literal[
    "auto", "unpaired", "paired", "open_webui", "langfuse", "langsmith", "argilla", "chainlit", "chitchat"
]
LossOn = Literal["rated_turn", "all_turns"]
NO_FEEDBACK = "no feedback"
BETWEEN = "rating between thumbs-up and thumbs-down"
UNTOUCHED = "rating left at its default"
_MISSING = object()


@dataclass
class Rating:
    """The rule that makes thumbs of numbers.

    Args:
        column: Name of the rating, such as ``helpfulness``; if left out, the label's own column is rated.
        up: Least rating that is thumbs-up. Scales differ, so it has to be given.
        down: Largest rating that is thumbs-down; rows between the two are left out and counted. It has to be given.
        untouched: Ratings as they are before anyone has touched them; a row in which all of these stand is left out
            and counted.

    Raises:
        ConfigError: If ``up`` or ``down`` is not given, or ``down`` is not below ``up``.
    """

    column: str | None = None
    up: float | None = None
    down: float | None = None
    untouched: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        up, down = self._limits()
        if not down < up:
            raise ConfigError("data.rating", f"expected down below up, found {down:g} and {up:g}.")

    def _limits(self) -> tuple[float, float]:
        if self.up is None or self.down is None:
            missing = " and ".join(name for name in ("up", "down") if getattr(self, name) is None)
            raise ConfigError(
                "data.rating",
                f"expected both up and down, found no {missing}.",
                "Say which ratings are thumbs-up and which thumbs-down, for instance {column: stars, up: 4, down: 2}.",
            )
        return self.up, self.down

    def thumbs_up(self, ratings: Mapping[str, Any], column: str, place: str) -> bool | LeftOut:
        """Applies the rule.

        Args:
            ratings: Every rating of the row, by name.
            column: The one to go by if the rule names none.
            place: File and line.

        Returns:
            Whether it is thumbs-up, or that the row is left out; a rating that is null or an empty cell is no feedback.

        Raises:
            FeedbackRowError: If there is no such rating, or it is no finite number.

        Example:
            >>> rule = Rating("helpfulness", up=4, down=2)
            >>> [rule.thumbs_up({"helpfulness": value}, "label", "log.jsonl:1") for value in (4, 1.5)]
            [True, False]
            >>> rule.thumbs_up({"helpfulness": 3}, "label", "log.jsonl:1")
            LeftOut(place='log.jsonl:1', reason='rating between thumbs-up and thumbs-down')
        """
        if self.untouched and all(value_at(ratings, name) == value for name, value in self.untouched.items()):
            return LeftOut(place, UNTOUCHED)
        name = self.column or column
        value = value_at(ratings, name, _MISSING)
        if value is _MISSING:
            raise FeedbackRowError(
                place, f"expected a rating {name!r}, found none.", "Name the column by data.rating.column."
            )
        if value is None or (isinstance(value, str) and not value.strip()):
            return LeftOut(place, NO_FEEDBACK)
        # Comparing is exact, where math.isfinite fails on an integer beyond all floats.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise FeedbackRowError(place, f"expected a number as rating {name!r}, found {shown(value)}.")
        up, down = self._limits()
        if down < value < up:
            return LeftOut(place, BETWEEN)
        return value >= up


# HelpSteer2 as the paper uses it: of 0 to 4, only a helpfulness of 4 is thumbs-up (arXiv 2404.04656, section 4).
RATING_PRESETS = {"helpsteer2": Rating("helpfulness", up=4, down=3)}


@dataclass
class Source:
    """One feedback log of several.

    Args:
        path: A file, a glob, a URL of fsspec such as ``s3://bucket/*.jsonl``, ``package:NAME/path`` or
            ``hub:OWNER/NAME@SPLIT``.
        name: Under which its rows are counted and measured; the path if left out, of a URL without its query.
        weight: Passes over its rows in one epoch: 2 shows each row twice, 0.5 half of the rows, the other half next.
        format: What its records are; that of ``data.format`` if left out.
        columns: Names of its columns; those of ``data.columns`` if left out.
        rating: The rule for its ratings, or a preset's name; that of ``data.rating`` if left out.

    Raises:
        ConfigError: If there is no path, the weight is not above 0, or the format is unknown.
    """

    path: str
    name: str | None = None
    weight: float = 1.0
    format: FormatName | None = None
    columns: Columns | None = None
    rating: Rating | str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("data", "expected a path or URL of each feedback log, found an empty one.")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError(
                "data.train_files", f"expected a weight above 0 for {public_name(self.path)!r}, found {self.weight}."
            )
        if self.format is not None:
            check_choice("data.format", self.format, get_args(FormatName))

    @property
    def label(self) -> str:
        """The name that its rows go by."""
        return self.name or public_name(self.path)


@dataclass(frozen=True)
class RowFormat:
    """How the records of a source become rows.

    Args:
        format: What they are; ``auto`` goes by the first record.
        columns: Names of the columns.
        rating: The rule for ratings; ``None`` where labels are thumbs.
        loss_on: The rated assistant turn alone, or all assistant turns of the conversation.

    Raises:
        ConfigError: If there is no such format or choice of turns, or both a rule and a map say what labels mean.
    """

    format: FormatName = "auto"
    columns: Columns = field(default_factory=Columns)
    rating: Rating | None = None
    loss_on: LossOn = "rated_turn"

    def __post_init__(self) -> None:
        check_choice("data.format", self.format, get_args(FormatName))
        check_choice("data.loss_on", self.loss_on, get_args(LossOn))
        if self.rating is not None and self.columns.thumbs:
            raise ConfigError(
                "data.rating",
                "expected either data.rating or data.columns.thumbs for one source, found both.",
                "Keep the one that says what its labels mean; of several sources, each can have its own.",
            )


def chosen_rating(rating: Rating | str | None) -> Rating | None:
    """The rule itself, or the preset of that name.

    Raises:
        ConfigError: If there is no such preset.
    """
    if not isinstance(rating, str):
        return rating
    if rating not in RATING_PRESETS:
        raise ConfigError("data.rating", f"expected a rule or one of {', '.join(RATING_PRESETS)}, found {rating!r}.")
    return RATING_PRESETS[rating]
