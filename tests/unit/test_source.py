"""A rule makes thumbs of ratings, or says why a row is left out."""

from __future__ import annotations

from typing import Any

import pytest

from bco_lightning.batch import LeftOut
from bco_lightning.data.feedback_row import Columns
from bco_lightning.data.options import RATING_PRESETS, Rating, Source, chosen_rating
from bco_lightning.data.source import RowFormat, thumb_by_rule
from bco_lightning.errors import ConfigError, FeedbackRowError

BETWEEN = LeftOut("x:1", "rating between thumbs-up and thumbs-down")
UNTOUCHED = LeftOut("x:1", "rating left at its default")


def thumb(rule: Rating, **ratings: Any) -> bool | LeftOut:
    return thumb_by_rule(rule, ratings, "label", "x:1")


@pytest.mark.parametrize(
    ("value", "meaning"),
    [(5, True), (4, True), (3.99, BETWEEN), (2.01, BETWEEN), (2, False), (-1, False), (1e300, True)],
)
def test_both_thresholds_belong_to_their_thumb(value: float, meaning: bool | LeftOut) -> None:
    assert thumb(Rating(up=4, down=2), label=value) == meaning


def test_the_rule_names_the_rating_that_counts() -> None:
    assert thumb(Rating("helpfulness", up=4, down=3), helpfulness=4, label=1) is True
    assert thumb(Rating(up=4, down=3), helpfulness=4, label=1) is False


def test_a_rating_can_stand_in_an_object() -> None:
    assert thumb(Rating("scores.tone", up=4, down=3), scores={"tone": 1}) is False


def test_only_rows_in_which_nothing_was_touched_are_left_out() -> None:
    rule = Rating("a", up=5, down=4, untouched={"a": 5, "b": 5})
    assert thumb(rule, a=5, b=5) == UNTOUCHED
    assert thumb(rule, a=5, b=5.0, c=1) == UNTOUCHED
    assert thumb(rule, a=5, b=4) is True
    assert thumb(rule, a=5) is True


@pytest.mark.parametrize("value", [True, "5", [5], {}, float("nan"), float("inf"), 10**309, -(10**309)])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(FeedbackRowError, match=r"^x:1: expected a number as rating 'label', found "):
        thumb(Rating(up=4, down=3), label=value)


@pytest.mark.parametrize("value", [None, "", " "])
def test_a_rating_that_was_not_given_is_no_feedback(value: Any) -> None:
    assert thumb(Rating(up=4, down=2), label=value) == LeftOut("x:1", "no feedback")


@pytest.mark.parametrize(("limits", "missing"), [({}, "up and down"), ({"up": 4.0}, "down"), ({"down": 3.0}, "up")])
def test_no_limit_of_a_rule_is_guessed(limits: dict[str, float], missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.rating: expected both up and down, found no {missing}\. "):
        Rating("stars", **limits)


def test_a_rule_and_a_map_of_labels_are_not_both_taken() -> None:
    with pytest.raises(ConfigError, match=r"expected either data\.rating or data\.columns\.thumbs .*, found both"):
        RowFormat(columns=Columns(thumbs={"5": "down"}), rating=Rating(up=4, down=2))


def test_a_rating_that_is_not_there_is_named() -> None:
    with pytest.raises(FeedbackRowError, match=r"expected a rating 'tone', found none\. Name .* data\.rating\.column"):
        thumb(Rating("tone", up=4, down=3), label=5)


@pytest.mark.parametrize(("up", "down"), [(3, 3), (2, 4), (float("nan"), 1)])
def test_thresholds_that_overlap_are_refused(up: float, down: float) -> None:
    with pytest.raises(ConfigError, match=r"^data\.rating: expected down below up"):
        Rating(up=up, down=down)


@pytest.mark.parametrize(("helpfulness", "meaning"), [(0, False), (3, False), (4, True)])
def test_helpsteer2_takes_full_helpfulness_alone_for_a_thumb_up(helpfulness: int, meaning: bool) -> None:
    assert thumb_by_rule(RATING_PRESETS["helpsteer2"], {"helpfulness": helpfulness}, "label", "x:1") is meaning


def test_a_preset_is_chosen_by_name() -> None:
    rule = Rating("tone", up=4, down=3)
    assert chosen_rating(rule) is rule
    assert chosen_rating(None) is None
    assert chosen_rating("helpsteer2") is RATING_PRESETS["helpsteer2"]
    with pytest.raises(ConfigError, match=r"^data\.rating: expected a rule or one of helpsteer2, found 'helpsteer3'"):
        chosen_rating("helpsteer3")


def test_a_source_goes_by_its_name_or_its_path() -> None:
    assert Source("a.jsonl").label == "a.jsonl"
    assert Source("a.jsonl", name="web").label == "web"


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_above_0(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"expected a weight above 0 for 'a\.jsonl', found"):
        Source("a.jsonl", weight=weight)


def test_a_bad_weight_does_not_show_what_grants_access() -> None:
    with pytest.raises(ConfigError, match=r"for 'https://host/a\.jsonl', found 0") as caught:
        Source("https://me:word@host/a.jsonl?token=sesame", weight=0)
    assert "word" not in str(caught.value)
    assert "sesame" not in str(caught.value)
