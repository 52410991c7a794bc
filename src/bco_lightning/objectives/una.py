"""Unified alignment with scores: the implicit reward is to say how good an answer is, not only whether it is."""

from __future__ import annotations

import torch
from torch import Tensor

from bco_lightning.objectives.objective import Objective, RatedAnswers


class UNA(Objective):
    r"""Per-row loss :math:`(\sigma(r) - s)^2` with a score s from 0 to 1; thumbs play no part, nor do class weights.

    Source:
        Wang et al. 2024, "UNA", arXiv:2408.15339, for scores; the logistic function is in the authors' own code.
    """

    takes_scores = True
    takes_class_weights = False
    takes_one_class = True
    is_centered = True  # there the score is a half

    def losses(self, rows: RatedAnswers) -> Tensor:
        """Without a unit; NaN without scores."""
        if rows.scores_B is None:
            return torch.full_like(rows.rewards_B, torch.nan)
        return (torch.sigmoid(rows.rewards_B) - rows.scores_B).square()
