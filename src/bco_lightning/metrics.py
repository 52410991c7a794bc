"""Metrics of implicit rewards, over rows and not over batches, the same for any number of processes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC

from bco_lightning.batch import ScoredRows

_QUANTITIES = ("rows", "reward", "loss", "correct", "error_term", "policy_log_prob", "log_ratio", "length")
# Thresholds that are dense around the decision boundary, where all rewards lie early in training: an evenly spaced grid
# of probabilities would put them into one bin.
_SHIFTED_REWARDS = torch.cat([-torch.logspace(2, -6, 1000, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
_THRESHOLDS = torch.sigmoid(torch.cat([_SHIFTED_REWARDS, -_SHIFTED_REWARDS[:-1].flip(0)]))


class ImplicitRewardMetrics(Metric):
    """Sums and counts per class, and a binned AUROC, from which every metric follows.

    ``compute`` gives, with *chosen* for thumbs-up and *rejected* for thumbs-down (the names dashboards know):

    ===========================  ====================================================================================
    ``loss``                     Eq. 8 on these rows: the sum of the two class means, in nats
    ``rewards/chosen, rejected`` mean implicit reward of a class, in nats
    ``rewards/margins``          their difference
    ``rewards/accuracies``       share of rows on the right side of the shift
    ``accuracy/chosen, rejected``  the same for each class
    ``auroc``                    probability that a random thumbs-up row is rewarded more than a thumbs-down row
    ``bound/error_term``         :math:`E_+[e^{-(r-δ)}] + E_-[e^{r-δ}]` (Theorem 4)
    ``logps/chosen, rejected``   mean log-probability of a completion under the policy, in nats
    ``kl/reference_to_policy``   minus the mean log-ratio: KL(reference, policy) where the reference wrote the rows
    ``length/chosen, rejected``  mean number of completion tokens
    ===========================  ====================================================================================

    A metric of a class without rows is NaN, never 0.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.sums_KC: Tensor
        self.add_state("sums_KC", torch.zeros(len(_QUANTITIES), 2, dtype=torch.float64), dist_reduce_fx="sum")
        self.auroc = BinaryAUROC(thresholds=_THRESHOLDS, validate_args=False)

    def update(self, rows: ScoredRows) -> None:
        """Takes in the rows of a micro-batch."""
        device = self.sums_KC.device
        rewards, up = rows.rewards_B.to(device).double(), rows.thumbs_up_B.to(device)
        policy = rows.policy_log_probs_B.to(device).double()
        reference = rows.reference_log_probs_B.to(device).double()
        shifted = rewards - rows.reward_shift
        values_KB = torch.stack(
            [
                torch.ones_like(rewards),
                rewards,
                rows.losses_B.to(device).double(),
                ((shifted > 0) == up).double(),
                torch.exp(torch.where(up, -shifted, shifted)),
                policy,
                policy - reference,
                rows.completion_lengths_B.to(device).double(),
            ]
        )
        self.sums_KC += values_KB @ torch.stack([up, ~up], dim=1).double()
        with _counting_may_use_any_order():
            # Probabilities, since torchmetrics guesses from the values whether it was given logits.
            self.auroc.update(torch.sigmoid(shifted), up.long())

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all rows since the last reset, over all processes; float64 scalars."""
        sums = dict(zip(_QUANTITIES, self.sums_KC, strict=True))
        rows_C = sums["rows"]
        mean = {name: values_C / rows_C for name, values_C in sums.items()}
        nan = torch.full_like(rows_C[0], torch.nan)
        return {
            "loss": mean["loss"].sum(),
            "rewards/chosen": mean["reward"][0],
            "rewards/rejected": mean["reward"][1],
            "rewards/margins": mean["reward"][0] - mean["reward"][1],
            "rewards/accuracies": sums["correct"].sum() / rows_C.sum(),
            "accuracy/chosen": mean["correct"][0],
            "accuracy/rejected": mean["correct"][1],
            "auroc": self.auroc.compute().double() if bool((rows_C > 0).all()) else nan,
            "bound/error_term": mean["error_term"].sum(),
            "logps/chosen": mean["policy_log_prob"][0],
            "logps/rejected": mean["policy_log_prob"][1],
            "kl/reference_to_policy": -sums["log_ratio"].sum() / rows_C.sum(),
            "length/chosen": mean["length"][0],
            "length/rejected": mean["length"][1],
        }

    def counts(self) -> dict[str, Tensor]:
        """This process's sums and counts, from which :meth:`set_counts` goes on; they add up over processes."""
        return {"sums_KC": self.sums_KC, "confusion": self.auroc.confmat}

    def set_counts(self, counts: dict[str, Tensor]) -> None:
        """Takes over what :meth:`counts` gave."""
        self.sums_KC = counts["sums_KC"].to(self.sums_KC)
        self.auroc.confmat = counts["confusion"].to(self.auroc.confmat)

    def reset(self) -> None:
        """Forgets all rows."""
        super().reset()
        self.auroc.reset()


class MetricsBySource:
    """:class:`ImplicitRewardMetrics` of all rows and, where there are several sources, of the rows of each.

    Args:
        sources: Names of the sources, in the order of their numbers.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self._all = ImplicitRewardMetrics()
        names = _keys_of(sources) if len(sources) > 1 else []
        self._of_source = {name: ImplicitRewardMetrics() for name in names}

    def to(self, device: torch.device | str) -> None:
        """Moves every sum to ``device``."""
        for metrics in self._each():
            metrics.to(device)

    def update(self, rows: ScoredRows) -> None:
        """Takes in the rows of a micro-batch; as that of the metrics."""
        self._all.update(rows)
        for number, metrics in enumerate(self._of_source.values()):
            # Of none of them too, for torchmetrics would warn that it has seen nothing.
            metrics.update(rows.where(rows.sources_B == number))

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all rows, and of each source as ``by_source/NAME/...``; every process has to ask."""
        values = self._all.compute()
        for name, metrics in self._of_source.items():
            values |= {f"by_source/{name}/{key}": value for key, value in metrics.compute().items()}
        return values

    def counts(self) -> dict[str, Tensor]:
        """As that of the metrics, of each of them."""
        return {
            f"{name}/{part}": value
            for name, metrics in self._named().items()
            for part, value in metrics.counts().items()
        }

    def set_counts(self, counts: dict[str, Tensor]) -> None:
        """Takes over what :meth:`counts` gave, of the sources that are still there."""
        for name, metrics in self._named().items():
            known = {key.removeprefix(f"{name}/"): counts[key] for key in counts if key.startswith(f"{name}/")}
            if known:
                metrics.set_counts(known)

    def reset(self) -> None:
        """Forgets all rows."""
        for metrics in self._each():
            metrics.reset()

    def _each(self) -> list[ImplicitRewardMetrics]:
        return [self._all, *self._of_source.values()]

    def _named(self) -> dict[str, ImplicitRewardMetrics]:
        return {"": self._all, **self._of_source}


def _keys_of(sources: Sequence[str]) -> list[str]:
    """A name for each source that can stand in that of a metric, different for each."""
    keys: list[str] = []
    for number, source in enumerate(sources):
        key = re.sub(r"[^\w.-]+", "_", source).strip("_") or "source"
        keys.append(key if key not in keys else f"{key}_{number}")
        while keys.count(keys[-1]) > 1:
            keys[-1] += "_"
    return keys


@contextmanager
def _counting_may_use_any_order() -> Iterator[None]:
    """Lifts torch's deterministic mode, under which torchmetrics counts by comparing everything with everything.

    A sum of whole numbers is the same in any order; the detour took 1.2 s for 8 rows.
    """
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
