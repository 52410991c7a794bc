"""Objectives: from implicit rewards and thumbs to the loss; ``bco.py`` is the paper's Eq. 7 and Eq. 8, whole."""

from __future__ import annotations

from collections.abc import Callable

from bco_lightning.objectives.bce import BCE, bce_loss
from bco_lightning.objectives.bco import BCO, RewardShift, bco_loss, class_weights_of, mean_over_rows
from bco_lightning.objectives.objective import Baseline, Objective

# What ``model.objective`` names, made with ``model.reward_shift_decay``.
OBJECTIVES: dict[str, Callable[[float], Objective]] = {"bco": BCO, "bce": BCE}

__all__ = [
    "BCE",
    "BCO",
    "OBJECTIVES",
    "Baseline",
    "Objective",
    "RewardShift",
    "bce_loss",
    "bco_loss",
    "class_weights_of",
    "mean_over_rows",
]
