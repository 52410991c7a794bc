"""Objectives: pure functions from implicit rewards and thumbs to one loss per row."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bco_lightning.objectives.bce import bce_loss
from bco_lightning.objectives.bco import bco_loss


class Objective(Protocol):
    """What the module calls; see :func:`bco_loss` for the arguments."""

    def __call__(
        self,
        rewards: Tensor,
        thumbs_up: Tensor,
        *,
        reward_shift: Tensor | float,
        importance_weights: Tensor | None = None,
    ) -> Tensor:
        """Gives one loss per row, in nats."""
        ...


OBJECTIVES: dict[str, Objective] = {"bco": bco_loss, "bce": bce_loss}

__all__ = ["OBJECTIVES", "Objective", "bce_loss", "bco_loss"]
