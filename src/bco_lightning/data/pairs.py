"""The two answers of a pair: which rows they are, and that there are some where an objective compares them."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info

from bco_lightning.data.options import DataOptions
from bco_lightning.data.table import Array
from bco_lightning.errors import ConfigError, FeedbackRowError


def pairs_of(rows: Dataset) -> Array:
    """Row numbers ``(P, 2)`` of the better and the worse answer of each pair: two rows of one record and one prompt."""
    places, keys, up = (np.asarray(rows.data.column(name)) for name in ("place", "prompt_key", "thumbs_up"))
    first = np.flatnonzero((places[:-1] == places[1:]) & (keys[:-1] == keys[1:]) & up[:-1] & ~up[1:])
    return np.stack([first, first + 1], axis=1)


def require_pairs(rows: Any, name: str) -> None:
    """Refuses rows that are no pairs, and says how many have lost the other answer of theirs."""
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


def refuse_unpairable(options: DataOptions) -> None:
    """Refuses options by which pairs cannot be drawn."""
    for name, expected, found in (
        ("balanced_sampling", "false", options.balanced_sampling),
        ("streaming", "false", options.streaming),
        ("batch_size", "an even number", options.batch_size % 2 and options.batch_size),
    ):
        if found:
            raise ConfigError(f"data.{name}", f"expected {expected} with pairs (model.objective), found {found}.")
