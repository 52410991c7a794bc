"""Labels of one closed vocabulary, of a map or under a rule are thumbs; anything else is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bco_lightning.batch import LeftOut
from bco_lightning.data.labels import LabelVocabulary, thumb_by_rule
from bco_lightning.data.options import Columns, Rating, Source
from bco_lightning.data.presets import PRESETS
from bco_lightning.data.rows import RowFormat, RowMaker
from bco_lightning.errors import ConfigError, FeedbackRowError

BETWEEN = LeftOut("x:1", "rating between thumbs-up and thumbs-down")


def thumb(rule: Rating, **ratings: Any) -> bool | LeftOut:
    return thumb_by_rule(rule, ratings, "label", "x:1")


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (True, False), (1, 0), (1, -1), ("up", "down"), ("true", "false"), ("True", "False"), ("TRUE", "FALSE"),
        ("👍", "👎"), (1.0, 0.0), (1.0, -1.0), (1, 0.0), (1.0, -1),
    ],
)  # fmt: skip
def test_each_vocabulary_is_understood(up: Any, down: Any) -> None:
    labels = LabelVocabulary()
    assert [labels.thumbs_up(value, "here") for value in (up, down, up)] == [True, False, True]


def test_a_mixture_of_two_vocabularies_is_refused() -> None:
    for first, second in [(True, 1), (0, -1), (1, "up"), ("up", "true"), ("👍", False), (-1, 0), (1, True)]:
        labels = LabelVocabulary()
        labels.thumbs_up(first, "x:1")
        with pytest.raises(
            FeedbackRowError, match=r"x:2: label .* two vocabularies; labels so far were .*data\.columns"
        ):
            labels.thumbs_up(second, "x:2")
        labels.thumbs_up(first, "x:3")


def test_a_label_can_mean_that_the_row_is_left_out() -> None:
    labels = LabelVocabulary({"1": "down", "3": "drop", "5": "up", "null": "drop"})
    assert [labels.thumbs_up(value, "x:1") for value in (5, 1, "5")] == [True, False, True]
    assert labels.thumbs_up(3, "x:2") == labels.thumbs_up(None, "x:2") == LeftOut("x:2", "label mapped to drop")
    with pytest.raises(
        FeedbackRowError, match=r'one of data\.columns\.thumbs \("1", "3", "5", "null"\), found true\. .*all'
    ):
        labels.thumbs_up(True, "x:3")


def test_labels_can_only_mean_up_down_and_drop() -> None:
    with pytest.raises(ConfigError, match=r"data\.columns\.thumbs: expected up, down or drop for '3', found 'skip'"):
        Columns(thumbs={"3": "skip"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("value", "meaning"),
    [(5, True), (4, True), (3.99, BETWEEN), (2.01, BETWEEN), (2, False), (-1, False), (1e300, True)],
)
def test_both_thresholds_belong_to_their_thumb(value: float, meaning: bool | LeftOut) -> None:
    assert thumb(Rating(up=4, down=2), label=value) == meaning


def test_the_rule_names_the_rating_that_counts() -> None:
    assert thumb(Rating("helpfulness", up=4, down=3), helpfulness=4, label=1) is True
    assert thumb(Rating(up=4, down=3), helpfulness=4, label=1) is False
    assert thumb(Rating("scores.tone", up=4, down=3), scores={"tone": 1}) is False


def test_only_rows_in_which_nothing_was_touched_are_left_out() -> None:
    rule = Rating("a", up=5, down=4, untouched={"a": 5, "b": 5})
    assert thumb(rule, a=5, b=5.0, c=1) == LeftOut("x:1", "rating left at its default")
    assert thumb(rule, a=5, b=4) is True
    assert thumb(rule, a=5) is True


@pytest.mark.parametrize(
    ("label", "rule"), [(4, "{up: 4, down: 3}"), ("4.5", "{up: 4.5, down: 3.5}"), (0.7, "down: 0.6}")]
)
def test_a_rating_without_a_rule_is_told_of_one_with_its_own_value(label: Any, rule: str) -> None:
    with pytest.raises(FeedbackRowError, match=rf"set data\.rating, for instance .*{re.escape(rule)}"):
        LabelVocabulary().thumbs_up(label, "x:1")


@pytest.mark.parametrize(("stars", "up"), [("4", "4"), ("4,5", "4.5")])
def test_stars_in_a_column_of_another_name_are_told_of_a_rule_that_names_it(stars: str, up: str) -> None:
    maker = RowMaker(RowFormat())
    maker.format = "unpaired"
    maker.rows({"prompt": "q", "completion": "a", "id": 1234, "stars": stars}, "x:1")
    with pytest.raises(FeedbackRowError, match=rf"If 'stars' is a rating, set data\.rating, .*: stars, up: {up}, "):
        maker.check_rated()


def test_decimal_commas_are_told_to_be_points() -> None:
    with pytest.raises(FeedbackRowError, match=r'found "4,5"\. Write numbers with a decimal point: 4\.5, not 4,5'):
        thumb(Rating(up=4, down=3), label="4,5")
    with pytest.raises(FeedbackRowError, match="Write numbers with a decimal point"):
        LabelVocabulary().thumbs_up("4,5", "x:1")


@pytest.mark.parametrize("value", [True, "5", [5], {}, float("nan"), float("inf"), 10**309, -(10**309)])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(FeedbackRowError, match=r"^x:1: expected a number as rating 'label', found "):
        thumb(Rating(up=4, down=3), label=value)


@pytest.mark.parametrize("value", [None, "", " "])
def test_a_label_or_rating_that_was_not_given_is_no_feedback(value: Any) -> None:
    nothing = LeftOut("x:1", "no feedback")
    assert thumb(Rating(up=4, down=2), label=value) == thumb(Rating("tone", up=4, down=3), label=5) == nothing
    assert LabelVocabulary().thumbs_up(value, "x:1") == nothing
    assert LabelVocabulary({"1": "up", "0": "down"}).thumbs_up(value, "x:1") == nothing


def test_whole_numbers_of_a_column_of_floats_have_the_meaning_of_integers_in_a_map() -> None:
    labels = LabelVocabulary({"1": "up", "0": "down", "2.0": "drop"})
    assert [labels.thumbs_up(value, "x:1") for value in (1.0, 0.0)] == [True, False]
    assert labels.thumbs_up(2.0, "x:1") == LeftOut("x:1", "label mapped to drop")


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ({}, "expected both up and down, found no up and down"),
        ({"up": 4.0}, "expected both up and down, found no down"),
        ({"up": 3.0, "down": 3.0}, "expected down below up"),
        ({"up": float("nan"), "down": 1.0}, "expected down below up"),
    ],
)
def test_limits_of_a_rule_are_given_and_divide(limits: dict[str, float], found: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.rating: {found}"):
        Rating("stars", **limits)


def test_a_rule_and_a_map_of_labels_are_not_both_taken() -> None:
    with pytest.raises(ConfigError, match=r"expected either data\.rating or data\.columns\.thumbs .*, found both"):
        RowFormat(columns=Columns(thumbs={"5": "down"}), rating=Rating(up=4, down=2))


def test_helpsteer2_takes_full_helpfulness_alone_for_a_thumb_up() -> None:
    rule = Rating(**PRESETS["helpsteer2"]["rating"])
    assert [thumb(rule, helpfulness=value) for value in (0, 3, 4)] == [False, False, True]


def test_of_ranks_1_is_the_best() -> None:
    rule = Rating("rank", up=2, down=5)
    assert [thumb(rule, rank=value) for value in (1, 2, 5, 6)] == [True, True, False, False]
    assert thumb(rule, rank=3) == BETWEEN
    with pytest.raises(ConfigError, match="expected up below down, as 1 is the best rank, found 2 as down and 5 as up"):
        Rating("answer.rank", up=5, down=2)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_above_0(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"expected a weight above 0 for 'https://host/a\.jsonl', found") as caught:
        Source("https://me:word@host/a.jsonl?token=sesame", weight=weight)
    assert not any(secret in str(caught.value) for secret in ("word", "sesame"))
