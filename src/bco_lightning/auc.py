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


def clustered_auc(scores: Array, positive: Array, clusters: Array, weights: Array | None = None) -> tuple[float, float]:
    """The area, and its variance where rows come in clusters that are drawn as wholes.

    Args:
        scores: A number for each row.
        positive: Whether each row is positive; there has to be one of either kind.
        clusters: A number for each row; rows with the same number go together.
        weights: What each row counts for, above 0; 1 if left out. A row of weight 2 is two equal rows of one cluster.

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
    weights = np.ones(len(scores)) if weights is None else weights
    of_up, of_down = weights[positive], weights[~positive]
    above = _share_below(scores[positive], scores[~positive], of_down)
    below = 1 - _share_below(scores[~positive], scores[positive], of_up)
    area = float(np.average(above, weights=of_up))
    numbers = np.unique(clusters, return_inverse=True)[1]
    size = int(numbers.max()) + 1
    of_positives = _sums(numbers[positive], of_up * (above - area), size)
    of_negatives = _sums(numbers[~positive], of_down * (below - area), size)
    num_positive, num_negative = float(of_up.sum()), float(of_down.sum())
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


def _share_below(values: Array, others: Array, weights: Array) -> Array:
    """For each value the share, by weight, of ``others`` below it, those that are equal counting half."""
    order = np.argsort(others, kind="stable")
    up_to = np.concatenate([[0.0], np.cumsum(weights[order])])
    places = (np.searchsorted(others[order], values, side) for side in ("left", "right"))
    shares: Array = sum(up_to[place] for place in places) / (2 * up_to[-1])
    return shares


def _sums(numbers: Array, values: Array, size: int) -> Array:
    return np.bincount(numbers, weights=values, minlength=size)
