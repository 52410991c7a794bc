"""What an objective keeps from step to step: plain numbers that move after an optimizer step, never within one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bco_lightning.options import DECAY


class DecayedMeans:
    """Means over past optimizer steps, of which each counts ``decay`` times the one after it.

    All numbers are Python floats (float64), outside the reach of precision plugins.
    """

    number = 1  # of means

    def __init__(self, decay: float = 0.9) -> None:
        DECAY.check("model.reward_shift_decay", decay)
        self.decay = decay
        self._sums, self._counts = [0.0] * self.number, [0.0] * self.number

    @property
    def means(self) -> list[float]:
        """The means; 0 of what was never seen."""
        return [total / count if count else 0.0 for total, count in zip(self._sums, self._counts, strict=True)]

    @property
    def value(self) -> float:
        """What the objective compares with; here the first mean."""
        return self.means[0]

    def take_in(self, sums: Sequence[float], counts: Sequence[float]) -> None:
        """Takes in an optimizer step; a mean of which it saw nothing stays.

        Raises:
            ValueError: If a sum is not finite; nothing has changed then.
        """
        if not all(map(math.isfinite, sums)):
            raise ValueError(f"expected finite sums, found {', '.join(map(str, sums))}.")
        for which, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                self._sums[which] = self.decay * self._sums[which] + total
                self._counts[which] = self.decay * self._counts[which] + count

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: ``decay``, ``sums``, ``counts``, and the ``value`` they imply."""
        return {"decay": self.decay, "sums": list(self._sums), "counts": list(self._counts), "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over sums and counts; the decay stays as configured."""
        self._sums, self._counts = list(state["sums"]), list(state["counts"])


class RewardShift(DecayedMeans):
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

    number = 2

    @property
    def value(self) -> float:
        """The shift in nats; 0 before the first update."""
        return (self.class_means[0] + self.class_means[1]) / 2

    @property
    def class_means(self) -> tuple[float, float]:
        """Mean reward of thumbs-up and of thumbs-down rows, in nats; 0 for a class never seen."""
        up, down = self.means
        return up, down

    def update(self, *, sum_up: float, num_up: float, sum_down: float, num_down: float) -> None:
        """Takes in one optimizer step: sums of rewards, in nats, and numbers of rows, of all micro-batches and ranks.

        Raises:
            ValueError: If a sum is not finite; the shift is then unchanged.
        """
        self.take_in((sum_up, sum_down), (num_up, num_down))
