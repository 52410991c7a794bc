"""Supervised fine-tuning on thumbs-up rows, alone or as a term beside another objective."""

from __future__ import annotations

import torch
from torch import Tensor

from bco_lightning.objectives.objective import Objective, RatedAnswers


class SFT(Objective):
    r"""Per-row loss :math:`-\log\pi(y|x) / |y|` of thumbs-up rows, 0 of others: cross-entropy in nats per token.

    Source:
        As the generation loss of Wang et al. 2024, "Mixed Preference Optimization", arXiv:2411.10442.
    """

    takes_one_class = True

    def losses(self, rows: RatedAnswers) -> Tensor:
        """In nats per token."""
        return torch.where(rows.thumbs_up_B, -rows.policy_log_probs_B / rows.tokens(), 0)
