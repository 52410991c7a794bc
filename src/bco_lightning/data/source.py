"""How the records of a source become rows, and what its ratings mean."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from bco_lightning.batch import LeftOut
from bco_lightning.data.feedback_row import Columns, shown, value_at
from bco_lightning.data.options import FormatName, LossOn, Rating, Source, chosen_rating
from bco_lightning.errors import ConfigError, FeedbackRowError, check_choice

__all__ = ["FormatName", "LossOn", "Rating", "RowFormat", "Source", "chosen_rating", "thumb_by_rule"]

NO_FEEDBACK = "no feedback"
BETWEEN = "rating between thumbs-up and thumbs-down"
UNTOUCHED = "rating left at its default"
_MISSING = object()


def thumb_by_rule(rule: Rating, ratings: Mapping[str, Any], column: str, place: str) -> bool | LeftOut:
    """Applies the rule of ratings to a row.

    Args:
        rule: The rule.
        ratings: Every rating of the row, by name.
        column: The one to go by if the rule names none.
        place: File and line.

    Returns:
        Whether it is thumbs-up, or that the row is left out; a rating that is null or an empty cell is no feedback.

    Raises:
        FeedbackRowError: If there is no such rating, or it is no finite number.

    Example:
        >>> rule = Rating("helpfulness", up=4, down=2)
        >>> [thumb_by_rule(rule, {"helpfulness": value}, "label", "log.jsonl:1") for value in (4, 1.5)]
        [True, False]
        >>> thumb_by_rule(rule, {"helpfulness": 3}, "label", "log.jsonl:1")
        LeftOut(place='log.jsonl:1', reason='rating between thumbs-up and thumbs-down')
    """
    if rule.untouched and all(value_at(ratings, name) == value for name, value in rule.untouched.items()):
        return LeftOut(place, UNTOUCHED)
    name = rule.column or column
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
    up, down = rule.limits
    if down < value < up:
        return LeftOut(place, BETWEEN)
    return value >= up


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
