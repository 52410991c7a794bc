"""The layouts of feedback logs, a module or a description for each.

``matches(record, columns)`` says whether a record looks like one of the format; ``candidates(record, origin)`` gives
its rows, each as a :class:`~.record_format.Candidate` or left out, or raises a FeedbackRowError. Where records are rows
and no tool's export, ``used(record, columns)`` names the columns that rows are made of.
"""

from __future__ import annotations

from types import ModuleType

from bco_lightning.data.formats import chainlit, chitchat, compared, librechat, open_webui, paired, ranked, unpaired
from bco_lightning.data.formats.exports import EXPORTS
from bco_lightning.data.formats.rated_calls import RatedCalls
from bco_lightning.data.options import Columns
from bco_lightning.data.values import Record, value_at
from bco_lightning.errors import ConfigError

__all__ = ["FORMATS", "format_of"]

# Exports are told by keys that rows do not have, while a row may have keys beside those of its format: they come last.
_ROWS = {"unpaired": unpaired, "ranked": ranked, "compared": compared, "paired": paired}
_CHATS = {"open_webui": open_webui, "chainlit": chainlit, "chitchat": chitchat, "librechat": librechat}
FORMATS: dict[str, ModuleType | RatedCalls] = {**_ROWS, **_CHATS, **EXPORTS}


def format_of(record: Record, columns: Columns) -> str | None:
    """Name of the format that a record looks to be of; ``None`` if it looks like none."""
    found = [name for name, known in FORMATS.items() if known.matches(record, columns)]
    others = found[1:] if found[:1] == ["unpaired"] and value_at(record, columns.label) is not None else []
    if others and set(others) <= _ROWS.keys():
        found_both = "expected rated rows or pairs, found records that have the columns of both."
        remedy = f"Set data.format, or the source's own format, to unpaired or to {others[-1]}."
        raise ConfigError("data.format", found_both, remedy)
    return found[-1] if found else None
