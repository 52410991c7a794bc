"""Every layout of a feedback log is told from the others, and every record of it is accounted for."""

from __future__ import annotations

import json
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.feedback_beside import FeedbackBeside
from bco_lightning.data.formats import FORMATS, format_of
from bco_lightning.data.formats.exports import DIFY_KEEPS, TEMPLATED
from bco_lightning.data.formats.rated_calls import FAILED
from bco_lightning.data.formats.record_format import UNFINISHED
from bco_lightning.data.formats.turns import WITH_TOOLS
from bco_lightning.data.options import Columns, Rating
from bco_lightning.data.rows import RatedRow, RowFormat, RowMaker
from bco_lightning.errors import ConfigError, FeedbackRowError
from tests.unit.made_rows import made, records_of, row_of, rows_of

LOGS = Path(__file__).parent.parent / "data" / "feedback_logs"
NOT_TOUCHED = {"witty": 5.0, "interesting": 5.0, "upbeat": 5.0}
CHITCHAT = RowFormat(rating=Rating("interesting", up=8, down=4, untouched=NOT_TOUCHED))


def records(file: str) -> list[tuple[str, Any]]:
    return list(records_of(str(LOGS / file)))


def parsed(file: str, options: RowFormat | None = None, labelled: bool = True) -> list[RatedRow]:
    """What becomes of each row of a file."""
    return list(rows_of(str(LOGS / file), RowMaker(options or RowFormat(), labelled)))


def rows(file: str, options: RowFormat | None = None) -> list[FeedbackRow]:
    return [outcome for outcome in parsed(file, options) if isinstance(outcome, FeedbackRow)]


def said(row: FeedbackRow) -> list[tuple[str, str]]:
    """Who said what in the prompt, and the completion as the last."""
    return [(message["role"], message["content"]) for message in row.prompt + row.completion]


def reasons(file: str, options: RowFormat | None = None) -> Counter[str]:
    return Counter(outcome.reason for outcome in parsed(file, options) if isinstance(outcome, LeftOut))


FORMAT_OF_FILE = {
    "unpaired.jsonl": "unpaired",
    "conversations.jsonl": "unpaired",
    "sharegpt.jsonl": "unpaired",
    "helpsteer2.jsonl": "unpaired",
    "pairs.jsonl": "paired",
    "pairs_of_conversations.jsonl": "paired",
    "open_webui.json": "open_webui",
    "open_webui_0_8.json": "open_webui",
    "open_webui_0_10.json": "open_webui",
    "open_webui_0_12.json": "open_webui",
    "langfuse_observations.jsonl": "langfuse",
    "langfuse_table.jsonl": "langfuse",
    "langfuse_traces.json": "langfuse",
    "langsmith_runs.jsonl": "langsmith",
    "argilla.json": "argilla",
    "argilla_flat.jsonl": "argilla",
    "chainlit.json": "chainlit",
    "chitchat.json": "chitchat",
    "librechat.json": "librechat",
    "label_studio.json": "label_studio",
    "mlflow_traces.jsonl": "mlflow",
    "mlflow_table.jsonl": "mlflow",
    "opik.jsonl": "opik",
    "opik_trace.json": "opik",
    "phoenix_spans.json": "phoenix",
    "weave.jsonl": "weave",
    "helicone.jsonl": "helicone",
    "tensorzero_inferences.jsonl": "tensorzero",
    "anythingllm.json": "anythingllm",
    "dify.json": "dify",
    "dify_table.csv": "dify",
}
# The feedback of these stands in a file of its own.
BESIDE = {
    "phoenix_spans.json": "phoenix_annotations.json",
    "tensorzero_inferences.jsonl": "tensorzero_feedback.jsonl",
}
# Which also have columns of plain rows.
ROWS_TOO = {"argilla_flat.jsonl", "librechat.json", "mlflow_table.jsonl", "anythingllm.json"}


def test_every_file_here_and_every_format_is_tested() -> None:
    assert {*FORMAT_OF_FILE, *BESIDE.values()} == {path.name for path in LOGS.iterdir() if path.is_file()}
    assert set(FORMAT_OF_FILE.values()) | {"ranked", "compared"} == set(FORMATS)  # of public sets, in a folder there


@pytest.mark.parametrize(("file", "name"), FORMAT_OF_FILE.items())
def test_every_record_is_known_for_what_it_is(file: str, name: str) -> None:
    for _, record in records(file):
        assert format_of(record, Columns()) == name


@pytest.mark.parametrize(("file", "name"), FORMAT_OF_FILE.items())
def test_no_other_export_claims_a_record(file: str, name: str) -> None:
    _, first = records(file)[0]
    claims = {known for known, layout in FORMATS.items() if layout.matches(first, Columns())}
    assert claims - {name} <= ({"unpaired"} if file in ROWS_TOO else set())


# A record of each format in which nothing yet tells what it is, or which looks like one of another.
UNCLEAR: dict[str, dict[str, Any]] = {
    "unpaired.jsonl": {"prompt": "a", "completion": "b", "label": None},
    "conversations.jsonl": {"messages": [], "label": None},
    "helpsteer2.jsonl": {"prompt": "a", "response": None, "helpfulness": None},
    "pairs.jsonl": {"prompt": "a", "chosen": None, "rejected": None},
    "open_webui.json": {"id": "0", "type": "rating", "data": None, "meta": None, "snapshot": None},
    "langfuse_observations.jsonl": {"id": "0", "traceId": "t"},
    "langsmith_runs.jsonl": {"id": "0", "run_type": "llm", "inputs": {"x": "a"}},
    "argilla.json": {"id": "0", "fields": None},
    "argilla_flat.jsonl": {"id": "0", "prompt": "a", "completion": "b"},
    "chainlit.json": {"id": "0", "createdAt": "2026-01-01", "steps": None},
    "chitchat.json": {"messages": [], "ratings": {}, "start": ""},
}


@pytest.mark.parametrize(("file", "first"), UNCLEAR.items())
def test_a_first_record_that_tells_nothing_does_not_decide_the_format(file: str, first: dict[str, Any]) -> None:
    for before in ([first], [{}], [first] * 100):
        maker = RowMaker(RowFormat())
        maker.learn(iter([*(("x:1", record) for record in before), *records(file)]))
        assert maker.format == FORMAT_OF_FILE[file]


def test_a_format_that_is_named_is_taken() -> None:
    [error] = made({"chosen": "a", "rejected": "b"}, RowFormat("unpaired"))
    assert "expected a column 'prompt'" in str(error)


def test_a_record_that_is_a_rated_row_and_a_pair_asks_for_the_format() -> None:
    both = {"prompt": "a", "completion": "b", "label": True, "chosen": "c", "rejected": "d"}
    with pytest.raises(ConfigError, match=r"^data\.format: expected rated rows or pairs, found .* columns of both"):
        made(both)
    assert [len(made(both, RowFormat(name))) for name in ("unpaired", "paired")] == [1, 2]


def test_pairs_with_the_chosen_conversation_beside_them_are_pairs() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    record = {"prompt": "a", "chosen": talk, "rejected": [talk[0], {**talk[1], "content": "c"}], "messages": talk}
    assert format_of(record, Columns()) == "paired"


def test_a_record_like_no_other_is_refused_by_the_names_of_its_columns() -> None:
    [error] = made({"question": "a", "reply": "b"})
    assert isinstance(error, FeedbackRowError)
    assert "x:1: expected a column 'prompt' and a column 'completion', found 'question', 'reply'." in str(error)


# Rows, thumbs-up among them, and what is left out for which reason.
ACCOUNTS: dict[str, tuple[int, int, dict[str, int], int]] = {
    "unpaired.jsonl": (2, 1, {}, 0),
    "conversations.jsonl": (1, 1, {}, 0),
    "sharegpt.jsonl": (2, 1, {"no feedback": 1}, 0),
    "helpsteer2.jsonl": (3, 1, {}, 0),
    "pairs.jsonl": (2, 1, {"both answers are the same": 2}, 0),
    "pairs_of_conversations.jsonl": (2, 1, {}, 0),
    "open_webui.json": (
        4,
        2,
        {
            "no feedback": 1,
            "rated message is not in the snapshot": 1,
            "no snapshot of the chat": 1,
        },
        0,
    ),
    "open_webui_0_8.json": (2, 1, {WITH_TOOLS: 1}, 0),
    "open_webui_0_10.json": (3, 2, {WITH_TOOLS: 1}, 0),
    "open_webui_0_12.json": (
        2,
        1,
        {"conversation with an image": 1, UNFINISHED: 1, "no answer that holds text": 1, "no feedback": 1},
        0,
    ),
    "langfuse_observations.jsonl": (4, 2, {"no feedback": 1, "no answer that holds text": 1}, 0),
    "langfuse_table.jsonl": (2, 1, {"no feedback": 1}, 0),
    "langfuse_traces.json": (2, 1, {"no feedback": 1}, 1),
    "langsmith_runs.jsonl": (
        5,
        3,
        {"mean of several users' feedback": 1, "no feedback": 1, "no answer that holds text": 1},
        0,
    ),
    "argilla.json": (3, 2, {"no feedback": 1}, 0),
    "argilla_flat.jsonl": (2, 1, {"no feedback": 1}, 0),
    "chainlit.json": (2, 1, {"no feedback": 2, "answer is an error message": 1, "no answer that holds text": 1}, 0),
    "chitchat.json": (
        2,
        1,
        {
            "rating left at its default": 1,
            "no feedback": 1,
            "conversation of other than two speakers": 2,
            "rating between thumbs-up and thumbs-down": 1,
        },
        0,
    ),
    "librechat.json": (3, 1, {UNFINISHED: 1, "answer is an error message": 1, "no feedback": 1}, 0),
    "label_studio.json": (3, 1, {"no feedback": 2}, 0),
    "mlflow_traces.jsonl": (2, 1, {"no feedback": 1, FAILED: 1}, 0),
    "mlflow_table.jsonl": (2, 1, {"no feedback": 1, FAILED: 1}, 0),
    "opik.jsonl": (3, 2, {"no feedback": 1, FAILED: 1}, 0),
    "opik_trace.json": (1, 1, {}, 0),
    "phoenix_spans.json": (2, 1, {"no feedback": 1, FAILED: 1}, 0),
    "weave.jsonl": (2, 1, {"no feedback": 2, FAILED: 1}, 0),
    "helicone.jsonl": (3, 1, {"no feedback": 1, FAILED: 1}, 0),
    "tensorzero_inferences.jsonl": (3, 2, {"no feedback": 1, TEMPLATED: 1}, 0),
    "anythingllm.json": (2, 1, {"no feedback": 1, "conversation with an image": 1}, 0),
    "dify.json": (3, 1, {UNFINISHED: 1}, 0),
    "dify_table.csv": (3, 1, {UNFINISHED: 1}, 0),
}
OPTIONS = {
    **{file: RowFormat(feedback=FeedbackBeside(str(LOGS / beside))) for file, beside in BESIDE.items()},
    "chitchat.json": CHITCHAT,
    "helpsteer2.jsonl": RowFormat(rating=Rating("helpfulness", up=4, down=3)),
}


@pytest.mark.parametrize("file", FORMAT_OF_FILE)
def test_every_record_is_accounted_for(file: str) -> None:
    outcomes = parsed(file, OPTIONS.get(file))
    num_rows, num_up, left_out, malformed = ACCOUNTS[file]
    used = [outcome for outcome in outcomes if isinstance(outcome, FeedbackRow)]
    assert (len(used), sum(bool(row.thumbs_up) for row in used)) == (num_rows, num_up)
    assert reasons(file, OPTIONS.get(file)) == left_out
    assert len(outcomes) == num_rows + sum(left_out.values()) + malformed
    assert len({outcome.where if isinstance(outcome, FeedbackRowError) else outcome.place for outcome in outcomes}) == (
        len(records(file))
    )


def test_the_documentation_says_what_becomes_of_each_file() -> None:
    text = (LOGS.parents[2] / "docs" / "feedback_logs.md").read_text(encoding="utf-8")
    for file, (used, up, left_out, malformed) in ACCOUNTS.items():
        why = "; ".join(
            f"{number} {reason}" for reason, number in {**left_out, "malformed": malformed}.items() if number
        )
        read = used + sum(left_out.values()) + malformed
        told = f"| {' + '.join(filter(None, (file, BESIDE.get(file))))} | {read} | {up} up, {used - up} down | {why} |"
        assert told in text


@pytest.mark.parametrize("file", ["unpaired.jsonl", "argilla.json", "chainlit.json", "open_webui.json"])
def test_without_labels_rows_without_feedback_are_used_too(file: str) -> None:
    outcomes = parsed(file, labelled=False)
    assert "no feedback" not in {outcome.reason for outcome in outcomes if isinstance(outcome, LeftOut)}
    used = [outcome for outcome in outcomes if isinstance(outcome, FeedbackRow)]
    thumbs = {row.place: row.thumbs_up for row in rows(file, OPTIONS.get(file))}
    assert {row.thumbs_up for row in used if row.place not in thumbs} <= {None}
    assert {row.place for row in used} >= thumbs.keys()


def test_without_labels_a_thumb_that_is_there_is_kept() -> None:
    for file in ("unpaired.jsonl", "argilla.json", "chainlit.json", "open_webui.json"):
        thumbs = {row.place: row.thumbs_up for row in rows(file, OPTIONS.get(file))}
        used = [each for each in parsed(file, OPTIONS.get(file), labelled=False) if isinstance(each, FeedbackRow)]
        assert thumbs.items() <= {row.place: row.thumbs_up for row in used if row.thumbs_up is not None}.items()


def test_helpsteer2_is_read_by_its_preset_alone() -> None:
    assert [row.thumbs_up for row in rows("helpsteer2.jsonl", OPTIONS["helpsteer2.jsonl"])] == [True, False, False]
    assert rows("helpsteer2.jsonl", OPTIONS["helpsteer2.jsonl"])[0].completion[0]["content"] == "An oak."


# --- Open WebUI


def test_open_webui_gives_the_branch_that_leads_to_the_rated_message() -> None:
    later, earlier, *_ = rows("open_webui.json")
    assert said(later) == [
        ("system", "You know all about tea."),
        ("user", "How long does green tea draw?"),
        ("assistant", "Two to three minutes."),
        ("user", "And black tea?"),
        ("assistant", "About four minutes."),
    ]
    assert said(earlier) == [("user", "How long does green tea draw?"), ("assistant", "Ten minutes.")]
    assert (later.thumbs_up, earlier.thumbs_up) == (True, False)


def test_open_webui_images_stand_before_what_was_asked_with_them_where_the_export_holds_them() -> None:
    (asked,) = rows("open_webui.json")[2].prompt
    assert [picture.stored for picture in asked["images"]] == [b"\0\0\0"]
    kept = [each for _, each in records("open_webui.json") if "data:image" in json.dumps(each)]
    without = json.loads(json.dumps(kept).replace("data:image/png;base64,", "id-of-a-file-"))
    assert made(without[0]) == [LeftOut("x:1", "conversation with an image")]


def test_open_webui_thoughts_are_left_to_the_template() -> None:
    assert rows("open_webui.json")[0].completion[0]["reasoning_content"] == (
        "Black tea needs longer.\nI'd say four minutes."
    )


def test_open_webui_ratings_from_1_to_10_follow_a_rule() -> None:
    for rule in (Rating("details.rating", up=7, down=3), Rating(up=7, down=3)):
        assert [row.thumbs_up for row in rows("open_webui.json", RowFormat(rating=rule))] == [True, False]


def called(name: str, call_id: str, answer: str, said: str = "", **arguments: str) -> list[dict[str, Any]]:
    """A call of a function, and what it gave."""
    call = {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "assistant", "content": said, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": answer},
    ]


# What convert_output_to_messages of open-webui 0.12.4 makes of the same items, thoughts included.
def test_open_webui_tool_calls_and_their_results_are_read_from_every_version() -> None:
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Bremen?"}]
    rain = called("get_weather", "call_1", "rain", city="Bremen")
    rain[0]["reasoning_content"] = "I need the weather."
    rain.append({"role": "assistant", "content": "It rains in Bremen."})
    for file in ("open_webui_0_8.json", "open_webui_0_10.json"):
        row = rows(file)[0]
        assert (row.prompt, row.completion) == (told, rain)
    assert rows("open_webui_0_8.json")[1].prompt == [told[1], *rain, {"role": "user", "content": "And your source?"}]
    assert rows("open_webui.json")[3].completion == [
        *called("get_time", "call_1", "12:00"),
        {"role": "assistant", "content": "It is noon."},
    ]
    [row, _] = rows("open_webui_0_12.json")  # which shows another call than the model's
    made_by_model = called("call_tool", "call_5", "rain", tool="weather", city="Bremen")
    made_by_model[0]["reasoning_content"] = "Bremen, then."
    assert row.completion == [*made_by_model, {"role": "assistant", "content": "It rains."}]


def test_open_webui_calls_of_one_round_are_one_message_of_the_prompt() -> None:
    row = rows("open_webui_0_10.json")[1]
    first, second = (
        called("get_weather", f"call_{n}", w, city=c) for n, w, c in ((2, "rain", "Bremen"), (3, "sun", "Rome"))
    )
    first[0]["tool_calls"] += second[0]["tool_calls"]
    first[0]["content"] = "I look it up."
    assert row.prompt[1:-1] == [*first, second[1], {"role": "assistant", "content": "Rain, and sun."}]
    assert row.completion == [{"role": "assistant", "content": "Snow.", "reasoning_content": "I could guess."}]


def test_open_webui_html_of_the_interface_says_what_its_items_say() -> None:
    for _, record in records("open_webui_0_8.json"):
        by_items = made(record)
        for message in record["snapshot"]["chat"]["chat"]["history"]["messages"].values():
            message.pop("output", None)
        if not (isinstance(by_items[0], LeftOut) and by_items[0].reason == WITH_TOOLS):  # of code HTML tells nothing
            assert made(record) == by_items


def test_open_webui_text_that_a_filter_put_in_place_of_the_answer_is_what_was_rated() -> None:
    assert rows("open_webui_0_12.json")[1].completion == [{"role": "assistant", "content": "An elm."}]
    _, record = records("open_webui_0_12.json")[1]
    record["snapshot"]["chat"]["chat"]["history"]["messages"][record["meta"]["message_id"]]["content"] = ""
    assert row_of(record).completion == [{"role": "assistant", "content": "An oak."}]


@pytest.mark.parametrize(("output", "found"), [
    ("text", "expected a list of items as 'output' of a message, found \"text\"."),
    ([5], "expected a list of items as 'output' of a message, found a list of 1."),
    ([{"type": "message", "content": 5}], "expected a list of texts as 'content' of an item of 'output', found 5."),
    ([{"type": "message", "content": [{"text": []}]}], "as 'content' of an item of 'output', found a list of 1."),
    ([{"type": "function_call", "call_id": "1"}, {"type": "function_call_output", "call_id": "1"},
      {"type": "message", "content": "a"}], "message 1 of 'snapshot' must have a list of function calls"),
])  # fmt: skip
def test_open_webui_output_of_another_shape_is_refused_by_its_place(output: Any, found: str) -> None:
    _, record = records("open_webui_0_12.json")[0]
    record["snapshot"]["chat"]["chat"]["history"]["messages"][record["meta"]["message_id"]]["output"] = output
    [error] = made(record)
    assert isinstance(error, FeedbackRowError)
    assert str(error).startswith("x:1: ")
    assert found in str(error)


def test_a_tree_of_messages_that_runs_in_a_circle_is_left_out() -> None:
    _, record = records("open_webui.json")[2]
    record["data"]["rating"] = 1
    history = record["snapshot"]["chat"]["chat"]["history"]["messages"]
    first, second = history
    history[first]["parentId"] = second
    [outcome] = made(record)
    assert outcome == LeftOut("x:1", "rated message is not in the snapshot")


@pytest.mark.parametrize("text", [
    '<details type="reasoning">', '<details type="reasoning"', '<details type="reasoning"><summary>', "<summary>",
])  # fmt: skip
def test_thoughts_that_do_not_end_take_no_longer_than_others(text: str) -> None:
    _, record = records("open_webui.json")[0]
    messages = record["snapshot"]["chat"]["chat"]["history"]["messages"]
    thought = f'<details type="reasoning">{text * 30_000}</details>' if text == "<summary>" else text * 15_000
    messages[record["meta"]["message_id"]]["content"] = f"{thought} So it is."
    started = time.process_time()
    assert len(made(record)) == 1
    assert time.process_time() - started < 1


def test_an_escape_with_too_many_digits_is_left_as_it_is() -> None:
    _, record = records("open_webui.json")[0]
    messages, escape = record["snapshot"]["chat"]["chat"]["history"]["messages"], f"&#{'1' * 5000};"
    content = f'<details type="reasoning">{escape}</details>Yes.'
    messages[record["meta"]["message_id"]]["content"] = content
    assert row_of(record).completion == [{"role": "assistant", "content": "Yes.", "reasoning_content": escape}]


# --- Langfuse


def test_langfuse_gives_a_row_for_every_time_that_the_score_was_given() -> None:
    first, disliked, liked, last = rows("langfuse_observations.jsonl")
    assert said(disliked) == said(liked) == [("user", "Name a tree."), ("assistant", "An oak.")]
    assert [row.thumbs_up for row in (first, disliked, liked, last)] == [True, False, True, False]


def test_langfuse_tools_and_tool_calls_reach_the_template() -> None:
    row = rows("langfuse_observations.jsonl")[0]
    assert row.tools is not None
    assert row.tools[0]["function"]["name"] == "get_weather"
    assert row.prompt[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Bremen"}
    assert row.prompt[3] == {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


def test_langfuse_booleans_and_json_text_are_understood() -> None:
    up, down = rows("langfuse_traces.json")
    assert said(up) == [("user", "Name a colour."), ("assistant", "Blue.")]
    assert (up.thumbs_up, down.thumbs_up) == (True, False)


@pytest.mark.parametrize(("value", "thumb"), [(1, True), (1.0, True), (0, False)])
def test_a_boolean_score_of_langfuse_speaks_of_true_and_false(value: float, thumb: bool) -> None:
    def trace(**score: Any) -> dict[str, Any]:
        return {"input": "a", "output": "b", "traceId": "t", "scores": [{"name": "user-feedback", **score}]}

    columns = Columns(thumbs={"true": "up", "false": "down"})  # which the numbers 1 and 0 do not speak
    assert row_of(trace(value=value, dataType="BOOLEAN"), RowFormat(columns=columns)).thumbs_up is thumb
    maker = RowMaker(RowFormat("langfuse"))
    maker.rows(trace(value=-1, dataType="NUMERIC"), "x:1")
    [error] = maker.rows(trace(value=value, dataType="BOOLEAN"), "x:2")
    assert "mixes two vocabularies; labels so far were -1" in str(error)


def test_another_score_is_chosen_by_name() -> None:
    numeric = RowFormat(rating=Rating("tone", up=4, down=2))
    assert [row.thumbs_up for row in rows("langfuse_observations.jsonl", numeric)] == [True, False]
    categorical = RowFormat(columns=Columns(label="verdict", thumbs={"good": "up", "bad": "down"}))
    assert [row.thumbs_up for row in rows("langfuse_observations.jsonl", categorical)] == [True]
    assert [row.thumbs_up for row in rows("langfuse_traces.json", categorical)] == [False]


def test_a_score_that_is_not_chosen_is_named_in_the_error() -> None:
    [error] = [outcome for outcome in parsed("langfuse_traces.json") if isinstance(outcome, FeedbackRowError)]
    assert "expected a score 'user-feedback', found 'quality'. Name the score by data.columns.label." in str(error)


def test_a_table_of_langfuse_says_true_and_false_in_words() -> None:
    assert [row.thumbs_up for row in rows("langfuse_table.jsonl")] == [False, True]


@pytest.mark.parametrize(("score", "outcome"), [
    (["True"], True), ('["False"]', False), ("True", True), (0.0, False), ([], "no feedback"), ("", "no feedback"),
    (None, "no feedback"),
])  # fmt: skip
def test_a_score_of_langfuse_that_stands_alone_is_not_lost(score: Any, outcome: bool | str) -> None:
    [row] = made({"id": "t", "bookmarked": False, "input": "a", "output": "b", "user-feedback": score})
    assert (row.thumbs_up if isinstance(row, FeedbackRow) else row.reason) == outcome  # type: ignore[union-attr]


# --- LangSmith


def test_langsmith_messages_of_every_form_are_understood() -> None:
    serialised, openai, _, plain, graph = rows("langsmith_runs.jsonl")
    assert said(serialised) == [
        ("system", "Be brief."),
        ("user", "Weather in Bremen?"),
        ("assistant", ""),
        ("tool", "rain"),
        ("assistant", "It rains."),
    ]
    assert serialised.prompt[2]["tool_calls"] == [
        {"type": "function", "id": "call_1", "function": {"name": "get_weather", "arguments": {"city": "Bremen"}}}
    ]
    assert serialised.tools is not None
    assert serialised.tools[0]["function"]["name"] == "get_weather"
    assert said(openai) == [("user", "Name a tree."), ("assistant", "An oak.")]
    assert said(plain) == [
        ("user", "Hello!"),
        ("assistant", "Hello."),
        ("user", "Name a bird."),
        ("assistant", "A wren."),
    ]
    assert said(graph) == [("user", "Name a fish."), ("assistant", "A carp.")]


def test_langsmith_feedback_of_each_user_is_a_row() -> None:
    assert [row.thumbs_up for row in rows("langsmith_runs.jsonl")] == [True, True, False, False, True]


def test_langsmith_means_follow_a_rule() -> None:
    options = RowFormat(rating=Rating("user-score", up=0.75, down=0.25))
    assert reasons("langsmith_runs.jsonl", options)["rating between thumbs-up and thumbs-down"] == 1
    assert [row.thumbs_up for row in rows("langsmith_runs.jsonl", options)] == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("stat", "outcome"),
    [
        ({"n": 2, "avg": 0.0, "min": -1.0, "max": 1.0}, "mean of several users' feedback"),
        ({"n": 2, "avg": 0.0}, "mean of several users' feedback"),
        ({"n": 2, "avg": 0.0, "min": 0.0, "max": 0.0}, False),
        ({"n": 1, "avg": 1.0}, True),
    ],
)
def test_a_mean_of_different_thumbs_is_none(stat: dict[str, Any], outcome: bool | str) -> None:
    _, run = records("langsmith_runs.jsonl")[4]
    run["feedback_stats"] = {"user-score": stat}
    [row] = made(run)
    assert (row.thumbs_up if isinstance(row, FeedbackRow) else row.reason) == outcome  # type: ignore[union-attr]


IMAGE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:image/png,x"}}]


@pytest.mark.parametrize("message", [{"role": "user", "content": IMAGE}, {"type": "human", "content": IMAGE}])
def test_traces_of_conversations_with_an_image_are_left_out(message: dict[str, Any]) -> None:
    run = {"inputs": {"messages": [message]}, "outputs": {"output": "A cat."}, "run_type": "llm", "feedback": [
        {"key": "user-score", "score": 1}]}  # fmt: skip
    trace = {"input": [message], "output": "A cat.", "traceId": "t", "scores": [{"name": "user-feedback", "value": 1}]}
    for record in (run, trace):
        assert made(record) == [LeftOut("x:1", "conversation with an image")]


def test_langsmith_feedback_of_a_user_counts_where_null_stands_for_that_of_others() -> None:
    _, run = records("langsmith_runs.jsonl")[4]
    run.update(feedback=None, feedback_stats={"user-score": {"n": 1, "avg": 0.5}})
    assert made(run) == [LeftOut("x:1", "mean of several users' feedback")]


# --- Argilla


def test_argilla_gives_a_row_for_each_annotator() -> None:
    up, down, chat = rows("argilla.json")
    assert said(up) == said(down) == [("user", "Name a tree."), ("assistant", "An oak.")]
    assert said(chat) == [("user", "Name a bird."), ("assistant", "A wren.")]
    assert [row.thumbs_up for row in (up, down, chat)] == [True, False, True]


def test_argilla_ratings_follow_a_rule_per_annotator() -> None:
    options = RowFormat(rating=Rating("quality", up=4, down=2))
    assert [row.thumbs_up for row in rows("argilla.json", options)] == [True, False]
    assert reasons("argilla.json", options) == {"rating between thumbs-up and thumbs-down": 1, "no feedback": 1}


@pytest.mark.parametrize("flat", [False, True])
def test_argilla_ratings_of_one_row_are_of_one_annotator(flat: bool) -> None:
    given = {"tone": {"ann": 5, "bob": 1}, "quality": {"bob": 5, "ann": 5}}
    fields = {"prompt": "a", "completion": "b"}
    columns = {f"{name}.responses": list(by.values()) for name, by in given.items()}
    users = {f"{name}.responses.users": list(by) for name, by in given.items()}
    responses = {name: [{"value": value, "user_id": user} for user, value in by.items()] for name, by in given.items()}
    record = {**fields, **columns, **users} if flat else {"fields": fields, "responses": responses}
    rule = Rating("quality", up=4, down=2, untouched={"tone": 5, "quality": 5})
    bob, ann = made(record, RowFormat("argilla", rating=rule))
    assert isinstance(bob, FeedbackRow)  # whose tone is 1, where that of the other is untouched
    assert ann == LeftOut("x:1", "rating left at its default")


def test_argilla_drafts_and_discarded_responses_are_no_feedback() -> None:
    assert [(said(row)[-1][1], row.thumbs_up) for row in rows("argilla_flat.jsonl")] == [
        ("An oak.", True),
        ("A wren.", False),
    ]


# --- Chainlit


def test_chainlit_feedback_on_a_run_is_for_its_last_answer() -> None:
    by_run, by_message = rows("chainlit.json")
    assert said(by_run) == [
        ("assistant", "Ask me about tea."),
        ("user", "How long does green tea draw?"),
        ("assistant", "Two to three minutes."),
    ]
    assert said(by_message)[-2:] == [("user", "And black tea?"), ("assistant", "Ten hours.")]
    assert (by_run.thumbs_up, by_message.thumbs_up) == (True, False)


def test_chainlit_feedback_can_stand_beside_the_steps() -> None:
    _, thread = records("chainlit.json")[0]
    beside = [step.pop("feedback") for step in thread["steps"]]
    thread["feedbacks"] = [entry for entry in beside if entry]
    assert [row.thumbs_up for row in made(thread) if isinstance(row, FeedbackRow)] == [True, False]


def test_chainlit_feedback_on_what_is_no_answer_is_counted() -> None:
    _, thread = records("chainlit.json")[2]
    thread["steps"][0]["feedback"] = {"forId": thread["steps"][0]["id"], "value": 1}
    assert made(thread) == [
        LeftOut("x:1", "no answer that holds text"),
        LeftOut("x:1", "feedback on something that is no answer"),
    ]


def chainlit_outcomes(thread: dict[str, Any]) -> list[bool | str | None]:
    outcomes = made(thread)
    assert not any(isinstance(row, FeedbackRowError) for row in outcomes)
    return [row.reason if isinstance(row, LeftOut) else row.thumbs_up for row in outcomes]  # type: ignore[union-attr]


def chainlit_thread(**feedback: Any) -> dict[str, Any]:
    """Two answers whose steps have no ids; ``first`` and ``second`` are their feedback."""
    kinds = {
        "ask": "user_message",
        "first": "assistant_message",
        "again": "user_message",
        "second": "assistant_message",
    }
    steps = [{"type": kind, "output": name, "feedback": feedback.get(name)} for name, kind in kinds.items()]
    return {"userId": "u", "steps": steps}


def test_chainlit_feedback_in_a_step_without_an_id_is_of_that_step() -> None:
    assert chainlit_outcomes(chainlit_thread(second={"value": 1})) == ["no feedback", True]


def test_chainlit_answer_right_after_another_one_is_left_out_and_no_continuation() -> None:
    thread = chainlit_thread(first={"value": 1}, second={"value": 1})
    del thread["steps"][2]
    assert chainlit_outcomes(thread) == [True, "answer right after another one"]


def test_chainlit_feedback_that_stands_twice_is_one_row() -> None:
    thumb = {"id": "f1", "forId": "s1", "value": 1}
    thread = chainlit_thread(first=thumb)
    thread["steps"][1]["id"] = "s1"
    thread["feedbacks"] = [thumb, {**thumb, "id": "f2", "value": 0}]
    assert chainlit_outcomes(thread) == [True, False, "no feedback"]


@pytest.mark.parametrize("text", [" Rooibos?\n", "\tindented"])
def test_white_space_of_a_message_stays(text: str) -> None:
    _, thread = records("chainlit.json")[0]
    thread["steps"][2]["output"] = text
    _, chat = records("open_webui.json")[1]
    chat["data"]["rating"], root = 1, next(iter(chat["snapshot"]["chat"]["chat"]["history"]["messages"].values()))
    root["content"] = text
    for given in (thread, chat):
        asked = [row.prompt for row in made(given) if isinstance(row, FeedbackRow)]
        assert {"role": "user", "content": text} in asked[0]


def test_chainlit_thumbs_that_contradict_each_other_are_rows_of_their_own() -> None:
    _, thread = records("chainlit.json")[0]
    thread["feedbacks"] = [{"forId": thread["steps"][5]["id"], "value": 0}]
    found = [row for row in made(thread) if isinstance(row, FeedbackRow)]
    assert [(said(row)[-1][1], row.thumbs_up) for row in found[:2]] == [
        ("Two to three minutes.", True),
        ("Two to three minutes.", False),
    ]


def test_chainlit_thumbs_of_its_own_tables_are_floating_point_numbers() -> None:
    thread = chainlit_thread(first={"value": 0.0}, second={"value": 1.0})
    assert chainlit_outcomes(thread) == [False, True]


# --- Traces with named scores, and columns with a thumb


def outcome(record: dict[str, Any], **options: Any) -> bool | str | None:
    """The thumb of a record's only row, or why there is none."""
    [row] = made(record, RowFormat(**options))
    if isinstance(row, FeedbackRowError):
        return str(row)
    return row.reason if isinstance(row, LeftOut) else row.thumbs_up


def test_a_table_of_mlflow_says_what_its_traces_say() -> None:
    by_trace, by_row = (rows(f"mlflow_{kind}.jsonl") for kind in ("traces", "table"))
    assert [(row.prompt, row.completion) for row in by_trace] == [(row.prompt, row.completion) for row in by_row]
    assert said(by_trace[0]) == [("system", "Be brief."), ("user", "Name a tree."), ("assistant", "An oak.")]
    assert said(by_trace[1]) == [("user", "Name a bird."), ("assistant", "A trout.")]


def test_assessments_of_mlflow_that_were_overridden_or_are_of_a_span_are_none() -> None:
    _, trace = records("mlflow_traces.jsonl")[0]
    thumb = trace["info"]["assessments"][0]
    for change in ({"valid": False}, {"span_id": "00"}, {"feedback": None}):
        trace["info"]["assessments"] = [{**thumb, **change}]
        assert outcome(trace) == "no feedback"
    trace["info"]["assessments"] = [thumb, {**thumb, "assessment_name": "tone", "feedback": {"value": 2}}]
    assert outcome(trace, rating=Rating("tone", up=4, down=3)) is False


def test_a_trace_that_only_a_judge_has_scored_asks_for_the_name_of_the_score_or_has_no_feedback() -> None:
    _, trace = records("mlflow_traces.jsonl")[0]
    del trace["info"]["assessments"][0]
    asks = "x:1: expected a score 'feedback', found 'relevance'. Name the score by data.columns.label."
    assert outcome(trace) == asks
    assert outcome(trace, columns=Columns(label="feedback")) == "no feedback"
    assert outcome(trace, rating=Rating("relevance", up=0.8, down=0.2)) is True


def test_a_mean_of_several_users_of_opik_is_a_row_of_each() -> None:
    assert [(said(row)[-1][1], row.thumbs_up) for row in rows("opik.jsonl")] == [
        ("An oak.", True), ("A trout.", False), ("A trout.", True),
    ]  # fmt: skip


def test_reactions_of_weave_are_thumbs_of_any_skin_and_others_none_unless_options_say() -> None:
    assert [row.thumbs_up for row in rows("weave.jsonl")] == [True, False]
    words = Columns(thumbs={"🎉": "up", "👍": "up", "👎": "down"})
    assert [row.thumbs_up for row in rows("weave.jsonl", RowFormat(columns=words))] == [True, False, True]


def test_feedback_of_weave_can_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    call = records("weave.jsonl")[1][1]
    feedback = call["summary"]["weave"].pop("feedback")
    (tmp_path / "feedback.json").write_text(json.dumps(feedback), encoding="utf-8")
    assert outcome(call) == "no feedback"
    assert outcome(call, feedback=FeedbackBeside(str(tmp_path / "*.json"))) is False


@pytest.mark.parametrize(("at", "change"), [(0, {"finish_reason": "length"}), (2, {"stop_reason": "max_tokens"})])
def test_answers_that_ran_into_a_limit_of_tokens_are_never_trained_on(at: int, change: dict[str, str]) -> None:
    _, record = records("helicone.jsonl")[at]
    body = record["response_body"]
    body.get("choices", [body])[0].update(change)
    assert outcome(record) == UNFINISHED


def test_thumbs_of_helicone_and_tools_of_its_requests_are_read() -> None:
    up, scored, other_api = rows("helicone.jsonl")
    assert (up.tools or [{}])[0]["function"]["name"] == "get_tree"
    assert said(other_api) == [("system", "Be brief."), ("user", "Name a fish."), ("assistant", "A carp.")]
    assert [row.thumbs_up for row in (up, scored, other_api)] == [True, False, False]
    assert [row.thumbs_up for row in rows("helicone.jsonl", RowFormat(rating=Rating("tone", up=4, down=2)))] == [True]


def test_tool_calls_of_tensorzero_and_their_results_are_messages() -> None:
    _, answered, asked = rows("tensorzero_inferences.jsonl", OPTIONS["tensorzero_inferences.jsonl"])
    assert answered.prompt[1:] == called("get_weather", "c1", "rain", city="Bremen")
    assert answered.completion == [{"role": "assistant", "content": "Sun.", "reasoning_content": "Rain, then."}]
    assert asked.completion == called("get_weather", "c2", "", "I look it up.", city="Rome")[:1]


def test_feedback_that_is_about_no_answer_is_counted() -> None:
    for file, options in OPTIONS.items():
        if file in BESIDE:
            parsed(file, options)
            assert options.feedback.lost == 1


def test_feedback_without_what_it_is_about_is_refused_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_text('{"span_id": "1"}\n{"span_id": null, "score": 1}\n', encoding="utf-8")
    with pytest.raises(
        FeedbackRowError, match=r"feedback\.jsonl:2: .* 'span_id', 'weave_ref', found 'span_id', 'score'"
    ):
        FeedbackBeside(str(path))


def test_stars_and_choices_of_label_studio_are_ratings_by_the_names_of_their_controls() -> None:
    assert [row.thumbs_up for row in rows("label_studio.json", RowFormat(rating=Rating("stars", up=5, down=1)))] == [
        True, False,
    ]  # fmt: skip
    assert [row.thumbs_up for row in rows("label_studio.json")] == [True, False, False]


@pytest.mark.parametrize(("length", "found"), [
    (DIFY_KEEPS - 1, True), (DIFY_KEEPS, True), (DIFY_KEEPS + 1, UNFINISHED), (9 * DIFY_KEEPS, UNFINISHED),
])  # fmt: skip
def test_answers_that_dify_has_cut_are_never_trained_on(length: int, found: bool | str) -> None:
    _, record = records("dify.json")[0]
    whole = "x" * (length - 3) + "..."
    # What its feedback_service writes.
    record["ai_response"] = whole[:DIFY_KEEPS] + "..." if len(whole) > DIFY_KEEPS else whole
    assert outcome(record) == found


def test_words_for_thumbs_of_a_tool_can_be_others() -> None:
    words = Columns(thumbs={"GOOD": "down", "BAD": "up"})
    assert [row.thumbs_up for row in rows("anythingllm.json", RowFormat(columns=words))] == [False, True]


# --- LibreChat


def test_librechat_gives_the_branch_that_leads_to_each_rated_answer() -> None:
    first, other, later = rows("librechat.json")
    rain = called("get_weather", "call_1", "rain", city="Bremen")
    rain[0]["reasoning_content"] = "I look it up."
    assert first.prompt == other.prompt == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Bremen?"}
    ]  # fmt: skip
    assert first.completion == [*rain, {"role": "assistant", "content": "It rains in Bremen."}]
    assert later.prompt == [*first.prompt, *first.completion, {"role": "user", "content": "And in Rome?"}]
    assert [row.completion[-1]["content"] for row in (other, later)] == ["Sun.", "It snows."]
    assert [row.thumbs_up for row in (first, other, later)] == [True, False, False]


def test_librechat_branches_can_be_nested() -> None:
    _, record = records("librechat.json")[0]
    flat = made(record)
    by_parent: dict[str, list[dict[str, Any]]] = {}
    for message in record.pop("messages"):
        by_parent.setdefault(message["parentMessageId"], []).append(message)
        message["children"] = by_parent.setdefault(message["messageId"], [])
    record["messagesTree"] = next(iter(by_parent.values()))
    assert sorted(map(str, made(record))) == sorted(map(str, flat))


@pytest.mark.parametrize(("change", "found"), [
    ({"files": [{"type": "image/png"}]}, "conversation with an image"),
    ({"content": [{"type": "image_file"}]}, "conversation with an image"),
    ({"content": [{"type": "tool_call", "tool_call": {"id": "1", "name": "a"}}]}, WITH_TOOLS),
    ({"parentMessageId": "gone"}, "rated message does not lead to a first one"),
    ({"finish_reason": "length"}, UNFINISHED),
    ({"feedback": {"rating": "fine"}}, "x:1: label must be one of"),
])  # fmt: skip
def test_librechat_answers_that_cannot_be_read_are_left_out(change: dict[str, Any], found: str) -> None:
    _, record = records("librechat.json")[0]
    record["messages"] = [record["messages"][0], {**record["messages"][2], **change}]
    assert str(outcome(record)).startswith(found)


# --- chitchat


def test_utterances_of_one_speaker_are_one_turn_and_the_last_speaker_is_the_assistant() -> None:
    first, second = rows("chitchat.json", CHITCHAT)
    assert said(first) == [
        ("user", "Hi\nHow are you?"),
        ("assistant", "Fine.\nAnd you?"),
        ("user", "Great!"),
        ("assistant", "Bye"),
    ]
    assert said(second) == [("assistant", "Hi"), ("user", "Yes?"), ("assistant", "Nothing.")]
    assert (first.thumbs_up, second.thumbs_up) == (True, False)


def test_conversations_without_a_rule_for_their_ratings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.rating: expected a rule for one of the ratings interesting, upbeat"):
        parsed("chitchat.json")


def test_a_conversation_that_is_too_long_is_left_out() -> None:
    turns = [[{"text": "Hm?", "timestamp": "", "sender": "ab"[number % 2]}] for number in range(501)]
    record = {"messages": turns, "ratings": {"interesting": 9}, "start": ""}
    [outcome] = made(record, CHITCHAT)
    assert outcome == LeftOut("x:1", "conversation of more than 500 turns")


@pytest.mark.skipif(find_spec("chitchat_dataset") is None, reason="chitchat-dataset 0.9.0 is not installed")
def test_the_real_ratings_are_counted_one_by_one() -> None:
    rows_made = rows_of("package:chitchat_dataset/dataset.json", RowMaker(CHITCHAT))
    outcomes = Counter(row.reason if isinstance(row, LeftOut) else type(row).__name__ for row in rows_made)
    assert outcomes["no feedback"] == 7168 - 5988
    assert outcomes["rating left at its default"] == 2920
    assert sum(outcomes.values()) == 7168
    assert "FeedbackRowError" not in outcomes


# --- all turns


@pytest.mark.parametrize(("file", "answers"), [("open_webui.json", [2, 1, 1, 2]), ("chainlit.json", [1, 2])])
def test_all_turns_of_an_exported_conversation_can_carry_loss(file: str, answers: list[int]) -> None:
    found = rows(file, RowFormat(loss_on="all_turns"))
    assert [sum(message["role"] == "assistant" for message in row.completion) for row in found] == answers


def test_sharegpt_functions_and_system_prompt_reach_the_template() -> None:
    row = rows("sharegpt.jsonl")[0]
    call = {"name": "get_weather", "arguments": {"city": "Bremen"}}
    assert row.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Bremen?"}]
    assert row.completion == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"weather": "rain"}'},
        {"role": "assistant", "content": "It rains."},
    ]
    assert row.tools is not None
    assert row.tools[0]["name"] == "get_weather"
