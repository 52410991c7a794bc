"""The reward shift: the midpoint of the two class means of the implicit reward."""

from __future__ import annotations

import math

from bco_lightning.errors import ConfigError


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
        if not 0 <= decay < 1:
            raise ConfigError("model.reward_shift_decay", f"expected a number from 0 to below 1, found {decay}.")
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
        """Takes in the rewards of one optimizer step: all micro-batches of all ranks.

        Args:
            sum_up: Sum of the rewards of thumbs-up rows, in nats.
            num_up: Number of thumbs-up rows.
            sum_down: Sum of the rewards of thumbs-down rows, in nats.
            num_down: Number of thumbs-down rows.

        Raises:
            ValueError: If a sum is not finite; the shift is then unchanged.
        """
        if not (math.isfinite(sum_up) and math.isfinite(sum_down)):
            raise ValueError(f"expected finite sums of rewards, found {sum_up} (up) and {sum_down} (down).")
        for which, (reward_sum, count) in enumerate(((sum_up, num_up), (sum_down, num_down))):
            if count:
                self._sums[which] = self.decay * self._sums[which] + reward_sum
                self._counts[which] = self.decay * self._counts[which] + count

    def state_dict(self) -> dict[str, float | list[float]]:
        """Plain numbers: ``decay``, ``sums`` and ``counts`` of up and down, and the ``value`` they imply."""
        return {"decay": self.decay, "sums": list(self._sums), "counts": list(self._counts), "value": self.value}

    def load_state_dict(self, state: dict[str, float | list[float]]) -> None:
        """Takes over sums and counts; the decay stays as configured."""
        self._sums, self._counts = list(state["sums"]), list(state["counts"])  # type: ignore[arg-type]
