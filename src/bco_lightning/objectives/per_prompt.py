"""BCO where every prompt has its own offset of rewards, which a pair of answers would cancel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bco_lightning.objectives.baselines import DecayedMeans
from bco_lightning.objectives.bco import BCO
from bco_lightning.objectives.objective import RatedAnswers, weighed

_SPREADS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # nats
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(11)


class PromptSpread(DecayedMeans):
    """Which spread of offsets makes the thumbs of past steps likeliest: the mean log-likelihood of each."""

    number = len(_SPREADS)

    @property
    def value(self) -> float:
        """The standard deviation of offsets in nats; 0 before any prompt had two answers in a micro-batch."""
        return _SPREADS[int(np.argmax(self.means))]


class BCOPerPrompt(BCO):
    r"""BCO with a random intercept: the logit of a row is :math:`r - \delta + b_x` with :math:`b_x \sim N(0, \tau^2)`.

    A prompt's offset is integrated out over its answers in the micro-batch, by Gauss-Hermite quadrature: the loss of a
    row is the mean of BCO's over the offset's distribution given their thumbs, whose gradient is that of the marginal
    likelihood (Fisher's identity). :math:`\tau` is estimated by empirical Bayes; at 0, and for a prompt with one
    answer, this is BCO to the bit. A new prompt's offset is not known: the threshold is the reward shift.
    """

    takes_prompts = True
    sum_names = (*(f"log_likelihood_{spread:g}" for spread in _SPREADS), "num_prompts")

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__(decay)
        self.baselines["prompt_spread"] = PromptSpread(decay)

    def losses(self, rows: RatedAnswers) -> Tensor:
        """In nats, with importance weights."""
        spread, losses_B = self.baselines["prompt_spread"].value, super().losses(rows)
        if not spread or rows.prompt_keys_B is None:
            return losses_B
        log_likelihoods_QB, log_joint_QP, prompts_B, has_several_P = self._over_offsets(rows, spread)
        posterior_QP = log_joint_QP.softmax(0).to(losses_B.dtype)
        expected_B = weighed(-(posterior_QP[:, prompts_B] * log_likelihoods_QB).sum(0), rows)
        return torch.where(has_several_P[prompts_B], expected_B, losses_B)

    def sums(self, rows: RatedAnswers) -> dict[str, Tensor]:
        """Log-likelihoods, in nats, of the thumbs of prompts with several answers, by spread; and their number."""
        if rows.prompt_keys_B is None:
            return {name: rows.rewards_B.new_zeros(()).double() for name in self.sum_names}
        found = [self._over_offsets(rows, spread) for spread in _SPREADS]
        told = [torch.where(several_P, joint_QP.logsumexp(0), 0).sum() for _, joint_QP, _, several_P in found]
        return dict(zip(self.sum_names, [*told, found[0][3].sum().double()], strict=True))

    def update(self, sums: Mapping[str, float]) -> None:
        """Moves the spread."""
        *totals, number = (sums[name] for name in self.sum_names)
        self.baselines["prompt_spread"].take_in(totals, [number] * len(totals))

    def _over_offsets(self, rows: RatedAnswers, spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of offsets: log-likelihoods of rows, and of prompts with the prior; each row's prompt; which have several."""
        nodes_Q = torch.as_tensor(spread * _NODES).to(rows.rewards_B)
        prior_Q = torch.as_tensor(np.log(_WEIGHTS) - math.log(_WEIGHTS.sum())).to(rows.rewards_B.device)
        shifted_QB = rows.rewards_B - self.threshold + nodes_Q[:, None]
        log_likelihoods_QB = logsigmoid(torch.where(rows.thumbs_up_B, shifted_QB, -shifted_QB))
        _, prompts_B, sizes_P = torch.unique(rows.prompt_keys_B, return_inverse=True, return_counts=True)
        joint_QP = prior_Q[:, None].repeat(1, len(sizes_P))
        joint_QP = joint_QP.index_add(1, prompts_B, log_likelihoods_QB.detach().double())
        return log_likelihoods_QB, joint_QP, prompts_B, sizes_P > 1
