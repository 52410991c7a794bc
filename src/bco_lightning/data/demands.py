"""What objectives ask of rows: the two answers of a pair, all answers to a prompt, scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info

from bco_lightning.data.options import DataOptions
from bco_lightning.data.table import Array
from bco_lightning.errors import ConfigError, FeedbackRowError


def pairs_of(rows: Dataset) -> Array:
    """Row numbers ``(P, 2)`` of the better and the worse answer of each pair: neighbours of one record and prompt."""
    places, keys, up = (np.asarray(rows.data.column(name)) for name in ("place", "prompt_key", "thumbs_up"))
    found, free = [], 0
    for first in np.flatnonzero((places[:-1] == places[1:]) & (keys[:-1] == keys[1:]) & (up[:-1] != up[1:])).tolist():
        if first >= free:
            found.append((first, first + 1) if up[first] else (first + 1, first))
            free = first + 2
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def require(objective: Any, rows: Any, name: str) -> None:
    """Refuses rows that are not what an objective takes, and says how many have lost the other answer of their pair."""
    if getattr(objective, "takes_scores", False):
        lacking = np.flatnonzero(np.asarray(rows.data.column("score").is_null()))
        if len(lacking):
            raise FeedbackRowError(
                rows[int(lacking[0])]["place"],
                f"expected a score from 0 to 1, which model.objective takes, found none ({len(lacking):,} of "
                f"{len(rows):,} {name} rows).",
                "data.rating names their column, and by scale: [0, 4] the least and the largest rating.",
            )
    if not getattr(objective, "takes_pairs", False):
        return
    pairs = pairs_of(rows)
    alone = np.setdiff1d(np.arange(len(rows)), pairs)
    if len(alone) > len(pairs):
        raise FeedbackRowError(
            rows[int(alone[0])]["place"],
            f"expected pairs, which model.objective compares, found {len(alone):,} of {len(rows):,} {name} rows that "
            "are none; this is the first.",
            "Pairs have a chosen and a rejected answer; bco, bce, kto, apo_zero and kldo take single thumbs.",
        )
    if len(alone):
        rank_zero_info(f"{name}: {len(alone):,} rows are not used, whose pair has lost its other answer")


def refuse_options(objective: Any, options: DataOptions) -> None:
    """Refuses options by which rows cannot be drawn as an objective takes them."""
    for what, words, name, expected, found in (
        ("takes_pairs", "pairs (model.objective)", "balanced_sampling", "false", options.balanced_sampling),
        ("takes_pairs", "pairs (model.objective)", "streaming", "false", options.streaming),
        ("takes_pairs", "pairs (model.objective)", "batch_size", "an even number", options.batch_size % 2),
        ("takes_scores", "scores (model.objective)", "streaming", "false", options.streaming),
        ("takes_prompts", "model.reward_shift: per_prompt", "group_by_prompt", "true", not options.group_by_prompt),
    ):
        if found and getattr(objective, what, False):
            raise ConfigError(f"data.{name}", f"expected {expected} with {words}, found {getattr(options, name)}.")
