"""BCO with other shifts than one for all: where prompts have offsets of their own, and where raters look at length."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bco_lightning.objectives.baselines import DecayedMeans
from bco_lightning.objectives.bco import BCO, bco_loss
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
    keeps = ("prompt_spread", PromptSpread)
    sum_names = (*(f"log_likelihood_{spread:g}" for spread in _SPREADS), "num_prompts")

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


class LengthOdds(DecayedMeans):
    """How the log odds of thumbs-up grow with the logarithm of length, as in two normal classes of one variance."""

    number = 4  # logarithms of the tokens of thumbs-up and of thumbs-down rows, and their squares

    @property
    def value(self) -> float:
        """Nats of log odds for each nat of length, by Fisher's discriminant; 0 until lengths of both classes differ."""
        up, down, *squares = self.means
        variance = (sum(squares) - up**2 - down**2) / 2
        return (up - down) / variance if min(self._counts) and variance > 1e-6 else 0.0


class BCOByLength(BCO):
    r"""BCO with a shift that falls with length as thumbs favour it: :math:`\delta - a (\log n - m)` for n tokens.

    What length explains of the thumbs is not asked of the rewards. A new answer is compared with :math:`\delta`.
    """

    keeps = ("length_odds", lambda _: LengthOdds(0.999))  # lengths of a log stay what they are, rewards do not
    sum_names = ("log_length_up", "log_length_down", "squares_up", "squares_down", "rows_up", "rows_down")

    def losses(self, rows: RatedAnswers) -> Tensor:
        """:func:`bco_loss`, with importance weights, in nats."""
        odds, logs_B = self.baselines["length_odds"], rows.tokens().to(rows.rewards_B.dtype).log()
        shift_B = self.threshold - odds.value * (logs_B - sum(odds.means[:2]) / 2)
        return weighed(bco_loss(rows.rewards_B, rows.thumbs_up_B, reward_shift=shift_B), rows)

    def sums(self, rows: RatedAnswers) -> dict[str, Tensor]:
        """Moments of the logarithms of lengths, and numbers of rows, of either class."""
        logs_B, classes_CB = rows.tokens().double().log(), torch.stack([rows.thumbs_up_B, ~rows.thumbs_up_B]).double()
        found = [classes_CB @ values_B for values_B in (logs_B, logs_B.square(), torch.ones_like(logs_B))]
        return dict(zip(self.sum_names, torch.cat(found), strict=True))
