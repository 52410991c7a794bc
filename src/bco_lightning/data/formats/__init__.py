"""The layouts of feedback logs, one module for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bco_lightning.data.feedback_row import value_at
from bco_lightning.data.formats.argilla import Argilla
from bco_lightning.data.formats.chainlit import Chainlit
from bco_lightning.data.formats.chitchat import Chitchat
from bco_lightning.data.formats.langfuse import Langfuse
from bco_lightning.data.formats.langsmith import LangSmith
from bco_lightning.data.formats.open_webui import OpenWebUI
from bco_lightning.data.formats.paired import Paired
from bco_lightning.data.formats.record_format import Candidate, RecordFormat
from bco_lightning.data.formats.unpaired import Unpaired
from bco_lightning.data.source import RowFormat
from bco_lightning.errors import ConfigError

__all__ = ["FORMATS", "Candidate", "RecordFormat", "format_of"]

FORMATS: dict[str, RecordFormat] = {
    "unpaired": Unpaired(),
    "paired": Paired(),
    "open_webui": OpenWebUI(),
    "langfuse": Langfuse(),
    "langsmith": LangSmith(),
    "argilla": Argilla(),
    "chainlit": Chainlit(),
    "chitchat": Chitchat(),
}


def format_of(record: Mapping[str, Any], options: RowFormat) -> RecordFormat:
    """The format that a record looks to be of.

    Args:
        record: The first of a source.
        options: Names of columns; a format that they name is taken as it is.

    Returns:
        That of unpaired rows if it looks like none: its error names the columns.

    Raises:
        ConfigError: If it may be a rated row as well as a pair.

    Example:
        >>> format_of({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}, RowFormat()) is FORMATS["paired"]
        True
    """
    if options.format in FORMATS:
        return FORMATS[options.format]
    found = [known for known in FORMATS.values() if known.matches(record, options)]
    if found == [FORMATS["unpaired"], FORMATS["paired"]] and value_at(record, options.columns.label) is not None:
        raise ConfigError(
            "data.format",
            "expected rated rows or pairs, found records that have the columns of both.",
            "Set data.format, or the source's own format, to unpaired or to paired.",
        )
    # Exports are told by keys that rows do not have, while a row may have keys beside those of its format.
    return found[-1] if found else FORMATS["unpaired"]
