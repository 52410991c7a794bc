"""Exports of tools that keep a call, what came of it and how it was rated: for each tool, where its export keeps what.

What was said is understood in the layouts of :mod:`~.traces`; scores may also stand in a file of their own.

Source: the Python packages mlflow-skinny 3.17.2 (``entities/trace.py``, ``entities/assessment.py``), opik 2.2.122
(``rest_api/types/trace_public.py``, ``cli/exports``), arize-phoenix-client 3.5.0 (``__generated__/v1``), weave 0.54.0
(``trace/call.py``, ``trace/feedback.py``), tensorzero 2026.6.0 (``generated_types.py``) with its documentation, Data
Model, and label-studio-sdk 2.1.2 (``types/annotation.py``, ``label_interface/control_tags.py``) with Label Studio Task
Format; the repositories Helicone/helicone (``packages/llm-mapper/types.ts``, ``examples/export``), langgenius/dify
(``api/services/feedback_service.py``) and Mintplex-Labs/anything-llm (``server/utils/helpers/chat/convertTo.js``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from bco_lightning.batch import FeedbackRow, LeftOut, Message
from bco_lightning.data.formats.record_format import UNFINISHED, WITH_IMAGE, Origin, Rows
from bco_lightning.data.formats.scores import rated_by
from bco_lightning.data.formats.traces import traced_row
from bco_lightning.data.formats.unpaired import unrated_row
from bco_lightning.data.options import Columns
from bco_lightning.data.values import MISSING, Record, objects_in, unpacked, value_at

DIFY_KEEPS = 500  # characters of an answer
FAILED = "call that failed"
TEMPLATED = "prompt that only a template tells, which the export does not hold"


class Score(NamedTuple):
    """One rating of a call: its name, its value (``None`` is none), and who gave it, where that is known."""

    name: Any
    value: Any
    user: Any = None


Call = tuple[Any, Any] | Record | None  # what went in and what came out, or both in columns


@dataclass(frozen=True)
class RatedCalls:
    """Records of one tool, where a name with dots reaches into objects."""

    marks: tuple[tuple[str, ...], ...]  # a record has all names of one group
    call: Callable[[Record], Call | str]  # a text is the reason for which there is none
    scores: Callable[[Record], Iterable[Score]] = lambda _: ()
    # The key by which scores in another file name a record, and what one of these says.
    beside: tuple[str, Callable[[Record], Iterable[Score]]] | None = None
    failed: Callable[[Record], Any] = lambda _: False
    usual: tuple[str, ...] = ()  # names of the score that is a user's thumb
    only: tuple[str, ...] = ()  # what such a score says, unless options say what its words mean; any other is no thumb

    def matches(self, record: Record, columns: Columns) -> bool:
        """Whether a record has all names of one group."""
        return any(all(value_at(record, name, MISSING) is not MISSING for name in group) for group in self.marks)

    def candidates(self, record: Record, origin: Origin) -> Rows:
        """The rows of one call."""
        scores: dict[str, list[Any]] = {}
        users: dict[str, list[Any]] = {}
        given = [*self.scores(record)]
        for key, read in [self.beside] if self.beside else ():
            given += [score for entry in origin.options.feedback.on(value_at(record, key)) for score in read(entry)]
        for name, value, user in given:
            no_thumb = self.only and name in self.usual and value not in self.only and not origin.columns.thumbs
            if isinstance(name, str) and value is not None and not no_thumb:
                scores.setdefault(name, []).append(value)
                users.setdefault(name, []).append(user)
        yield from rated_by(scores, lambda: self._row(record, origin), origin, users, self.usual)

    def _row(self, record: Record, origin: Origin) -> FeedbackRow | LeftOut:
        if self.failed(record):
            return origin.left_out(FAILED)
        call = self.call(record)
        if isinstance(call, str):
            return origin.left_out(call)
        if not isinstance(call, tuple):
            return unrated_row(call if isinstance(call, dict) else {}, origin)
        return traced_row({"input": call[0], "output": call[1]}, ("input", "output"), origin)


def _of_json(value: Any) -> Any:
    """What a text says in JSON; anything else as it is."""
    with suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def _at(given: str, answer: str) -> Callable[[Record], Call]:
    return lambda record: (value_at(record, given), value_at(record, answer))


def _mlflow_call(record: Record) -> Call:
    if "request" in record:  # a row of the table of traces
        return record["request"], record.get("response")
    spans = objects_in(value_at(record, "data.spans"))
    root = next((span for span in spans if not span.get("parent_span_id") and not span.get("parent_id")), {})
    known = root["attributes"] if isinstance(root.get("attributes"), dict) else {}
    return _of_json(known.get("mlflow.spanInputs")), _of_json(known.get("mlflow.spanOutputs"))


def _mlflow_scores(record: Record) -> Iterable[Score]:
    given = record["assessments"] if "assessments" in record else value_at(record, "info.assessments")
    for entry in objects_in(unpacked(given)):
        # One that was overridden is no longer valid; one of a span is of a part of the call.
        if entry.get("valid") is not False and entry.get("span_id") is None:
            value = value_at(entry, "feedback.value")
            yield Score(entry.get("assessment_name"), value, value_at(entry, "source.source_id"))


def _opik_trace(record: Record) -> Record:
    return record["trace"] if isinstance(record.get("trace"), dict) else record


def _opik_scores(record: Record) -> Iterable[Score]:
    for entry in objects_in(_opik_trace(record).get("feedback_scores")):
        by_author = entry.get("value_by_author")
        if isinstance(by_author, dict) and by_author:  # of which ``value`` is the mean
            for author, given in by_author.items():
                yield Score(entry.get("name"), value_at(given, "value") if isinstance(given, dict) else None, author)
        else:
            yield Score(entry.get("name"), entry.get("value"))


def _phoenix_scores(entry: Record) -> Iterable[Score]:
    score, label = value_at(entry, "result.score"), value_at(entry, "result.label")
    yield Score(entry.get("name", entry.get("annotation_name")), label if score is None else score)


def _weave_score(entry: Record) -> Iterable[Score]:
    kind, payload = entry.get("feedback_type"), unpacked(entry.get("payload"))
    if isinstance(kind, str) and isinstance(payload, dict):
        keys = ("detoned", "emoji", "value", "output")  # an emoji first without the colour of its skin
        value = next((payload[key] for key in keys if payload.get(key) is not None), None)
        yield Score(kind.removeprefix("wandb.").removesuffix(".1"), value, entry.get("creator"))


def _weave_scores(record: Record) -> Iterable[Score]:
    for entry in objects_in(value_at(record, "summary.weave.feedback")):
        yield from _weave_score(entry)


def _helicone_scores(record: Record) -> Iterable[Score]:
    given = unpacked(record.get("scores"))
    scores = dict(given) if isinstance(given, dict) else {}
    thumb, rating = scores.pop("helicone-score-feedback", None), record.get("feedback_rating")
    yield Score("feedback", thumb if rating is None else int(rating) if isinstance(rating, bool) else rating)
    yield from (Score(name.removesuffix("-hcone-bool"), value) for name, value in scores.items())


def _tensorzero_call(record: Record) -> Call | str:
    given, answer = unpacked(record.get("input")), unpacked(record.get("output"))
    if not isinstance(given, dict):
        return given, answer
    told = given.get("system")
    said = [{"role": "system", "content": told}] if told else []
    for turn in objects_in(given.get("messages")):
        said += _of_blocks(str(turn.get("role")), turn.get("content"))
    if any(not isinstance(message["content"], str) for message in said):
        return TEMPLATED
    raw = value_at(answer, "raw") if isinstance(answer, dict) else None  # of a function that writes JSON
    return said, _of_blocks("assistant", answer) if isinstance(answer, list) else raw if raw is not None else answer


def _of_blocks(role: str, blocks: Any) -> list[Message]:
    """Messages of content blocks; where one is neither text nor of tools, the content is no text either."""
    if not isinstance(blocks, list):
        return [{"role": role, "content": blocks}]
    messages, texts, calls, thoughts = list[Message](), list[Any](), list[Message](), list[str]()
    for block in (block if isinstance(block, dict) else {} for block in blocks):
        if block.get("type") == "tool_result":
            messages.append({"role": "tool", "tool_call_id": block.get("id"), "content": block.get("result")})
        elif block.get("type") == "tool_call":
            function = {"name": block.get("name") or block.get("raw_name"), "arguments": block.get("arguments") or "{}"}
            calls.append({"type": "function", "id": block.get("id"), "function": function})
        elif block.get("type") == "thought":
            thoughts.append(str(block.get("text") or ""))
        else:
            texts.append(block.get("text", block.get("value")))
    if texts or calls:
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        beside = {"reasoning_content": "".join(thoughts), "tool_calls": calls}
        messages.append({"role": role, "content": content, **{name: part for name, part in beside.items() if part}})
    return messages


def _said(asked: Any, answer: Any) -> Call:
    """Texts that are what they are, also if they look like JSON."""
    return [{"role": "user", "content": asked}], [{"role": "assistant", "content": answer}]


def _anythingllm_call(record: Record) -> Call | str:
    with_image = objects_in(unpacked(record.get("attachments")))
    return WITH_IMAGE if with_image else _said(record.get("prompt"), record.get("response"))


def _dify_call(record: Record) -> Call | str:
    answer = record.get("ai_response")
    cut = isinstance(answer, str) and len(answer) == DIFY_KEEPS + 3 and answer.endswith("...")
    return UNFINISHED if cut else _said(record.get("user_query"), answer)


def _label_studio_scores(record: Record) -> Iterable[Score]:
    for number, annotation in enumerate(objects_in(record.get("annotations"))):
        for result in objects_in(annotation.get("result")) if not annotation.get("was_cancelled") else ():
            given = result["value"] if isinstance(result.get("value"), dict) else {}
            value = given.get("choices", given.get("rating", given.get("number")))
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            yield Score(result.get("from_name"), value, number)


EXPORTS: dict[str, RatedCalls] = {
    "mlflow": RatedCalls(
        (("info.trace_id", "data.spans"), ("trace_id", "request", "assessments")),
        _mlflow_call,
        _mlflow_scores,
        failed=lambda record: value_at(record, "info.state", record.get("state")) == "ERROR",
        usual=("feedback",),
    ),
    "opik": RatedCalls(
        (("feedback_scores", "input", "output"), ("trace.feedback_scores",)),
        lambda record: _at("input", "output")(_opik_trace(record)),
        _opik_scores,
        failed=lambda record: _opik_trace(record).get("error_info"),
        usual=("User feedback",),
    ),
    "phoenix": RatedCalls(
        (("context.span_id", "attributes"), ("context.span_id", "attributes.input.value")),
        _at("attributes.input.value", "attributes.output.value"),
        beside=("context.span_id", _phoenix_scores),
        failed=lambda record: record.get("status_code") == "ERROR",
        usual=("user feedback", "feedback"),
    ),
    "weave": RatedCalls(
        (("op_name", "inputs"),),
        _at("inputs", "output"),
        _weave_scores,
        beside=("id", _weave_score),
        failed=lambda record: record.get("exception"),
        usual=("reaction", "agent_user_feedback"),
        only=("👍", "👎"),
    ),
    "helicone": RatedCalls(
        (("request_id", "request_body"),),
        _at("request_body", "response_body"),
        _helicone_scores,
        failed=lambda record: value_at(record, "response_status") not in (None, 200),
        usual=("feedback",),
    ),
    "tensorzero": RatedCalls(
        (("function_name", "variant_name", "input"),),
        _tensorzero_call,
        beside=("id", lambda entry: [Score(entry.get("metric_name"), entry.get("value"))]),
    ),
    "label_studio": RatedCalls((("data", "annotations"),), lambda record: record.get("data"), _label_studio_scores),
    "anythingllm": RatedCalls(
        (("prompt", "rating", "workspace", "sent_at"),),
        _anythingllm_call,
        lambda record: [Score("rating", None if record.get("rating") == "--" else record.get("rating"))],
        usual=("rating",),
    ),
    "dify": RatedCalls(
        (("user_query", "feedback_rating", "feedback_rating_raw"),),
        _dify_call,
        lambda record: [Score("feedback_rating", record.get("feedback_rating"))],
        usual=("feedback_rating",),
    ),
}
