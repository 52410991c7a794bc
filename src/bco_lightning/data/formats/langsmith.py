"""Runs of LangSmith with their feedback.

One run per record, as ``Client.list_runs`` and the bulk export give it. What ``Client.list_feedback`` gives may stand
beside it under ``feedback``; it has every user's own word where ``feedback_stats`` only has the mean.

Source: the Python package langsmith 0.15.0, ``langsmith/schemas.py`` (``Run``, ``FeedbackBase``) and
``langsmith/types/run.py`` (``FeedbackStats``); https://docs.langchain.com/langsmith/feedback-data-format. Messages are
understood in OpenAI's form and in those of langchain-core 1.8.2 (``dumpd``, ``message_to_dict``, ``model_dump``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bco_lightning.data.formats.record_format import Candidate, Origin, Rows
from bco_lightning.data.formats.scores import by_name, rated_by
from bco_lightning.data.formats.traces import traced_row
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, from_json_text, value_at

MIXED = "mean of several users' feedback"
MAX_RATINGS = 10_000
_SEVERAL = object()
_OF_LANGSMITH = ("run_type", "feedback_stats", "dotted_order")


def matches(record: Record, columns: Columns) -> bool:
    """Whether there are inputs, outputs, and a field that only runs have."""
    return "inputs" in record and "outputs" in record and any(name in record for name in _OF_LANGSMITH)


def candidates(record: Record, origin: Origin) -> Rows:
    """The rows of one run."""
    extra = from_json_text(record.get("extra"), "extra", origin.place)
    tools = value_at(extra, "invocation_params.tools") if isinstance(extra, dict) else None
    make_row = partial(traced_row, record, ("inputs", "outputs"), origin, tools)
    for item in rated_by(_scores(record, origin), make_row, origin):
        label = item.label if isinstance(item, Candidate) else None
        is_mean = origin.options.rating is None and isinstance(label, float) and record.get("feedback") is None
        yield origin.left_out(MIXED) if label is _SEVERAL or is_mean else item


def _scores(record: Record, origin: Origin) -> dict[str, list[Any]]:
    feedback = from_json_text(record.get("feedback"), "feedback", origin.place)
    if isinstance(feedback, list):
        return by_name(feedback, "key", lambda entry: entry.get("value" if entry.get("score") is None else "score"))
    stats = from_json_text(record.get("feedback_stats"), "feedback_stats", origin.place)
    if not isinstance(stats, dict):
        return {}
    return {key: _given(stat, origin) for key, stat in stats.items() if isinstance(stat, dict)}


def _given(stat: Record, origin: Origin) -> list[Any]:
    """The mean of numbers, unless it stands for different ones and is to be a thumb; or each word as often as said."""
    if stat.get("avg") is not None:
        # The mean of +1 and -1 looks like a thumb, too.
        least, most = stat.get("min"), stat.get("max")
        alike = stat.get("n") in (None, 1) if least is None or most is None else least == most
        return [stat["avg"] if alike or origin.options.rating is not None else _SEVERAL]
    words = stat.get("values")
    if not isinstance(words, dict):
        return []
    said = {word: times for word, times in words.items() if isinstance(times, int) and times > 0}
    if sum(said.values()) > MAX_RATINGS:
        raise origin.error(f"expected at most {MAX_RATINGS:,} ratings of one run, found more.")
    return [word for word, times in said.items() for _ in range(times)]
