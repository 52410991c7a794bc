r"""Binary classifier optimization, the whole method: from implicit rewards and thumbs to the loss of a step.

The implicit reward of a row is :math:`r = \beta\,(\log\pi(y|x) - \log\pi_{ref}(y|x))`, summed over completion tokens.
:class:`RewardShift` is Eq. 7; :func:`bco_loss` is what Eq. 8 takes means of; :func:`class_weights_of` and
:func:`mean_over_rows` make its sum of two class means a mean over rows. Rewards and losses are in nats.

Source: Jung et al. 2025, "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bco_lightning.options import DECAY


class RewardShift:
    r"""Estimates :math:`\delta = (E_+[r] + E_-[r]) / 2` from the rewards of past optimizer steps.

    For each class it keeps a decayed sum and a decayed count, so the class mean has no bias from its first value on:

    .. math::
        S_c \leftarrow d\,S_c + \sum_{i \in c} r_i, \qquad N_c \leftarrow d\,N_c + n_c, \qquad
        \delta = \tfrac{1}{2}\left(S_+ / N_+ + S_- / N_-\right)

    A class that a step does not see keeps its mean. A class never seen counts as 0, which is what every implicit reward
    is before the first step. All numbers are Python floats (float64), outside the reach of precision plugins.

    Args:
        decay: :math:`d` per optimizer step, from 0 (last step only) to below 1. The paper names a moving average but no
            decay; 0.9 tracked the true midpoint best among those that were tried.

    Raises:
        ConfigError: If ``decay`` is out of range.

    Example:
        >>> shift = RewardShift()
        >>> shift.value
        0.0
        >>> shift.update(sum_up=8.0, num_up=4, sum_down=-2.0, num_down=1)
        >>> shift.value
        0.0
        >>> shift.update(sum_up=0.0, num_up=0, sum_down=0.0, num_down=1)  # the downs' mean is now -1.8 / 1.9
        >>> round(shift.value, 4)
        0.5263

    Source:
        arXiv:2404.04656, Eq. 7.
    """

    def __init__(self, decay: float = 0.9) -> None:
        DECAY.check("model.reward_shift_decay", decay)
        self.decay = decay
        self._sums, self._counts = [0.0, 0.0], [0.0, 0.0]

    @property
    def value(self) -> float:
        """The shift in nats; 0 before the first update."""
        return (self.class_means[0] + self.class_means[1]) / 2

    @property
    def class_means(self) -> tuple[float, float]:
        """Mean reward of thumbs-up and of thumbs-down rows, in nats; 0 for a class never seen."""
        up, down = (s / n if n else 0.0 for s, n in zip(self._sums, self._counts, strict=True))
        return up, down

    def update(self, *, sum_up: float, num_up: float, sum_down: float, num_down: float) -> None:
        """Takes in one optimizer step: sums of rewards, in nats, and numbers of rows, of all micro-batches and ranks.

        Raises:
            ValueError: If a sum is not finite; the shift is then unchanged.
        """
        if not (math.isfinite(sum_up) and math.isfinite(sum_down)):
            raise ValueError(f"expected finite sums of rewards, found {sum_up} (up) and {sum_down} (down).")
        for which, (reward_sum, count) in enumerate(((sum_up, num_up), (sum_down, num_down))):
            if count:
                self._sums[which] = self.decay * self._sums[which] + reward_sum
                self._counts[which] = self.decay * self._counts[which] + count

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: ``decay``, ``sums`` and ``counts`` of up and down, and the ``value`` they imply."""
        return {"decay": self.decay, "sums": list(self._sums), "counts": list(self._counts), "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over sums and counts; the decay stays as configured."""
        self._sums, self._counts = list(state["sums"]), list(state["counts"])


def bco_loss(
    rewards: Tensor,
    thumbs_up: Tensor,
    *,
    reward_shift: Tensor | float,
    importance_weights: Tensor | None = None,
) -> Tensor:
    r"""Per-row BCO loss: a logistic classifier whose logit is the shifted implicit reward.

    .. math::
        \ell_i = -w_i \log \sigma\bigl(s_i \, (r_i - \delta)\bigr), \qquad
        s_i = +1 \text{ for thumbs-up}, \; -1 \text{ for thumbs-down}

    A row at the decision boundary (:math:`r_i = \delta`) costs :math:`\log 2` nats whatever its label. The function is
    pure: it does not update the shift (see :class:`~bco_lightning.callbacks.RewardShiftUpdate`), and it does not
    average: Eq. 8 is the *sum of two class means*, see :func:`class_weights_of`.

    Args:
        rewards: Implicit rewards, beta times the log-ratio summed over completion tokens; shape ``(B,)``, float32 or
            float64. Carries the gradient.
        thumbs_up: ``True`` where the user gave thumbs-up; shape ``(B,)``, bool.
        reward_shift: The shift :math:`\delta` in nats, a scalar without gradient.
        importance_weights: Density-ratio weights, dimensionless, non-negative, shape ``(B,)``. ``None`` means 1.

    Returns:
        The loss of each row, shape ``(B,)``.

    Raises:
        ValueError: If ``reward_shift`` requires a gradient (it would then be trained by accident), if the shapes
            differ, or if ``thumbs_up`` is not bool.

    Example:
        >>> rewards = torch.tensor([0.5, 0.5, -1.0])
        >>> thumbs_up = torch.tensor([True, False, False])
        >>> bco_loss(rewards, thumbs_up, reward_shift=0.5)
        tensor([0.6931, 0.6931, 0.2014])

    Source:
        arXiv:2404.04656, Eq. 8; the importance weights are those of its first version (UDM).
    """
    if isinstance(reward_shift, Tensor) and reward_shift.requires_grad:
        raise ValueError("reward_shift must not require a gradient, found one that does. Detach it.")
    if rewards.shape != thumbs_up.shape or thumbs_up.dtype != torch.bool:
        raise ValueError(
            f"thumbs_up must be bool of shape {tuple(rewards.shape)}, "
            f"found {thumbs_up.dtype} of {tuple(thumbs_up.shape)}."
        )
    shifted = rewards - reward_shift
    losses = -logsigmoid(torch.where(thumbs_up, shifted, -shifted))
    return losses if importance_weights is None else losses * importance_weights


def class_weights_of(share_up: float, share_down: float) -> tuple[float, float]:
    r"""Weights :math:`n / n_c` of thumbs-up and thumbs-down rows, constants of the data.

    With them the mean over rows is Eq. 8, :math:`E_+[\ell] + E_-[\ell]`, whatever the shares: its gradient depends
    neither on how a step is cut into micro-batches nor on which rows fall into one. The shares, above 0, are those
    among the rows that are drawn.

    Example:
        >>> class_weights_of(0.25, 0.75)
        (4.0, 1.3333333333333333)
    """
    return 1 / share_up, 1 / share_down


def mean_over_rows(losses_B: Tensor, thumbs_up_B: Tensor, class_weights: tuple[float, float]) -> Tensor:
    """Mean of losses by the class weights of thumbs-up and thumbs-down rows, a scalar.

    Example:
        >>> losses, up = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([True, False, False, False])
        >>> float(mean_over_rows(losses, up, class_weights_of(1 / 4, 3 / 4))), 1 + (2 + 3 + 4) / 3
        (4.0, 4.0)
    """
    up, down = class_weights
    return (torch.where(thumbs_up_B, up, down) * losses_B).mean()


class BCO:
    """The objective as the module uses it: what compares a row's reward with :attr:`threshold`."""

    def __init__(self, decay: float) -> None:
        self.reward_shift = RewardShift(decay)

    @property
    def threshold(self) -> float:
        """The reward in nats above which a row counts as thumbs-up; it stands still within a step."""
        return self.reward_shift.value

    def losses(self, rewards_B: Tensor, thumbs_up_B: Tensor, importance_weights_B: Tensor) -> Tensor:
        """:func:`bco_loss` with thumbs-down rows weighted by how much likelier their prompt is among thumbs-up rows.

        Source:
            arXiv:2404.04656v1, "Underlying distribution matching"; later versions of the paper leave it out.
        """
        weights_B = torch.where(thumbs_up_B, 1.0, importance_weights_B)
        return bco_loss(rewards_B, thumbs_up_B, reward_shift=self.threshold, importance_weights=weights_B)
