"""What a run can train on, by the names of ``model.objective``; ``bco.py`` is the method."""

from bco_lightning.objectives.baselines import DecayedMeans, RewardShift
from bco_lightning.objectives.bco import bce_loss, bco_loss, class_weights_of, mean_over_rows
from bco_lightning.objectives.mix import Mix
from bco_lightning.objectives.named import OBJECTIVES, chosen_class_weights, make_objective, objective_of
from bco_lightning.objectives.objective import Objective, RatedAnswers, sums_of_rewards

__all__ = [
    "OBJECTIVES",
    "DecayedMeans",
    "Mix",
    "Objective",
    "RatedAnswers",
    "RewardShift",
    "bce_loss",
    "bco_loss",
    "chosen_class_weights",
    "class_weights_of",
    "make_objective",
    "mean_over_rows",
    "objective_of",
    "sums_of_rewards",
]
