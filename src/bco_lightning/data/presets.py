"""Public data sets by name: the options with which their records are read.

Where each was looked up stands in ``docs/feedback_logs.md``.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # As the paper uses it: of 0 to 4, only a helpfulness of 4 is thumbs-up (arXiv 2404.04656, section 4).
    "helpsteer2": {"rating": {"column": "helpfulness", "up": 4, "down": 3, "scale": [0, 4]}},
    "openai_preference": {
        "format": "paired",
        "columns": {
            "prompt": "input.messages",
            "chosen": "preferred_output",
            "rejected": "non_preferred_output",
            "tools": "input.tools",
        },
    },
    "prism": {"format": "ranked", "columns": {"label": "if_chosen"}},
    "sharelm": {
        "format": "unpaired",
        "columns": {"label": "conversation_metadata.rate", "thumbs": {"thumbup": "up", "thumbdown": "down"}},
    },
    "toxic_chat": {
        "format": "unpaired",
        "columns": {
            "prompt": "user_input",
            "completion": "model_output",
            "label": "toxicity",
            "thumbs": {"0": "up", "1": "down"},
        },
    },
    # 1 and 2 reject or correct the answer, 3 and 4 go on with it or thank for it.
    "wildfb": {
        "format": "unpaired",
        "columns": {"history": "history"},
        "rating": {"column": "label", "up": 3, "down": 2},
    },
}
