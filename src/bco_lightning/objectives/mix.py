"""Weighted sums of objectives, such as bco with a little sft."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bco_lightning.objectives.objective import Objective, RatedAnswers


class Mix(Objective):
    """A weighted sum of the losses of several objectives, which share one reward shift.

    Rows count as thumbs-up above the threshold of the objective with the largest weight, the first of several such.
    """

    def __init__(self, parts: Mapping[str, Objective], weights: Mapping[str, float], decay: float = 0.9) -> None:
        super().__init__(decay)
        self._parts, self._weights = dict(parts), dict(weights)
        for name, part in self._parts.items():
            part.reward_shift = self.reward_shift
            self.baselines |= {f"{name}_{key}": baseline for key, baseline in part.baselines.items()}
        kinds = self._parts.values()
        for what in ("takes_pairs", "takes_scores", "takes_unrelated", "takes_class_weights"):
            setattr(self, what, any(getattr(part, what) for part in kinds))
        for what in ("takes_one_class", "takes_importance"):
            setattr(self, what, all(getattr(part, what) for part in kinds))
        self.sum_names = tuple(f"{name}_{key}" for name, part in self._parts.items() for key in part.sum_names)

    @property
    def threshold(self) -> float:
        """That of the objective with the largest weight, in nats."""
        return self._parts[max(self._weights, key=self._weights.__getitem__)].threshold

    def losses(self, rows: RatedAnswers) -> Tensor:
        """The weighted sum; one that is NaN makes it NaN."""
        first, *others = (self._weights[name] * part.losses(rows) for name, part in self._parts.items())
        return sum(others, start=first)

    def sums(self, rows: RatedAnswers) -> dict[str, Tensor]:
        """Those of all parts, each under the name of its part."""
        told = {name: part.sums(rows) for name, part in self._parts.items()}
        return {f"{name}_{key}": value for name, values in told.items() for key, value in values.items()}

    def update(self, sums: Mapping[str, float]) -> None:
        """Moves what each part keeps."""
        for name, part in self._parts.items():
            if part.sum_names:
                part.update({key: sums[f"{name}_{key}"] for key in part.sum_names})
