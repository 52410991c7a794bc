"""Threads of Chainlit with the feedback of its data layer.

One thread per record, as ``BaseDataLayer.get_thread`` and ``SQLAlchemyDataLayer.get_all_user_threads`` give it, with
feedback in the rated step or in a list for the whole thread, as the table ``feedbacks`` has it. The interface rates the
run around an answer where there is one, which means the last message of that run.

Source: the Python package chainlit 2.12.0, ``chainlit/types.py`` (``ThreadDict``, ``FeedbackDict``),
``chainlit/step.py`` (``StepDict``), ``chainlit/data/sql_alchemy.py``, and the bundled interface (``scorableRun``);
https://docs.chainlit.io, Data Persistence and Human Feedback.
"""

from __future__ import annotations

from typing import Any

from bco_lightning.batch import FeedbackRow, LeftOut, Message
from bco_lightning.data.formats.record_format import NO_ANSWER, Candidate, Origin, Rows
from bco_lightning.data.labels import NO_FEEDBACK
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, objects_in, shown

ERROR_ANSWER = "answer is an error message"
NOT_AN_ANSWER = "feedback on something that is no answer"
_ROLE_OF = {"user_message": "user", "assistant_message": "assistant"}


def matches(record: Record, columns: Columns) -> bool:
    """Whether there are steps of a thread."""
    return isinstance(record.get("steps"), list) and ("userId" in record or "createdAt" in record)


def candidates(record: Record, origin: Origin) -> Rows:
    """The rows of one thread."""
    given = origin.required(record, "steps")
    if not isinstance(given, list):
        raise origin.error(f"expected a list of steps, found {shown(given)}.")
    steps = objects_in(given)
    thumbs = _thumbs(record, steps)
    numbers = [number for number, step in enumerate(steps) if str(step.get("type")) in _ROLE_OF]
    said = [steps[number] for number in numbers]
    answers = [at for at, step in enumerate(said) if step["type"] == "assistant_message"]
    if not answers:
        yield origin.left_out(NO_ANSWER)
    for at in answers:
        rated = thumbs.pop(numbers[at], [])
        rated = rated if origin.labelled else rated[-1:] or [None]
        row: FeedbackRow | LeftOut = origin.left_out(NO_FEEDBACK if not rated else ERROR_ANSWER)
        if rated and not said[at].get("isError"):
            row = origin.answered(([_message(step)] for step in said[: at + 1]), "steps")
        for thumb in rated or [None]:
            yield row if isinstance(row, LeftOut) else Candidate(row, {origin.columns.label: thumb})
    for others in thumbs.values() if origin.labelled else ():
        yield from (origin.left_out(NOT_AN_ANSWER) for _ in others)


def _thumbs(record: Record, steps: list[Record]) -> dict[int, list[Any]]:
    """What each answer was given, by its number among the steps; under -1 what was given to none of them."""
    number_of = {str(step["id"]): number for number, step in enumerate(steps) if step.get("id") is not None}
    parents = [number_of.get(str(step.get("parentId")), -1) for step in steps]
    last_of_run: dict[int, int] = {}
    for number in reversed(range(len(steps))):
        around = parents[number] if steps[number].get("type") == "assistant_message" else -1
        while around >= 0 and around not in last_of_run:
            last_of_run[around] = number
            around = parents[around]
    # Every feedback with the number of its step: the one that it stands in, else the one that it names.
    given = [(number, step["feedback"]) for number, step in enumerate(steps) if isinstance(step.get("feedback"), dict)]
    beside = objects_in(record.get("feedback")) + objects_in(record.get("feedbacks"))
    given += [(number_of.get(str(entry.get("forId")), -1), entry) for entry in beside]
    thumbs: dict[int, list[Any]] = {}
    known: set[str] = set()
    for rated, entry in given:
        # The same feedback may stand both in its step and in the table beside the steps.
        if entry.get("value") is not None and str(entry.get("id")) not in known:
            known.update({str(entry["id"])} if entry.get("id") is not None else ())
            thumbs.setdefault(last_of_run.get(rated, rated), []).append(entry["value"])
    return thumbs


def _message(step: Record) -> Message:
    text = step.get("output") or step.get("input")
    return {"role": _ROLE_OF[step["type"]], "content": "" if isinstance(text, str) and not text.strip() else text}
