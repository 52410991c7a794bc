"""Which of the named scores of an export is the thumb."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.formats.record_format import Candidate, Origin, Rows
from bco_lightning.data.labels import NO_FEEDBACK
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, keys_of, objects_in, plain_number
from bco_lightning.errors import FeedbackRowError

# What the documentation of Langfuse and LangSmith call the score of a user's thumb.
USUAL_NAMES = (Columns().label, "user-feedback", "user_feedback", "user-score", "user_score")


def rated_by(
    scores: Mapping[str, Sequence[Any]],
    make_row: Callable[[], FeedbackRow | LeftOut],
    origin: Origin,
    users: Mapping[str, Sequence[Any]] | None = None,
    usual: tuple[str, ...] = (),
) -> Rows:
    """The rows of one answer: one for each time that the chosen score was given.

    The row is only made if there is feedback, as traces hold much that is no conversation. Where it is known which of
    the ``users`` gave each score, the other ratings of a row are of the same user.
    ``usual`` are the names that the tool itself gives a user's thumb.
    """
    try:
        chosen = _chosen(scores, origin, usual)
    except FeedbackRowError:
        if origin.labelled:
            raise
        chosen = ""
    given, users = scores.get(chosen, ()), users or {}
    if not origin.labelled:
        given, users = given[-1:] or (None,), {}
    if not given:
        yield origin.left_out(NO_FEEDBACK)
        return
    row = make_row()
    givers = users.get(chosen) or [None] * len(given)
    by_user = {name: dict(zip(map(str, names), scores[name], strict=True)) for name, names in users.items()}
    for number, (value, user) in enumerate(zip(given, givers, strict=True)):
        if isinstance(row, LeftOut):
            yield row
            continue
        if user is None:
            ratings = {name: values[min(number, len(values) - 1)] for name, values in scores.items() if values}
        else:
            ratings = {name: of[str(user)] for name, of in by_user.items() if str(user) in of} | {chosen: value}
        label = plain_number(value)
        yield Candidate(row, label, {**ratings, origin.columns.label: label})


def by_name(entries: list[Any], name: str, value: Callable[[Record], Any]) -> dict[str, list[Any]]:
    """The values of a list of scores by their name; scores without a value are none."""
    scores: dict[str, list[Any]] = {}
    for entry in objects_in(entries):
        if isinstance(entry.get(name), str):
            found = value(entry)
            scores.setdefault(entry[name], []).extend([] if found is None else [found])
    return scores


def _chosen(names: Iterable[str], origin: Origin, usual_names: tuple[str, ...]) -> str:
    """The score of the rule of ratings, else that of ``columns.label``, else the first of the usual names."""
    label, rating = origin.columns.label, origin.options.rating
    if rating is not None and rating.column is not None:
        return rating.column
    known = list(names)
    if label != Columns().label or not known:
        return label
    usual = next((name for name in (*USUAL_NAMES, *usual_names) if name in known), None)
    if usual is None:
        expected = f"expected a score {(*usual_names, USUAL_NAMES[1])[0]!r}, found {keys_of(sorted(known))}."
        raise origin.error(expected, "Name the score by data.columns.label.")
    return usual
