"""KL divergence optimization: the rewards are to tell the two classes apart as the Donsker-Varadhan bound does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bco_lightning.objectives.baselines import DecayedMeans
from bco_lightning.objectives.objective import Objective, RatedAnswers


class KLDO(Objective):
    r"""Loss :math:`-E_+[r] + \log E_-[e^r]`, by row :math:`-r` up and :math:`e^r / Z + \log Z - 1` down.

    The logarithm of a mean is no mean over rows. Its tangent at :math:`Z` is; it touches the logarithm, and has its
    gradient, where :math:`Z = E_-[e^r]`. :math:`Z` is a decayed mean over past steps, as in neural estimates of mutual
    information. The loss has no lower bound: an answer that is praised is worth ever more.

    Source:
        Haldar et al. 2025, "LLM Safety Alignment is Divergence Estimation in Disguise", arXiv:2502.00657.
    """

    keeps = ("partition", DecayedMeans)
    sum_names = ("sum_exp_down", "num_exp_down")

    @property
    def threshold(self) -> float:
        """The logarithm of Z, in nats: there a row is as likely of one class as of the other."""
        return math.log(self.baselines["partition"].value or 1.0)

    def losses(self, rows: RatedAnswers) -> Tensor:
        """In nats."""
        down_B = torch.exp(rows.rewards_B - self.threshold) + self.threshold - 1
        return torch.where(rows.thumbs_up_B, -rows.rewards_B, down_B)

    def sums(self, rows: RatedAnswers) -> dict[str, Tensor]:
        """Sum of exponentiated rewards, and number, of thumbs-down rows."""
        down_B = ~rows.thumbs_up_B
        exps_B = torch.where(down_B, rows.rewards_B.detach().double(), -torch.inf).exp()
        return dict(zip(self.sum_names, (exps_B.sum(), down_B.sum().double()), strict=True))
