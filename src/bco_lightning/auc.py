"""The area under a ROC curve with an interval that knows that rows of one prompt go together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_95_PERCENT = 1.959963984540054


@dataclass(frozen=True)
class Auc:
    """Probability that a random positive scores higher than a random negative, ties counting half.

    Args:
        value: The estimate, 0 to 1.
        low: Lower end of its 95 % interval, which goes from 0 to 1 where one class comes from a single prompt.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_even(self) -> bool:
        """Whether the interval has 0.5 in it: no difference was found."""
        return self.low <= 0.5 <= self.high

    @classmethod
    def with_variance(cls, value: float, variance: float) -> Auc:
        """The normal interval around an estimate, kept within 0 and 1; all of it where the variance is not known."""
        half = 1.0 if math.isnan(variance) else _95_PERCENT * math.sqrt(max(variance, 0.0))
        return cls(value, max(0.0, value - half), min(1.0, value + half))


def clustered_auc(scores: Array, positive: Array, clusters: Array) -> tuple[float, float]:
    """The area, and its variance where rows come in clusters that are drawn as wholes.

    Args:
        scores: A number for each row.
        positive: Whether each row is positive; there has to be one of either kind.
        clusters: A number for each row; rows with the same number go together.

    Returns:
        The area and its variance; the variance is NaN where one class comes from a single cluster. With a cluster for
        each row it is DeLong's.

    Example:
        >>> scores, positive = np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, True, False, False])
        >>> clustered_auc(scores, positive, np.arange(4))
        (0.75, 0.125)

    Source:
        Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data", Biometrics 53.
    """
    above = _share_below(scores[positive], scores[~positive])
    below = 1 - _share_below(scores[~positive], scores[positive])
    area = float(above.mean())
    numbers = np.unique(clusters, return_inverse=True)[1]
    size = int(numbers.max()) + 1
    of_positives = _sums(numbers[positive], above - area, size)
    of_negatives = _sums(numbers[~positive], below - area, size)
    num_positive, num_negative = len(above), len(below)
    with_positives, with_negatives = len(np.unique(numbers[positive])), len(np.unique(numbers[~positive]))
    if min(with_positives, with_negatives) < 2:
        return area, math.nan
    variance = (
        with_positives / (with_positives - 1) * float(of_positives @ of_positives) / num_positive**2
        + with_negatives / (with_negatives - 1) * float(of_negatives @ of_negatives) / num_negative**2
        + 2 * size / (size - 1) * float(of_positives @ of_negatives) / (num_positive * num_negative)
    )
    return area, variance


def auc(scores: Array, positive: Array, clusters: Array) -> Auc | None:
    """The area with its interval, or nothing where a class has no row.

    Args:
        scores: A number for each row.
        positive: Whether each row is positive.
        clusters: A number for each row; rows with the same number go together.

    Returns:
        The area.
    """
    if not 0 < int(positive.sum()) < len(positive):
        return None
    return Auc.with_variance(*clustered_auc(np.asarray(scores, dtype=np.float64), positive, clusters))


def _share_below(values: Array, others: Array) -> Array:
    """For each value the share of ``others`` below it, those that are equal counting half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(others))


def _sums(numbers: Array, values: Array, size: int) -> Array:
    return np.bincount(numbers, weights=values, minlength=size)
