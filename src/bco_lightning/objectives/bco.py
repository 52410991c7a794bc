"""Binary classifier optimization loss.

Shape legend for this file: ``B`` = rows of a micro-batch. Rewards and losses are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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
    average. Eq. 8 is the *sum of two class means*, so the caller weights each row by rows / rows of its class.

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
        Jung et al. 2025, "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656, Eq. 8;
        the importance weights are those of its first version (UDM).
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
