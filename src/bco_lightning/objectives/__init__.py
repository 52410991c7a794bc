"""What a run can train on, by the names of ``model.objective``; ``bco.py`` is the method."""

from bco_lightning.objectives.bce import BCE, bce_loss
from bco_lightning.objectives.bco import BCO, RewardShift, bco_loss, class_weights_of, mean_over_rows

__all__ = ["OBJECTIVES", "RewardShift", "bce_loss", "bco_loss", "class_weights_of", "mean_over_rows"]

OBJECTIVES: dict[str, type[BCO]] = {"bco": BCO, "bce": BCE}
