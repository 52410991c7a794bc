"""How far the importance weights of a run can be trusted: numbers, a verdict, and what to do about what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bco_lightning.importance.density_ratio import ENOUGH_EVIDENCE
from bco_lightning.metrics import Auc

_FEWEST_EFFECTIVE = 0.1  # of the thumbs-down rows
_CLEARLY_UNEVEN = 0.6  # AUC
_SOUND_MASS = (0.8, 1.25)
_MOST_AT_HIGH = 0.25


@dataclass(frozen=True)
class CalibrationBin:
    """Held-out rows with about the same predicted probability of a thumbs-up.

    Args:
        count: Rows, each weighted by its passes per epoch.
        predicted: Their mean predicted probability.
        observed: The share of them that has a thumbs-up.
    """

    count: float
    predicted: float
    observed: float


@dataclass(frozen=True)
class PromptCluster:
    """Prompts with similar features.

    Args:
        prompts: Distinct prompts.
        share_up: Share of all thumbs-up rows that belong to them, 0 to 1.
        share_down: Share of all thumbs-down rows.
        share_weighted: Share of the summed weights of all thumbs-down rows; near ``share_up`` where the weights match.
        examples: Rows of the data set with the prompts nearest to the centre, at most two.
    """

    prompts: int
    share_up: float
    share_down: float
    share_weighted: float
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrustReport:
    """What is known about the weights, all of it on prompts that the classifier in question has not seen.

    Args:
        encoder: What the features of prompts come from.
        num_up: Thumbs-up rows, each weighted by its passes per epoch.
        num_down: Thumbs-down rows, likewise.
        num_prompts: Distinct prompts.
        num_fitted: Prompts that the classifier was fitted on.
        num_truncated: Prompts that are longer than the encoder takes.
        why_not: Why no classifier could be fitted, if none could.
        has_evidence: Whether prompts tell the classes apart; where not, all weights are 1.
        evidence: Held-out gain in log loss over a constant, in standard errors.
        auc: Probability that the prompt of a thumbs-up row scores higher than that of a thumbs-down row.
        log_loss: Held-out log loss of the classifier, in nats per row.
        constant_log_loss: That of a constant.
        strengths: Inverse strength of the L2 penalty (scikit-learn's ``C``) chosen in each fold.
        calibration: Predicted and observed shares of thumbs-up, by quantiles of the prediction.
        histogram: Lower edge, upper edge, and share of the thumbs-down rows whose weight lies between.
        effective_share: Effective sample size of the weighted thumbs-down rows over their number, 0 to 1.
        mass: Mean over thumbs-down rows of the density ratio before clipping; 1 if it is right.
        at_low: Share of the thumbs-down rows at the lower clip.
        at_high: Share of them at the upper clip.
        mass_at_high: Share of the summed weights at the upper clip.
        matched_auc: As ``auc``, against the weighted thumbs-down rows; 0.5 if the weights match, above if they do too
            little, below if too much.
        clusters: Prompts in groups, to see which ones gain and which ones lose.
        seconds: Time it took to compute the features and to fit.
    """

    encoder: str
    num_up: float
    num_down: float
    num_prompts: int
    num_fitted: int
    num_truncated: int = 0
    why_not: str = ""
    has_evidence: bool = False
    evidence: float = 0.0
    auc: Auc | None = None
    log_loss: float = math.nan
    constant_log_loss: float = math.nan
    strengths: tuple[float, ...] = ()
    calibration: tuple[CalibrationBin, ...] = ()
    histogram: tuple[tuple[float, float, float], ...] = ()
    effective_share: float = 1.0
    mass: float = 1.0
    at_low: float = 0.0
    at_high: float = 0.0
    mass_at_high: float = 0.0
    matched_auc: Auc | None = None
    clusters: tuple[PromptCluster, ...] = ()
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """One sentence: whether there are weights, and what is left of the thumbs-down rows."""
        if self.why_not:
            return f"All importance weights are 1, because no classifier of prompts could be fitted: {self.why_not}."
        if not self.has_evidence:
            return (
                "All importance weights are 1, because prompts were not shown to tell thumbs-up from thumbs-down rows "
                f"(held-out log loss {self.log_loss:.4f}, that of a constant {self.constant_log_loss:.4f}; the gain is "
                f"{self.evidence:.1f} standard errors, over {ENOUGH_EVIDENCE:g} would be evidence)."
            )
        return (
            "Prompts tell thumbs-up from thumbs-down rows, so thumbs-down rows are weighted to stand for the prompts "
            f"of thumbs-up rows, and are worth {self.effective_share:.1%} of their number."
        )

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the weights, each with a remedy; nothing of a row's text."""
        return [*(self._of_weights() if self.has_evidence else ()), *self._of_encoder()]

    def _of_weights(self) -> list[str]:
        found = []
        if self.effective_share < _FEWEST_EFFECTIVE:
            found.append(
                f"A few thumbs-down rows decide: weighted, they are worth {self.effective_share:.1%} of their number. "
                "Lower the upper end of model.importance_clip, or gather thumbs-down rows for more of the prompts."
            )
        if self.matched_auc is not None and self.matched_auc.low > _CLEARLY_UNEVEN:
            found.append(
                f"Weighted, the prompts of the classes still differ (AUC {interval(self.matched_auc)}, 0.5 if they "
                "match). Widen model.importance_clip, or try another model.prompt_features.encoder or layer."
            )
        if not _SOUND_MASS[0] <= self.mass <= _SOUND_MASS[1]:
            found.append(
                f"The density ratio has mean {self.mass:.2f} over thumbs-down rows before clipping, 1 if it is right. "
                "Try another model.prompt_features.encoder or layer, or set model.importance_weights: off."
            )
        if self.mass_at_high > _MOST_AT_HIGH:
            found.append(
                f"Rows at the upper clip have {self.mass_at_high:.1%} of the weight: some prompts hardly occur among "
                "thumbs-down rows. Gather some for them, or raise the upper end of model.importance_clip."
            )
        return found

    def _of_encoder(self) -> list[str]:
        if not self.num_truncated:
            return []
        return [
            f"Prompts longer than the encoder takes, whose rest does not count: {self.num_truncated:,} of "
            f"{self.num_prompts:,}. Set model.prompt_features.encoder: reference, or one that takes longer texts."
        ]

    def to_values(self) -> dict[str, Any]:
        """The numbers as plain values that JSON can hold: ``None`` for what is not finite."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrustReport:
        """The report whose :meth:`to_values` these are.

        Raises:
            KeyError: If a value is missing.
            TypeError: If there is one too many.
        """
        plain = {name: math.nan if value is None else value for name, value in values.items()}
        areas = {
            name: None if values[name] is None else Auc(**_numbers(values[name])) for name in ("auc", "matched_auc")
        }
        lists: dict[str, Any] = {
            "strengths": tuple(map(_number, values["strengths"])),
            "calibration": tuple(CalibrationBin(**_numbers(of)) for of in values["calibration"]),
            "histogram": tuple((_number(low), _number(high), _number(of)) for low, high, of in values["histogram"]),
            "clusters": tuple(
                PromptCluster(**_numbers({**of, "examples": tuple(of["examples"])})) for of in values["clusters"]
            ),
        }
        return cls(**{**plain, **areas, **lists})


def interval(area: Auc | None) -> str:
    """An area with its interval, in words.

    Example:
        >>> interval(Auc(0.7, 0.65, 0.75)), interval(None)
        ('0.700 (0.650 to 0.750)', 'not known')
    """
    return "not known" if area is None else f"{area.value:.3f} ({area.low:.3f} to {area.high:.3f})"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(of) for name, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in values.items()}
