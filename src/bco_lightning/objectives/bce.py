"""The binary classifier of Theorem 1: BCO without a reward shift."""

from __future__ import annotations

from torch import Tensor

from bco_lightning.objectives.bco import BCO, bco_loss


def bce_loss(
    rewards: Tensor,
    thumbs_up: Tensor,
    *,
    reward_shift: Tensor | float = 0.0,
    importance_weights: Tensor | None = None,
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


class BCE(BCO):
    """BCO without a reward shift (:func:`bce_loss`); the shift is measured all the same, to be looked at."""

    is_centered = True
