r"""Binary classifier optimization, the whole method: from implicit rewards and thumbs to the loss of a step.

The implicit reward of a row is :math:`r = \beta\,(\log\pi(y|x) - \log\pi_{ref}(y|x))`, summed over completion tokens.
:class:`~bco_lightning.objectives.RewardShift` is Eq. 7; :func:`bco_loss` is what Eq. 8 takes means of;
:func:`class_weights_of` and :func:`mean_over_rows` make its sum of two class means a mean over rows. Rewards and losses
are in nats.

Source: Jung et al. 2025, "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bco_lightning.objectives.objective import Objective, RatedAnswers, weighed


def bco_loss(
    rewards: Tensor, thumbs_up: Tensor, *, reward_shift: Tensor | float, importance_weights: Tensor | None = None
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
        found = f"{thumbs_up.dtype} of {tuple(thumbs_up.shape)}"
        raise ValueError(f"thumbs_up must be bool of shape {tuple(rewards.shape)}, found {found}.")
    shifted = rewards - reward_shift
    losses = -logsigmoid(torch.where(thumbs_up, shifted, -shifted))
    return losses if importance_weights is None else losses * importance_weights


def bce_loss(
    rewards: Tensor, thumbs_up: Tensor, *, reward_shift: Tensor | float = 0.0, importance_weights: Tensor | None = None
) -> Tensor:
    r"""Per-row loss :math:`-w_i \log \sigma(s_i r_i)`: :func:`bco_loss` with :math:`\delta = 0` (Theorem 1).

    Args:
        rewards: As for :func:`bco_loss`.
        thumbs_up: As for :func:`bco_loss`.
        reward_shift: Ignored, so that objectives can be exchanged.
        importance_weights: As for :func:`bco_loss`.

    Returns:
        The loss of each row, shape ``(B,)``, in nats.
    """
    return bco_loss(rewards, thumbs_up, reward_shift=0.0, importance_weights=importance_weights)


def class_weights_of(share_up: float, share_down: float) -> tuple[float, float]:
    r"""Weights :math:`n / n_c` of thumbs-up and thumbs-down rows, constants of the data.

    With them the mean over rows is Eq. 8, :math:`E_+[\ell] + E_-[\ell]`, whatever the shares: its gradient depends
    neither on how a step is cut into micro-batches nor on which rows fall into one. The shares are those among the
    rows that are drawn; a class without rows has no weight.

    Example:
        >>> class_weights_of(0.25, 0.75)
        (4.0, 1.3333333333333333)
    """
    return (1 / share_up if share_up else 0.0), (1 / share_down if share_down else 0.0)


def mean_over_rows(losses_B: Tensor, thumbs_up_B: Tensor, class_weights: tuple[float, float]) -> Tensor:
    """Mean of losses by the class weights of thumbs-up and thumbs-down rows, a scalar.

    Example:
        >>> losses, up = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([True, False, False, False])
        >>> float(mean_over_rows(losses, up, class_weights_of(1 / 4, 3 / 4))), 1 + (2 + 3 + 4) / 3
        (4.0, 4.0)
    """
    up, down = class_weights
    return (torch.where(thumbs_up_B, up, down) * losses_B).mean()


class BCO(Objective):
    """A logistic classifier of rewards less the shift (:func:`bco_loss`)."""

    takes_importance = True

    def losses(self, rows: RatedAnswers) -> Tensor:
        """:func:`bco_loss`, with importance weights, in nats."""
        return weighed(bco_loss(rows.rewards_B, rows.thumbs_up_B, reward_shift=self.threshold), rows)


class BCE(BCO):
    """BCO without a reward shift (:func:`bce_loss`); the shift is measured all the same, to be looked at."""

    is_centered = True
