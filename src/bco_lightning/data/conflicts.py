"""What to do with answers that have thumbs of both kinds."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from bco_lightning.errors import check_choice

Conflicts = Literal["keep", "drop", "majority", "last"]
CONFLICTING = "conflicting thumbs on one answer (data.conflicts)"


def rows_in_conflict(
    answer_keys: np.ndarray[Any, Any], thumbs_up: np.ndarray[Any, Any], rule: Conflicts
) -> np.ndarray[Any, Any]:
    """Which rows a rule leaves out because their answer has thumbs of the other kind too.

    Args:
        answer_keys: A number for the prompt and completion of each row.
        thumbs_up: The thumb of each row.
        rule: ``keep`` leaves out none; ``drop`` all rows of such an answer; ``majority`` those of its rarer thumb, or
            all where both are as frequent; ``last`` those whose thumb is not that of its last row.

    Returns:
        A mask over the rows.

    Raises:
        ConfigError: If there is no such rule.

    Example:
        >>> keys, thumbs = np.array([7, 7, 7, 8]), np.array([True, False, True, False])
        >>> [rows_in_conflict(keys, thumbs, rule).tolist() for rule in ("drop", "majority")]
        [[True, True, True, False], [False, True, False, False]]
    """
    check_choice("data.conflicts", rule, get_args(Conflicts))
    if rule == "keep" or not len(answer_keys):
        return np.zeros(len(answer_keys), dtype=bool)
    _, answers = np.unique(answer_keys, return_inverse=True)
    num_up, num_down = np.bincount(answers, thumbs_up), np.bincount(answers, ~thumbs_up)
    conflicting = (np.minimum(num_up, num_down) > 0)[answers]
    losing = np.ones(len(answer_keys), dtype=bool)
    if rule == "majority":
        losing = np.where(thumbs_up, num_up[answers] <= num_down[answers], num_down[answers] <= num_up[answers])
    elif rule == "last":
        last = np.zeros(len(num_up), dtype=np.int64)
        np.maximum.at(last, answers, np.arange(len(answers)))
        losing = thumbs_up != thumbs_up[last[answers]]
    return np.logical_and(conflicting, losing)
