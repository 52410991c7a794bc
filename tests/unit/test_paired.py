"""A pair is two rows, the chosen answer and right after it the rejected one."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.options import Columns, Rating
from bco_lightning.data.rows import RowFormat
from bco_lightning.errors import ConfigError, FeedbackRowError
from tests.unit.made_rows import made


def turn(role: str, content: str = "...") -> dict[str, Any]:
    return {"role": role, "content": content}


ASKED = [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
BETTER, WORSE = [*ASKED, turn("assistant", "good")], [*ASKED, turn("assistant", "bad")]


def two(record: dict[str, Any], options: RowFormat | None = None) -> tuple[FeedbackRow, FeedbackRow]:
    better, worse = made(record, options)
    assert isinstance(better, FeedbackRow)
    assert isinstance(worse, FeedbackRow)
    return better, worse


def test_texts_with_a_prompt_are_two_rows_of_it() -> None:
    better, worse = two({"prompt": "a", "chosen": "good", "rejected": "bad"})
    assert better.prompt == worse.prompt == [turn("user", "a")]
    assert (better.completion, worse.completion) == ([turn("assistant", "good")], [turn("assistant", "bad")])
    assert (better.thumbs_up, worse.thumbs_up) == (True, False)
    assert better.place == worse.place == "x:1"


def test_messages_with_a_prompt_of_messages_are_understood() -> None:
    better, worse = two({"prompt": ASKED, "chosen": BETTER[-1:], "rejected": WORSE[-1:]})
    assert better.prompt == worse.prompt == ASKED
    assert worse.completion == WORSE[-1:]


@pytest.mark.parametrize("prompt", [None, "a", "c", ASKED, ASKED[1:], ASKED[:1]])
def test_what_whole_conversations_begin_with_is_the_prompt(prompt: Any) -> None:
    better, worse = two({"prompt": prompt, "chosen": BETTER, "rejected": WORSE})
    assert better.prompt == worse.prompt == ASKED
    assert (better.completion, worse.completion) == (BETTER[-1:], WORSE[-1:])


def test_a_system_prompt_in_a_column_of_its_own_comes_first() -> None:
    better, _ = two({"prompt": ASKED[:1], "chosen": BETTER[1:], "rejected": WORSE[1:]})
    assert better.prompt == ASKED


def test_conversations_may_part_before_their_last_turn() -> None:
    rejected = [*ASKED[:2], turn("assistant", "bad"), turn("user"), turn("assistant", "worse")]
    better, worse = two({"chosen": BETTER, "rejected": rejected})
    assert better.prompt == worse.prompt == ASKED[:2]
    assert (better.completion, worse.completion) == (BETTER[2:], rejected[2:])


def test_all_turns_begin_with_the_first_answer() -> None:
    better, worse = two({"chosen": BETTER, "rejected": WORSE}, RowFormat(loss_on="all_turns"))
    assert (better.prompt, better.completion) == (BETTER[:2], BETTER[2:])
    assert worse.completion == WORSE[2:]


@pytest.mark.parametrize(
    "record", [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"chosen": BETTER, "rejected": BETTER}]
)
def test_two_answers_that_are_the_same_are_both_left_out(record: dict[str, Any]) -> None:
    assert made(record) == [LeftOut("x:1", "both answers are the same")] * 2


def test_columns_can_be_renamed_and_nested() -> None:
    options = RowFormat(columns=Columns(prompt="q", chosen="pair.win", rejected="pair.lose"))
    better, worse = two({"q": "a", "pair": {"win": "good", "lose": "bad"}}, options)
    assert (better.completion[0]["content"], worse.completion[0]["content"]) == ("good", "bad")


def test_labels_of_a_pair_need_no_vocabulary() -> None:
    better, worse = two(
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        RowFormat(columns=Columns(thumbs={"good": "up", "bad": "down"})),
    )
    assert (better.thumbs_up, worse.thumbs_up) == (True, False)


def test_tools_are_for_both() -> None:
    better, worse = two({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "f"}]})
    assert better.tools == worse.tools == [{"name": "f"}]


def test_a_rule_of_ratings_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.rating: expected no rule of ratings for pairs, found one"):
        made({"prompt": "a", "chosen": "b", "rejected": "c"}, RowFormat(rating=Rating("score", up=4, down=3)))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": BETTER, "rejected": BETTER[1:]}, "part at an answer of the assistant, found them part at another"),
        ({"chosen": BETTER, "rejected": ASKED[:3]}, "part at an answer of the assistant, found one that goes on where"),
        ({"chosen": BETTER, "rejected": [*ASKED[:3], turn("user", "x"), turn("assistant")]}, "part at another message"),
        ({"prompt": "x", "chosen": BETTER, "rejected": WORSE}, "'prompt' to be a message of the conversations, found"),
        ({"chosen": [*BETTER, turn("user")], "rejected": WORSE}, "must begin and end with an assistant message"),
        ({"chosen": BETTER[-1:], "rejected": WORSE}, "part at another message"),
        ({"chosen": [*BETTER, BETTER[-1]], "rejected": [*BETTER, WORSE[-1]]}, "assistant messages, found two in a row"),
    ],
)
def test_a_malformed_pair_gives_one_error_and_no_row(record: dict[str, Any], message: str) -> None:
    [error] = made(record, RowFormat("paired"))
    assert isinstance(error, FeedbackRowError)
    assert re.search(message, str(error))
