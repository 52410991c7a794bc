"""The layouts of feedback logs, one module for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bco_lightning.data.formats import (
    argilla,
    chainlit,
    chitchat,
    langfuse,
    langsmith,
    open_webui,
    paired,
    unpaired,
)
from bco_lightning.data.formats.record_format import RecordFormat
from bco_lightning.data.options import Columns
from bco_lightning.data.values import value_at
from bco_lightning.errors import ConfigError

__all__ = ["FORMATS", "format_of"]

FORMATS: dict[str, RecordFormat] = {
    "unpaired": unpaired,
    "paired": paired,
    "open_webui": open_webui,
    "langfuse": langfuse,
    "langsmith": langsmith,
    "argilla": argilla,
    "chainlit": chainlit,
    "chitchat": chitchat,
}


def format_of(record: Mapping[str, Any], columns: Columns) -> str | None:
    """Name of the format that a record looks to be of; ``None`` if it looks like none.

    Raises:
        ConfigError: If it may be a rated row as well as a pair.

    Example:
        >>> format_of({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}, Columns())
        'paired'
    """
    found = [name for name, known in FORMATS.items() if known.matches(record, columns)]
    if found == ["unpaired", "paired"] and value_at(record, columns.label) is not None:
        raise ConfigError(
            "data.format",
            "expected rated rows or pairs, found records that have the columns of both.",
            "Set data.format, or the source's own format, to unpaired or to paired.",
        )
    # Exports are told by keys that rows do not have, while a row may have keys beside those of its format.
    return found[-1] if found else None
