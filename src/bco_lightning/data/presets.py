"""Public data sets by name: the options with which their records are read.

Where each was looked up stands in ``docs/feedback_logs.md``.
"""

from __future__ import annotations

from typing import Any

from bco_lightning.data.values import Record, value_at

_OPENAI = {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}
_LLAVA = {
    "prompt": "conversations", "first": "output_1", "second": "output_2", "winner": "preference", "images": "image"
}  # fmt: skip
_RLHF_V = {"prompt": "text.question", "chosen": "text.chosen", "rejected": "text.rejected", "images": "image"}
_SHARELM = {"label": "conversation_metadata.rate", "thumbs": {"thumbup": "up", "thumbdown": "down"}}
_TOXIC_CHAT = {"prompt": "user_input", "completion": "model_output", "label": "toxicity"}
PRESETS: dict[str, dict[str, Any]] = {
    # As the paper uses it: of 0 to 4, only a helpfulness of 4 is thumbs-up (arXiv 2404.04656, section 4).
    "helpsteer2": {"rating": {"column": "helpfulness", "up": 4, "down": 3, "scale": [0, 4]}},
    "llava_rlhf": {"format": "compared", "columns": {**_LLAVA, "winners": {"1": "first", "2": "second"}}},
    "openai_preference": {"format": "paired", "columns": {**_OPENAI, "tools": "input.tools"}},
    "rlaif_v": {"columns": {"prompt": "question", "images": "image"}},  # and MMPR
    "rlhf_v": {"columns": _RLHF_V},
    "sharelm": {"format": "unpaired", "columns": _SHARELM},
    "toxic_chat": {"format": "unpaired", "columns": {**_TOXIC_CHAT, "thumbs": {"0": "up", "1": "down"}}},
    # 1 and 2 reject or correct the answer, 3 and 4 go on with it or thank for it.
    "wildfb": {"columns": {"history": "history"}, "rating": {"column": "label", "up": 3, "down": 2}},
}


def presets_for(record: Record) -> list[str]:
    """The data sets of which a record has all columns."""
    columns = {name: preset.get("columns", {}).values() for name, preset in PRESETS.items()}
    of = {name: [one for one in values if isinstance(one, str)] for name, values in columns.items()}
    return [name for name in of if len(of[name]) > 1 and all(value_at(record, one) is not None for one in of[name])]
