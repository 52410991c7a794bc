"""Two answers and which is better: two rows, one right after the other.

Where people say that both are bad, both are thumbs-down, which pairs cannot say. Two columns may also hold the thumb of
an answer each.
"""

from __future__ import annotations

import json

from bco_lightning.data.formats.paired import two_rows
from bco_lightning.data.formats.record_format import Origin, Rows
from bco_lightning.data.labels import DROPPED_LABEL, NO_FEEDBACK
from bco_lightning.data.options import Columns
from bco_lightning.data.values import MISSING, Record, is_blank, keys_of, plain_number, shown, value_at

TIE = "no answer is better"
# Both answers and what compares them, by the data sets that say so: Arena, HelpSteer3, HelpSteer2, PKU-SafeRLHF.
_USUAL = (
    ("response_a", "response_b", "winner"), ("conversation_a", "conversation_b", "winner"),
    ("response1", "response2", "overall_preference"), ("response_1", "response_2", "preference_strength"),
    ("response_0", "response_1", "better_response_id"),
)  # fmt: skip
_WORDS = {
    "model_a": "first", "model_b": "second", "tie": "tie", "tie (bothbad)": "neither", "both_bad": "neither",
}  # fmt: skip
# Numbers say something else in every data set, so only those under a known name are understood.
_SIGNED, _IDS = ("overall_preference", "preference_strength"), ("better_response_id", "safer_response_id")
_THUMBS = {"first": (True, False), "second": (False, True), "both": (True, True), "neither": (False, False)}


def matches(record: Record, columns: Columns) -> bool:
    """Whether there are two answers and what compares them, or a thumb of each."""
    names = used(record, columns)[1:]
    return len(names) > 2 and all(value_at(record, name) is not None for name in names[:2])


def used(record: Record, columns: Columns) -> list[str]:
    """The columns that its rows are made of: prompt, both answers, and one or two that compare them."""
    for first, second, usual in _USUAL:
        winner = columns.winner or usual
        names = [columns.first or first, columns.second or second]
        names += [winner] if isinstance(winner, str) else winner
        if all(value_at(record, name, MISSING) is not MISSING for name in names):
            return [columns.prompt, *names]
    return [columns.prompt]


def candidates(record: Record, origin: Origin) -> Rows:
    """The two rows, in the order of the record."""
    _, *names = used(record, origin.columns)
    if not names:
        found = f"expected two answers and which is better, found {keys_of(record)}."
        raise origin.error(found, "Name their columns by data.columns.first, second and winner.")
    answers, said, labels = (names[0], names[1]), "", (MISSING, MISSING)
    if len(names) > 3:
        labels = (plain_number(value_at(record, names[2])), plain_number(value_at(record, names[3])))
    else:
        with origin.label_is_optional():
            said = _outcome(record, names[2], origin)
    if said in _THUMBS:
        yield from two_rows(record, origin, answers, _THUMBS[said])
    elif said and origin.labelled:
        yield from [origin.left_out(said)] * 2
    else:
        yield from two_rows(record, origin, answers, labels=labels)


def _outcome(record: Record, name: str, origin: Origin) -> str:
    """Which of the two is better, or the reason why neither is used."""
    value, meanings = plain_number(value_at(record, name)), origin.columns.winners or {}
    written = value if isinstance(value, str) else json.dumps(value) if isinstance(value, (int, float)) else ""
    if is_blank(value) and written not in meanings:
        return NO_FEEDBACK
    said: str = meanings.get(written) or _WORDS.get(written.strip().lower(), "")
    if not said and name in _SIGNED and type(value) in (int, float) and value == value:
        said = "first" if value < 0 else "second" if value else "tie"
    elif not said and name in _IDS:
        said = {"0": "first", "1": "second"}.get(written, "")
    if not said:
        remedy = f"""Say what each means: data.columns.winners: {{"{written or "A"}": first, "tie": both}}."""
        raise origin.error(f"{name!r} must be one of {', '.join(_WORDS)}, found {shown(value)}.", remedy)
    return {"tie": TIE, "drop": DROPPED_LABEL}.get(said, said)
