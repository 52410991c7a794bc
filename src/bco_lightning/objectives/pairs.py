"""Objectives of pairs: each row has half of its pair's loss, so the sum of the class means is the mean over pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bco_lightning.objectives.objective import Objective, RatedAnswers


class PairObjective(Objective):
    """What compares the two answers of a pair; a row whose other answer is not there has no loss, NaN."""

    takes_pairs = True

    def of_pairs(self, rows: RatedAnswers, others_B: Tensor) -> Tensor:
        """For each row what it adds to the loss of its pair."""
        raise NotImplementedError

    def losses(self, rows: RatedAnswers) -> Tensor:
        """In nats; NaN without the other answer."""
        if rows.others_B is None:
            return torch.full_like(rows.rewards_B, torch.nan)
        return torch.where(rows.others_B >= 0, self.of_pairs(rows, rows.others_B), torch.nan)


def _margins(values_B: Tensor, rows: RatedAnswers, others_B: Tensor) -> Tensor:
    """Thumbs-up less thumbs-down, the same for both rows of a pair."""
    return torch.where(rows.thumbs_up_B, 1, -1) * (values_B - values_B[others_B])


class DPO(PairObjective):
    r"""Direct preference optimization: :math:`-\log\sigma(r_+ - r_-)`.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """

    def of_pairs(self, rows: RatedAnswers, others_B: Tensor) -> Tensor:
        """Half of it."""
        return -logsigmoid(_margins(rows.rewards_B, rows, others_B)) / 2


class IPO(PairObjective):
    r"""Identity preference optimization: :math:`(h - 1/(2\beta))^2`, h the margin of log-ratios **per token**.

    The paper writes sums; its authors told that its results are those of means over tokens, which others compute too.

    Source:
        Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """

    def of_pairs(self, rows: RatedAnswers, others_B: Tensor) -> Tensor:
        """Half of it, in squared nats per token."""
        margins_B = _margins(rows.log_ratios_B / rows.tokens(), rows, others_B)
        return (margins_B - 1 / (2 * rows.beta)).square() / 2


class NCA(PairObjective):
    r"""Noise contrastive alignment: :math:`-\log\sigma(r_+) - \frac12\log\sigma(-r_+) - \frac12\log\sigma(-r_-)`.

    Source:
        Chen et al. 2024, arXiv:2402.05369, for two answers.
    """

    is_centered = True  # rewards are absolute

    def of_pairs(self, rows: RatedAnswers, others_B: Tensor) -> Tensor:
        """The terms of the row itself."""
        rewards_B = rows.rewards_B
        praise_B = torch.where(rows.thumbs_up_B, -logsigmoid(rewards_B), 0)
        return praise_B - logsigmoid(-rewards_B) / 2
