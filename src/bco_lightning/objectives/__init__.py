"""What a run can train on, by the names of ``model.objective``; ``bco.py`` is the method."""

from bco_lightning.objectives.baselines import DecayedMeans, RewardShift
from bco_lightning.objectives.bce import BCE, bce_loss
from bco_lightning.objectives.bco import BCO, bco_loss, class_weights_of, mean_over_rows
from bco_lightning.objectives.objective import Objective, RatedAnswers, sums_of_rewards

__all__ = [
    "OBJECTIVES",
    "DecayedMeans",
    "Objective",
    "RatedAnswers",
    "RewardShift",
    "bce_loss",
    "bco_loss",
    "class_weights_of",
    "mean_over_rows",
    "sums_of_rewards",
]

OBJECTIVES: dict[str, type[Objective]] = {"bco": BCO, "bce": BCE}
