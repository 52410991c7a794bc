"""Losses that saturate on both sides: Kahneman-Tversky optimization, and APO-zero, which is that at a baseline of 0.

A row that is far on the wrong side moves the policy as little as one that is far on the right side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bco_lightning.objectives.baselines import DecayedMeans
from bco_lightning.objectives.objective import Objective, RatedAnswers, weighed


class APOZero(Objective):
    r"""Per-row loss :math:`\sigma(-r)` of thumbs-up rows and :math:`\sigma(r)` of thumbs-down rows.

    Source:
        D'Oosterlinck et al. 2024, "Anchored Preference Optimization", arXiv:2408.06266, Eq. 7, for rows without pairs.
    """

    takes_importance = True
    is_centered = True

    def losses(self, rows: RatedAnswers) -> Tensor:
        """How likely the wrong thumb is; from 0 to 1, without a unit."""
        shifted_B = rows.rewards_B - self.threshold
        return weighed(torch.sigmoid(torch.where(rows.thumbs_up_B, -shifted_B, shifted_B)), rows)


class KTO(APOZero):
    r"""Per-row loss :math:`1 - \sigma(\pm(r - z))` with :math:`z = \max(0, \beta\,\mathrm{KL}(\pi, \pi_{ref}))`.

    The paper's weights of its two classes are ``model.class_weights``: ``none`` is 1 and 1, ``auto`` balances them. KL
    is the mean log-ratio of answers to other prompts than their own, over all processes; only this mean is kept from
    going below 0. The paper takes it from the rows at hand; here it is a decayed mean of the steps before, like the
    reward shift, so that gradients do not depend on how a step is cut. With a decay of 0 it is that of the last step.

    Source:
        Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306, Eq. 7.
    """

    takes_unrelated = True
    keeps = ("kl_baseline", DecayedMeans)
    sum_names = ("sum_unrelated", "num_unrelated")

    @property
    def threshold(self) -> float:
        """The baseline z in nats."""
        return max(0.0, float(self.baselines["kl_baseline"].value))

    def sums(self, rows: RatedAnswers) -> dict[str, Tensor]:
        """Sum, in nats, and number of the rewards of answers to other prompts; none where they were not computed."""
        ratios_U = rows.unrelated_log_ratios_U
        rewards_U = rows.rewards_B.new_zeros(0) if ratios_U is None else rows.beta * ratios_U.detach()
        number = rewards_U.new_full((), len(rewards_U), dtype=torch.float64)
        return dict(zip(self.sum_names, (rewards_U.double().sum(), number), strict=True))
