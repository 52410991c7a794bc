"""Metrics of implicit rewards over rows, the same for any number of processes; and the area under a ROC curve."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from bco_lightning.batch import ScoredRows

Array = np.ndarray[Any, Any]
NORMAL_95 = 1.959963984540054  # standard errors of half a 95 % interval
_QUANTITIES = ("rows", "reward", "loss", "correct", "error_term", "policy_log_prob", "log_ratio", "length")
_BETTER = {
    **dict.fromkeys(("loss", "error_term"), "min"),
    **dict.fromkeys(("margin", "accuracy", "accuracy_up", "accuracy_down", "auroc"), "max"),
}


class ImplicitRewardMetrics(Metric):
    """Sums and counts per class, and the rewards of rows, from which every metric follows.

    ``compute`` gives

    =================== ============================================================================================
    loss                Eq. 8 on these rows: the sum of the two class means, in nats
    reward_up, _down    mean implicit reward of thumbs-up and of thumbs-down rows, in nats
    margin              their difference
    accuracy            share of rows on the right side of the shift; a reward that equals it counts half
    accuracy_up, _down  the same for each class
    auroc               probability that a random thumbs-up row is rewarded more than a thumbs-down row, less the shift
                        of its step, ties counting half; a row takes 24 bytes until the next reset
    error_term          :math:`E_+[e^{-(r-δ)}] + E_-[e^{r-δ}]` (Theorem 4)
    log_prob_up, _down  mean log-probability of a completion under the policy, in nats
    kl                  minus the mean log-ratio: KL(reference, policy) where the reference wrote the rows
    length_up, _down    mean number of completion tokens
    =================== ============================================================================================

    and, where there are several sources, those of the rows of each as ``by_source/NAME/...``. A metric of a class
    without rows is NaN, never 0.

    Args:
        sources: Names of the sources, in the order of their numbers.
        one_class_will_do: Where all rows are of one class, ``loss`` is the mean of that one, which can be compared as
            long as the rows stay the same.
    """

    full_state_update = False

    def __init__(self, sources: Sequence[str] = (), one_class_will_do: bool = False) -> None:
        super().__init__()
        self._one_class_will_do = one_class_will_do
        self._sources = _keys_of(sources) if len(sources) > 1 else []
        self.sums_GKC: Tensor  # G sources, K quantities, C classes. Sums over rows, so over processes too.
        shape = (max(1, len(self._sources)), len(_QUANTITIES), 2)
        self.add_state("sums_GKC", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.scores: list[Tensor]  # of rows: reward less shift, 1 for thumbs-up, source
        self.add_state("scores", [], dist_reduce_fx="cat")

    def update(self, rows: ScoredRows) -> None:
        """Takes in the rows of a micro-batch."""
        device = self.sums_GKC.device
        rewards_B, up_B = rows.rewards_B.to(device).double(), rows.thumbs_up_B.to(device)
        policy_B = rows.policy_log_probs_B.to(device).double()
        shifted_B = rewards_B - rows.reward_shift
        values = {
            "rows": torch.ones_like(rewards_B),
            "reward": rewards_B,
            "loss": rows.losses_B.to(device).double(),
            "correct": torch.where(shifted_B == 0, 0.5, ((shifted_B > 0) == up_B).double()),
            "error_term": torch.exp(torch.where(up_B, -shifted_B, shifted_B)),
            "policy_log_prob": policy_B,
            "log_ratio": policy_B - rows.reference_log_probs_B.to(device).double(),
            "length": rows.completion_lengths_B.to(device).double(),
        }
        values_KB = torch.stack([values[name] for name in _QUANTITIES])
        classes_BC, sources_B = torch.stack([up_B, ~up_B], dim=1), rows.sources_B.to(device)
        for number in range(len(self.sums_GKC)):
            chosen_B = sources_B == number if self._sources else torch.ones_like(up_B)
            self.sums_GKC[number] += values_KB @ (classes_BC & chosen_B[:, None]).double()
        self.scores.append(torch.stack([shifted_B, up_B.double(), sources_B.double()], dim=1))

    @property
    def names(self) -> list[str]:
        """Those of all metrics, in the order of :meth:`compute`."""
        own = list(_metrics_of(torch.zeros(len(_QUANTITIES), 2), np.empty((0, 3))))
        return own + [f"by_source/{source}/{name}" for source in self._sources for name in own]

    @override
    def sync(self, *arguments: Any, **options: Any) -> None:
        """Has all processes know all rows; one that has none takes part like the others."""
        self.scores = [torch.cat([self.sums_GKC.new_empty(0, 3), *self.scores])]
        super().sync(*arguments, **options)

    def gathered(self) -> dict[str, Tensor]:
        """What all processes have taken in, for :meth:`take_over`; each of them has to ask."""
        with self.sync_context():
            return {"sums_GKC": self.sums_GKC.clone(), "scores": dim_zero_cat(self.scores).clone()}

    def take_over(self, gathered: dict[str, Tensor]) -> None:
        """Goes on, with nothing taken in, from what was gathered before; that of other sources is of no use."""
        sums_GKC, scores = gathered["sums_GKC"], gathered["scores"]
        if (sums_GKC.shape, scores.shape[1:]) == (self.sums_GKC.shape, (3,)):
            self.sums_GKC += sums_GKC.to(self.sums_GKC)
            self.scores.append(scores.to(self.sums_GKC))

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all rows since the last reset, over all processes; float64 scalars on the CPU."""
        sums_GKC, scores = self.sums_GKC.cpu(), dim_zero_cat(self.scores).cpu().numpy()
        values, sums_KC = _metrics_of(sums_GKC.sum(0), scores), sums_GKC.sum(0)
        if self._one_class_will_do and (rows_C := sums_KC[_QUANTITIES.index("rows")]).count_nonzero() == 1:
            values["loss"] = (sums_KC[_QUANTITIES.index("loss")] / rows_C)[rows_C > 0].sum()
        for number, (name, sums_KC) in enumerate(zip(self._sources, sums_GKC, strict=False)):
            own = _metrics_of(sums_KC, scores[scores[:, 2] == number])
            values |= {f"by_source/{name}/{key}": value for key, value in own.items()}
        return values


def better(name: str) -> str | None:
    """Whether the ``max`` or ``min`` of a metric is its best value; of some, neither is."""
    return _BETTER.get(name.rpartition("/")[2])


def _metrics_of(sums_KC: Tensor, scores: Array) -> dict[str, Tensor]:
    sums = dict(zip(_QUANTITIES, sums_KC, strict=False))
    rows_C = sums["rows"]
    mean = {name: values_C / rows_C for name, values_C in sums.items()}
    up = scores[:, 1] > 0
    ups, downs = scores[up, 0], scores[~up, 0]
    is_known = len(ups) and len(downs) and np.isfinite(scores[:, 0]).all()
    # Summed exactly, and so the same in whatever order rows come.
    wins = math.fsum(_share_below(ups, downs, np.ones(len(downs)))) if is_known else math.nan
    return {
        "loss": mean["loss"].sum(),
        "reward_up": mean["reward"][0],
        "reward_down": mean["reward"][1],
        "margin": mean["reward"][0] - mean["reward"][1],
        "accuracy": sums["correct"].sum() / rows_C.sum(),
        "auroc": torch.tensor(wins / max(1, len(ups)), dtype=torch.float64),
        "accuracy_up": mean["correct"][0],
        "accuracy_down": mean["correct"][1],
        "error_term": mean["error_term"].sum(),
        "log_prob_up": mean["policy_log_prob"][0],
        "log_prob_down": mean["policy_log_prob"][1],
        "kl": -sums["log_ratio"].sum() / rows_C.sum(),
        "length_up": mean["length"][0],
        "length_down": mean["length"][1],
    }


def _keys_of(sources: Sequence[str]) -> list[str]:
    """A name for each source that can stand in that of a metric, different for each."""
    keys: list[str] = []
    for number, source in enumerate(sources):
        key = re.sub(r"[^\w.-]+", "_", source).strip("_") or "source"
        while key in keys:
            key += f"_{number}"
        keys.append(key)
    return keys


@dataclass(frozen=True)
class Auc:
    """Probability that a random positive scores higher than a random negative, ties counting half."""

    value: float
    low: float  # of its 95 % interval, which goes from 0 to 1 where one class comes from a single prompt
    high: float

    @property
    def is_even(self) -> bool:
        """Whether all of the interval is within 0.1 of a half: not just "no difference was shown"."""
        return self.low >= 0.4 and self.high <= 0.6

    @classmethod
    def mean_of(cls, areas: Sequence[tuple[float, float]]) -> Auc:
        """The mean of areas, each with its variance; the interval is normal, and everything where one is not known."""
        values, variances = zip(*areas, strict=True)
        value, variance = float(np.mean(values)), float(np.sum(variances)) / len(areas) ** 2
        half = 1.0 if math.isnan(variance) else NORMAL_95 * math.sqrt(max(variance, 0.0))
        return cls(value, max(0.0, value - half), min(1.0, value + half))


def clustered_auc(scores: Array, positive: Array, clusters: Array, weights: Array | None = None) -> tuple[float, float]:
    """The area, and its variance where rows come in clusters that are drawn as wholes.

    There has to be a row of either class. Rows with the same number in ``clusters`` go together; a row of weight 2 is
    two equal rows of one cluster. The variance is NaN where one class comes from a single cluster; with a cluster for
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
    of_positives = np.bincount(numbers[positive], of_up * (above - area), size)
    of_negatives = np.bincount(numbers[~positive], of_down * (below - area), size)
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
    """:func:`clustered_auc` with its interval, or nothing where a class has no row."""
    if not 0 < int(positive.sum()) < len(positive):
        return None
    return Auc.mean_of([clustered_auc(np.asarray(scores, dtype=np.float64), positive, clusters)])


def _share_below(values: Array, others: Array, weights: Array) -> Array:
    """For each value the share, by weight, of ``others`` below it, those that are equal counting half."""
    order = np.argsort(others, kind="stable")
    up_to = np.concatenate([[0.0], np.cumsum(weights[order])])
    places = (np.searchsorted(others[order], values, side) for side in ("left", "right"))
    shares: Array = sum(up_to[place] for place in places) / (2 * up_to[-1])
    return shares
