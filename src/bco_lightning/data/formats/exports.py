"""Exports of tools that keep a call, what came of it and how it was rated: for each tool, where its export keeps what.

Langfuse's table of traces or observations has a column for each score; its API, and the download of a single trace, a
list of ``scores``. Its scheduled export to blob storage keeps scores in files apart, which have to be joined before.
Runs of LangSmith are those of ``Client.list_runs`` and the bulk export. Records of Argilla are those of
``Dataset.records.to_json`` and ``to_list``, or the flat ones of ``to_list(flatten=True)`` and ``to_datasets``.

Source: the Python packages langfuse 5.0.4 (``api/commons/types``), langsmith 0.15.0 (``schemas.py``, ``types/run.py``)
with https://docs.langchain.com/langsmith/feedback-data-format, argilla 2.8.0 (``records/_resource.py``,
``records/_io/_generic.py``), mlflow-skinny 3.17.2 (``entities/trace.py``, ``entities/assessment.py``), opik 2.2.122
(``rest_api/types/trace_public.py``, ``cli/exports``), arize-phoenix-client 3.5.0 (``__generated__/v1``), weave 0.54.0
(``trace/call.py``, ``trace/feedback.py``), tensorzero 2026.6.0 (``generated_types.py``) with its documentation, Data
Model, and label-studio-sdk 2.1.2 (``types/annotation.py``, ``label_interface/control_tags.py``) with Label Studio Task
Format; the repositories langfuse/langfuse v3 (``worker/src/features/database-read-stream``), Helicone/helicone
(``packages/llm-mapper/types.ts``, ``examples/export``), langgenius/dify (``api/services/feedback_service.py``) and
Mintplex-Labs/anything-llm (``server/utils/helpers/chat/convertTo.js``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bco_lightning.batch import Message
from bco_lightning.data.formats.rated_calls import USUAL_NAMES, Call, RatedCalls, Score
from bco_lightning.data.formats.record_format import UNFINISHED, WITH_IMAGE
from bco_lightning.data.values import Record, is_blank, objects_in, parsed, plain_number, unpacked, value_at

DIFY_KEEPS = 500  # characters of an answer
TEMPLATED = "prompt that only a template tells, which the export does not hold"
_OF_LANGFUSE = ("traceId", "observationCount", "bookmarked", "htmlPath", "parentObservationId")
# Columns of Langfuse's tables that can hold lists and are no scores.
_NO_SCORES = frozenset({
    "input", "output", "metadata", "tags", "traceTags", "comments", "observations", "toolCalls", "toolCallNames",
})  # fmt: skip
_FLAT = ".responses"  # of Argilla


def _at(*names: str) -> Callable[[Record], Call]:
    return lambda record: tuple(value_at(record, name) for name in names)


def _langfuse_scores(record: Record) -> Iterable[Score]:
    """Those of a list of objects, as the API gives them, or of the columns of a table, each with a list of values."""
    if isinstance(record.get("scores"), list):
        for score in objects_in(record["scores"]):
            kind, value, text = score.get("dataType"), score.get("value"), score.get("stringValue")
            if kind == "BOOLEAN" and value in (0, 1):
                value = bool(value)
            elif kind == "CATEGORICAL" and text is not None:
                value = text
            yield Score(score.get("name"), value)
        return
    # The table has a column for each score of the project, so one that was not given is known all the same.
    for name, value in ((name, unpacked(value)) for name, value in record.items() if name not in _NO_SCORES):
        if isinstance(value, list) and all(isinstance(one, (int, float, str)) for one in value):
            yield from (Score(name, one) for one in value or [None])
        elif name in USUAL_NAMES:
            yield Score(name, None if is_blank(value) else value)


def _langsmith_scores(record: Record) -> Iterable[Score]:
    """Every user's own, where ``Client.list_feedback`` stands beside a run; else what its statistics say of them."""
    if isinstance(record.get("feedback"), list):
        for entry in objects_in(record["feedback"]):
            yield Score(entry.get("key"), entry.get("value" if entry.get("score") is None else "score"))
        return
    stats = record["feedback_stats"] if isinstance(record.get("feedback_stats"), dict) else {}
    for name, stat in ((name, stat) for name, stat in stats.items() if isinstance(stat, dict)):
        yield Score(name, None)
        if (mean := stat.get("avg")) is not None:
            # The mean of +1 and -1 looks like a thumb, too.
            least, most = stat.get("min"), stat.get("max")
            alike = stat.get("n") in (None, 1) if least is None or most is None else least == most
            yield Score(name, mean, is_mean=not alike or isinstance(plain_number(mean), float))
        elif isinstance(words := stat.get("values"), dict):
            said = ((word, times) for word, times in words.items() if isinstance(times, int))
            yield from (Score(name, word) for word, times in said for _ in range(times))


def _argilla_scores(record: Record) -> Iterable[Score]:
    """Those of responses, nested or flat; only flat ones know drafts and discarded responses, which are not used."""
    nested = record.get("responses")
    given = nested.items() if isinstance(nested, dict) else _flat_responses(record)
    for question, listed in given:
        yield Score(question, None)
        for response in objects_in(listed):
            if response.get("status") in (None, "submitted"):
                yield Score(question, response.get("value"), response.get("user_id"))


def _flat_responses(record: Record) -> Iterable[tuple[str, list[Record]]]:
    """The responses of each flat question as objects; users and states only where there is one for each."""
    for name, values in ((name, values) for name, values in record.items() if name.endswith(_FLAT)):
        values = values if isinstance(values, list) else []
        users, states = (
            column if isinstance(column, list) and len(column) == len(values) else [None] * len(values)
            for column in (record.get(f"{name}.users"), record.get(f"{name}.status"))
        )
        parts = zip(values, users, states, strict=True)
        listed = [{"value": value, "user_id": user, "status": state} for value, user, state in parts]
        yield name.removesuffix(_FLAT), listed


def _mlflow_call(record: Record) -> Call:
    if "request" in record:  # a row of the table of traces
        return record["request"], record.get("response")
    spans = objects_in(value_at(record, "data.spans"))
    root = next((span for span in spans if not span.get("parent_span_id") and not span.get("parent_id")), {})
    known = root["attributes"] if isinstance(root.get("attributes"), dict) else {}
    return parsed(known.get("mlflow.spanInputs")), parsed(known.get("mlflow.spanOutputs"))


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


def _weave_scores(entries: Any) -> Iterable[Score]:
    for entry in objects_in(entries):
        kind, payload = entry.get("feedback_type"), unpacked(entry.get("payload"))
        if isinstance(kind, str) and isinstance(payload, dict):
            keys = ("detoned", "emoji", "value", "output")  # an emoji first without the colour of its skin
            value = next((payload[key] for key in keys if payload.get(key) is not None), None)
            yield Score(kind.removeprefix("wandb.").removesuffix(".1"), value, entry.get("creator"))


def _helicone_scores(record: Record) -> Iterable[Score]:
    given = unpacked(record.get("scores"))
    scores = dict(given) if isinstance(given, dict) else {}
    thumb, rating = scores.pop("helicone-score-feedback", None), record.get("feedback_rating")
    thumb = thumb if rating is None else int(rating) if isinstance(rating, bool) else rating
    yield from () if thumb is None else [Score("feedback", thumb)]
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
    "langfuse": RatedCalls(
        tuple(("input", "output", name) for name in _OF_LANGFUSE),
        _at("input", "output"),
        _langfuse_scores,
        json=("scores",),
        required="input",
    ),
    "langsmith": RatedCalls(
        tuple(("inputs", "outputs", name) for name in ("run_type", "feedback_stats", "dotted_order")),
        _at("inputs", "outputs", "extra.invocation_params.tools"),
        _langsmith_scores,
        json=("extra", "feedback", "feedback_stats"),
        required="inputs",
    ),
    "argilla": RatedCalls(
        (("fields", "responses"), (_FLAT,)),
        lambda record: record["fields"] if isinstance(record.get("fields"), dict) else record,
        _argilla_scores,
    ),
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
        lambda record: _weave_scores(value_at(record, "summary.weave.feedback")),
        beside=("id", lambda entry: _weave_scores([entry])),
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
    "label_studio": RatedCalls(
        (("data", "annotations"),),
        lambda record: record["data"] if isinstance(record.get("data"), dict) else {},
        _label_studio_scores,
    ),
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
