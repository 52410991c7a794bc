"""Answers that are compared or ranked become rows with the thumbs that the comparison says, and never others."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.options import Columns, DataOptions, PresetName, Rating, Source
from bco_lightning.data.presets import PRESETS
from bco_lightning.data.row_sets import row_format_of
from bco_lightning.data.rows import RowFormat, RowMaker
from bco_lightning.errors import ConfigError, FeedbackRowError
from tests.unit.made_rows import made

UP_DOWN, DOWN_UP, BOTH_DOWN, BOTH_UP = (True, False), (False, True), (False, False), (True, True)


def turn(role: str, content: str = "a") -> dict[str, Any]:
    return {"role": role, "content": content}


def thumbs(record: dict[str, Any], *, labelled: bool = True, **options: Any) -> tuple[Any, ...] | str:
    """The thumbs of the rows of a record, why it has none, or what is wrong with it."""
    columns = Columns(**options.pop("columns", {}))
    outcomes = made(record, RowFormat(columns=columns, **options), labelled)
    if any(isinstance(outcome, FeedbackRowError) for outcome in outcomes):
        return str(outcomes[-1])
    reasons = {outcome.reason for outcome in outcomes if isinstance(outcome, LeftOut)}
    return " and ".join(reasons) or tuple(row.thumbs_up for row in outcomes if isinstance(row, FeedbackRow))


ARENA = {"prompt": "q", "response_a": "x", "response_b": "y"}
STEER = {"prompt": "q", "response1": "x", "response2": "y"}
SAFE = {"prompt": "q", "response_0": "x", "response_1": "y"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({**ARENA, "winner": "model_a"}, UP_DOWN), ({**ARENA, "winner": "model_b"}, DOWN_UP),
        ({**ARENA, "winner": "tie (bothbad)"}, BOTH_DOWN), ({**ARENA, "winner": "both_bad"}, BOTH_DOWN),
        ({**ARENA, "winner": "tie"}, "no answer is better"), ({**ARENA, "winner": None}, "no feedback"),
        ({**ARENA, "winner": " "}, "no feedback"),
        ({**ARENA, "response_b": "x", "winner": "tie"}, "no answer is better"),
        ({**ARENA, "response_b": "x", "winner": "model_a"}, "both answers are the same"),
        *(({**STEER, "overall_preference": said}, UP_DOWN) for said in (-3, -1, -2.0)),
        *(({**STEER, "overall_preference": said}, DOWN_UP) for said in (1, 3)),
        ({**STEER, "overall_preference": 0}, "no answer is better"),
        ({**SAFE, "better_response_id": 0}, UP_DOWN), ({**SAFE, "better_response_id": 1.0}, DOWN_UP),
    ],
)  # fmt: skip
def test_what_compares_two_answers_says_their_thumbs(record: dict[str, Any], expected: Any) -> None:
    assert thumbs(record) == expected


@pytest.mark.parametrize(
    ("winner", "winners", "expected"),
    [
        ("tie", {"tie": "both"}, BOTH_UP), ("model_a", {"tie": "both"}, UP_DOWN),
        ("left", {"left": "first", "right": "second"}, UP_DOWN), (2, {"1": "first", "2": "second"}, DOWN_UP),
        (1.0, {"1": "neither"}, BOTH_DOWN), ("unsure", {"unsure": "drop"}, "label mapped to drop"),
        (True, {"true": "first", "false": "second"}, UP_DOWN), ("", {"": "neither"}, BOTH_DOWN),
    ],
)  # fmt: skip
def test_other_words_and_numbers_mean_what_an_option_says(winner: Any, winners: dict[str, str], expected: Any) -> None:
    record = {"prompt": "q", "left": "x", "right": "y", "vote": winner}
    columns = {"first": "left", "second": "right", "winner": "vote", "winners": winners}
    assert thumbs(record, columns=columns) == expected


@pytest.mark.parametrize("vote", [1, 0, -1, "left", True, [1], float("nan"), 10**400])
def test_a_comparison_that_nobody_explained_is_refused_with_the_option_that_explains_it(vote: Any) -> None:
    columns = {"first": "left", "second": "right", "winner": "vote"}
    told = thumbs({"prompt": "q", "left": "x", "right": "y", "vote": vote}, columns=columns)
    assert "x:1: 'vote' must be one of model_a, model_b, tie" in told
    assert "data.columns.winners" in told


def test_numbers_of_ids_and_preferences_are_told_apart_by_their_names() -> None:
    assert thumbs({**SAFE, "safer_response_id": 0}, columns={"winner": "safer_response_id"}) == UP_DOWN
    assert "must be one of" in thumbs({**SAFE, "better_response_id": 2})
    assert "must be one of" in thumbs({**SAFE, "better_response_id": -1})


def test_each_answer_may_have_a_label_or_a_rating_of_its_own() -> None:
    columns = {"winner": ["safe_0", "safe_1"]}
    for labels in ((True, True), (False, False), (True, False)):
        assert thumbs({**SAFE, "safe_0": labels[0], "safe_1": labels[1]}, columns=columns) == labels
    assert thumbs(
        {**SAFE, "safe_0": "ok", "safe_1": "no"}, columns={**columns, "thumbs": {"ok": "up", "no": "down"}}
    ) == (UP_DOWN)
    rated = {**SAFE, "safe_0": 2, "safe_1": 5}
    assert thumbs(rated, columns=columns, rating=Rating(up=4, down=2)) == DOWN_UP
    outcomes = made({**SAFE, "safe_0": True, "safe_1": None}, RowFormat(columns=Columns(**columns)))
    assert [getattr(outcome, "reason", "row") for outcome in outcomes] == ["row", "no feedback"]


def test_a_rule_does_not_go_with_one_comparison() -> None:
    with pytest.raises(ConfigError, match=r"^data\.rating: expected no rule of ratings for pairs"):
        thumbs({**ARENA, "winner": "model_a"}, rating=Rating(up=4, down=2))


def test_conversations_part_where_something_else_is_said_whatever_is_kept_beside_it() -> None:
    one = [turn("user", "q"), turn("assistant", "x")]
    other = [{**turn("user", "q"), "num_tokens": 4}, {**turn("assistant", "y"), "num_tokens": 5}]
    better, worse = made({"conversation_a": one, "conversation_b": other, "winner": "model_a"})
    assert isinstance(better, FeedbackRow)
    assert isinstance(worse, FeedbackRow)
    assert better.prompt == worse.prompt == one[:1]
    assert thumbs({"chosen": one, "rejected": [other[0], {**one[1], "num_tokens": 5}]}) == "both answers are the same"


@pytest.mark.parametrize(
    "record", [{**ARENA, "winner": None}, {**ARENA, "winner": "tie"}, {**ARENA, "winner": 7}], ids=str
)
def test_answers_to_be_scored_need_no_winner_and_get_no_thumb_that_nobody_gave(record: dict[str, Any]) -> None:
    assert thumbs(record, labelled=False) == (None, None)
    assert thumbs({**record, "winner": "model_b"}, labelled=False) == DOWN_UP


# --- ranks


def ranked(*ranks: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": "q", "answers": [{"answer": f"{at}", "rank": rank} for at, rank in enumerate(ranks)], **more}


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((1, 2), UP_DOWN), ((2, 1), DOWN_UP), ((1.0, 7.0), UP_DOWN), ((1, 1, 3), (True, True, False)),
        ((1, 2, 3), "answer between the best and the worst"), ((1, 1), "no feedback"), ((1,), "no feedback"),
        ((None, None), "no feedback"), ((), "no feedback"), ((True, "x"), "no feedback"),
    ],
)  # fmt: skip
def test_the_best_and_the_worst_rank_are_thumbs(ranks: tuple[Any, ...], expected: Any) -> None:
    assert thumbs(ranked(*ranks), format="ranked") == expected


def test_ranks_and_ratings_of_answers_follow_a_rule() -> None:
    assert thumbs(ranked(1, 2, 5, 6), rating=Rating("rank", up=2, down=5)) == (True, True, False, False)
    record = {"prompt": "q", "completions": [{"response": "x", "stars": 5}, {"response": "y", "stars": 1}]}
    assert thumbs(record, columns={"answers": "completions"}, rating=Rating("stars", up=4, down=2)) == UP_DOWN
    assert thumbs(record, columns={"answers": "completions", "label": "stars", "thumbs": {"5": "up", "1": "down"}}) == (
        UP_DOWN
    )


def test_ranked_answers_to_be_scored_are_all_rows() -> None:
    assert thumbs(ranked(1, 2, 3), labelled=False) == (True, None, False)
    assert thumbs(ranked(None), labelled=False) == (None,)


def test_one_message_of_a_tree_is_refused_with_the_file_to_read() -> None:
    message = {"message_id": "m", "parent_id": None, "message_tree_id": "m", "text": "q", "role": "prompter"}
    assert "expected a tree of messages, found one message of a tree. Read the file with whole trees" in thumbs(message)


def test_a_conversation_goes_on_with_the_answer_that_was_chosen() -> None:
    def answer(number: int, content: str, *, chosen: bool) -> dict[str, Any]:
        return {"turn": number, "role": "model", "content": content, "if_chosen": chosen}

    turns = [
        {"turn": 0, "role": "user", "content": "q"}, answer(0, "x", chosen=False), answer(0, "y", chosen=True),
        {"turn": 1, "role": "user", "content": "r"}, answer(1, "z", chosen=True),
    ]  # fmt: skip
    rows = made({"conversation_history": turns})
    said = [[message["content"] for message in row.prompt + row.completion] for row in rows]  # type: ignore[union-attr]
    assert said == [["q", "x"], ["q", "y"], ["q", "y", "r", "z"]]


# --- what all formats of rows have in common

SHAPES: dict[str, dict[str, Any]] = {
    "unpaired": {"prompt": "q", "completion": "x", "label": 1},
    "paired": {"prompt": "q", "chosen": "x", "rejected": "y"},
    "compared": {**ARENA, "winner": "model_a"},
    "two labels": {**SAFE, "safe_0": 1, "safe_1": 0},
    "ranked": ranked(1, 2),
}


@pytest.mark.parametrize(("name", "record"), SHAPES.items(), ids=SHAPES)
def test_system_prompt_and_history_lead_and_what_is_not_used_is_named_once(name: str, record: dict[str, Any]) -> None:
    columns = Columns(history="before", winner=["safe_0", "safe_1"] if name == "two labels" else None)
    maker = RowMaker(RowFormat(columns=columns))
    before = [turn("user", "hello"), turn("assistant", "hi")]
    given = {**record, "system": "Be brief.", "before": before, "user_id": "u", "tags": ["t"]}
    for place, same in maker.learn(iter([("x:1", given), ("x:2", given)])):
        for row in maker.rows(same, place):
            assert isinstance(row, FeedbackRow)
            assert row.prompt == [turn("system", "Be brief."), *before, turn("user", "q")]
    assert (maker.systems, maker.unused) == (["system"], ["user_id", "tags"])


def test_a_missing_column_is_named_with_its_option() -> None:
    assert "data.columns.prompt." in thumbs({"question": "q", "chosen": "x", "rejected": "y"})
    assert "data.columns.first, second and winner." in thumbs({"response_a": "x"}, format="compared")


# --- presets


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"user_input": "q", "model_output": "x", "toxicity": 0}, "toxic_chat"),
        (
            {"input": {"messages": [], "tools": []}, "preferred_output": [], "non_preferred_output": []},
            "openai_preference",
        ),
    ],
)
def test_a_data_set_that_is_recognized_is_named_where_a_column_is_missing(record: dict[str, Any], name: str) -> None:
    assert thumbs(record).endswith(
        f"or set data.columns.prompt and data.columns.completion. It looks like data.preset: {name}."
    )
    assert "preset" not in thumbs({"question": "q", "history": [], "label": 1})


def test_what_is_set_counts_more_than_the_preset() -> None:
    for options, source in (
        (DataOptions(preset="wildfb", columns=Columns(system="told")), Source("x")),
        (DataOptions(columns=Columns(prompt="q")), Source("x", preset="wildfb", columns=Columns(system="told"))),
    ):
        known = row_format_of(options, source)
        assert (known.columns, known.rating) == (Columns(system="told", history="history"), Rating("label", 3, 2))
    rule = Rating("helpfulness", up=3, down=2)
    assert row_format_of(DataOptions(preset="helpsteer2"), Source("x", rating=rule)).rating == rule
    assert row_format_of(DataOptions(preset="toxic_chat", format="compared"), Source("x")).format == "compared"


def test_a_source_of_another_data_set_is_not_read_by_the_preset_of_all() -> None:
    known = row_format_of(DataOptions(preset="toxic_chat"), Source("x", preset="helpsteer2"))
    assert (known.format, known.columns, known.rating) == (
        "auto",
        Columns(),
        Rating("helpfulness", up=4, down=3, scale=(0, 4)),
    )


def test_an_unknown_preset_is_refused_by_the_names_there_are() -> None:
    assert set(get_args(PresetName)) == set(PRESETS)
    for make in (lambda: DataOptions(preset="helpsteer"), lambda: Source("x", preset="helpsteer")):
        with pytest.raises(
            ConfigError, match=r"^data\.preset: expected helpsteer2 or llava_rlhf or openai_.*found 'helpsteer'"
        ):
            make()
