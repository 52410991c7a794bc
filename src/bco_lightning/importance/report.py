"""The trust report: how well prompts tell the classes apart, whether the weights make up for it, what to do if not."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bco_lightning.data.messages import printable
from bco_lightning.importance.ratio import ENOUGH_EVIDENCE, Array, FittedRatio, K, clipped_ratios
from bco_lightning.metrics import Auc, clustered_auc

_BINS, _EDGES = 10, np.geomspace(0.05, 20.0, 21)
_FEWEST_EFFECTIVE = 0.1  # of the thumbs-down rows
_CLEARLY_UNEVEN = 0.6  # AUC
_SOUND_MASS = (0.8, 1.25)
_MOST_AT_HIGH = 0.25


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
        calibration: Rows, and their predicted and observed shares of thumbs-up, by tenths of the prediction.
        histogram: Lower edge, upper edge, and share of the thumbs-down rows whose weight lies between.
        effective_share: Effective sample size of the weighted thumbs-down rows over their number, 0 to 1.
        mass: Mean over thumbs-down rows of the density ratio before clipping; 1 if it is right.
        at_low: Share of the thumbs-down rows at the lower clip.
        at_high: Share of them at the upper clip.
        mass_at_high: Share of the summed weights at the upper clip.
        matched_auc: As ``auc``, against the weighted thumbs-down rows; 0.5 if the weights match, above if they do too
            little, below if too much.
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
    log_loss: float | None = None
    constant_log_loss: float | None = None
    strengths: tuple[float, ...] = ()
    calibration: tuple[tuple[float, float, float], ...] = ()
    histogram: tuple[tuple[float, float, float], ...] = ()
    effective_share: float = 1.0
    mass: float = 1.0
    at_low: float = 0.0
    at_high: float = 0.0
    mass_at_high: float = 0.0
    matched_auc: Auc | None = None
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
        checks = [
            (
                self.has_evidence and self.effective_share < _FEWEST_EFFECTIVE,
                f"A few thumbs-down rows decide: weighted, they are worth {self.effective_share:.1%} of their number. "
                "Lower the upper end of model.importance_clip, or gather thumbs-down rows for more of the prompts.",
            ),
            (
                self.has_evidence and self.matched_auc is not None and self.matched_auc.low > _CLEARLY_UNEVEN,
                f"Weighted, the prompts of the classes still differ (AUC {interval(self.matched_auc)}, 0.5 if they "
                "match). Widen model.importance_clip, or try another model.prompt_features.encoder or layer.",
            ),
            (
                self.has_evidence and not _SOUND_MASS[0] <= self.mass <= _SOUND_MASS[1],
                f"The density ratio has mean {self.mass:.2f} over thumbs-down rows before clipping, 1 if it is right. "
                "Try another model.prompt_features.encoder or layer, or set model.importance_weights: off.",
            ),
            (
                self.has_evidence and self.mass_at_high > _MOST_AT_HIGH,
                f"Rows at the upper clip have {self.mass_at_high:.1%} of the weight: some prompts hardly occur among "
                "thumbs-down rows. Gather some for them, or raise the upper end of model.importance_clip.",
            ),
            (
                self.num_truncated > 0,
                f"Prompts longer than the encoder takes, whose rest does not count: {self.num_truncated:,} of "
                f"{self.num_prompts:,}. Set model.prompt_features.encoder: reference, or one that takes longer texts.",
            ),
        ]
        return [said for wrong, said in checks if wrong]

    def to_values(self) -> dict[str, Any]:
        """The numbers as plain values that JSON can hold, ``None`` for what is not known."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrustReport:
        """The report whose :meth:`to_values` these are.

        Raises:
            KeyError: If a value is missing.
            TypeError: If there is one too many.
        """
        areas = {name: None if values[name] is None else Auc(**values[name]) for name in ("auc", "matched_auc")}
        tables = {name: tuple(tuple(row) for row in values[name]) for name in ("calibration", "histogram")}
        return cls(**{**values, **areas, **tables, "strengths": tuple(values["strengths"])})


def make_report(
    fitted: FittedRatio, num_up_P: Array, num_down_P: Array, keys_P: Array, *, encoder: str, **others: Any
) -> TrustReport:
    """Judges a fit on the prompts that it was made on, each by the classifier that has not seen it.

    Args:
        fitted: What :func:`~bco_lightning.importance.ratio.fit_density_ratio` gave for the next three.
        num_up_P: Thumbs-up rows of each prompt.
        num_down_P: Thumbs-down rows of each prompt.
        keys_P: Key of each prompt; int64.
        encoder: What people call the source of the features.
        others: What is known of the whole data set, such as ``num_prompts``, in place of the numbers of the fit.
    """
    up_P, down_P = (np.asarray(of, dtype=np.float64) for of in (num_up_P, num_down_P))
    known: dict[str, Any] = {
        "num_up": float(up_P.sum()),
        "num_down": float(down_P.sum()),
        "num_prompts": len(up_P),
        **others,
    }
    if fitted.why_not:
        return TrustReport(encoder, num_fitted=0, why_not=fitted.why_not, **known)
    scores_P = fitted.log_ratios_P.double().cpu().numpy()
    weights_P = fitted.ratio.weights(fitted.log_ratios_P).double().cpu().numpy()
    has_evidence = fitted.ratio.has_evidence
    if has_evidence:
        known |= weight_summary(fitted.log_ratios_P, down_P, fitted.ratio.clip)
    return TrustReport(
        encoder,
        num_fitted=len(up_P),
        has_evidence=has_evidence,
        evidence=fitted.evidence,
        auc=weighted_auc(scores_P, up_P, down_P, keys_P),
        log_loss=fitted.log_loss,
        constant_log_loss=fitted.constant_log_loss,
        strengths=fitted.strengths,
        calibration=calibration_bins(scores_P + math.log(up_P.sum() / down_P.sum()), up_P, down_P),
        histogram=weight_histogram(weights_P, down_P),
        matched_auc=weighted_auc(scores_P, up_P, down_P * weights_P, keys_P),
        **known,
    )


def weighted_auc(scores_P: Array, up_P: Array, down_P: Array, keys_P: Array) -> Auc:
    """Probability that the prompt of a thumbs-up row scores higher than that of a thumbs-down row of its fold.

    Scores of different classifiers are not compared: where none of them knows anything, what is left of their
    intercepts would say the opposite of each fold's share of thumbs-up.

    Args:
        scores_P: A number for each prompt.
        up_P: Its thumbs-up rows.
        down_P: Its thumbs-down rows, or the sum of their weights.
        keys_P: Its key, of which its fold is the remainder.

    Returns:
        The mean of the folds' areas, with an interval that takes prompts as wholes.
    """
    areas = []
    for fold in range(K):
        ups, downs = (np.flatnonzero((of > 0) & (keys_P % K == fold)) for of in (up_P, down_P))
        if len(ups) and len(downs):
            prompts, positive = np.concatenate([ups, downs]), np.arange(len(ups) + len(downs)) < len(ups)
            weights = np.where(positive, up_P[prompts], down_P[prompts])
            areas.append(clustered_auc(scores_P[prompts], positive, prompts, weights))
    values, variances = zip(*areas, strict=True)
    return Auc.with_variance(float(np.mean(values)), float(np.sum(variances)) / len(areas) ** 2)


def calibration_bins(logits_P: Array, up_P: Array, down_P: Array) -> tuple[tuple[float, float, float], ...]:
    """Rows, and predicted and observed shares of thumbs-up, in tenths of the rows from the lowest prediction on.

    Fewer than ten where prompts with many rows fill several; the rows of a prompt stay together.
    """
    order = np.argsort(logits_P, kind="stable")
    rows = (up_P + down_P)[order]
    bins = np.minimum(((np.cumsum(rows) - rows / 2) / rows.sum() * _BINS).astype(int), _BINS - 1)
    predicted = np.exp(-np.logaddexp(0, -logits_P[order]))
    count, expected, observed = (np.bincount(bins, of, _BINS) for of in (rows, rows * predicted, up_P[order]))
    filled = count > 0
    shares = ((of[filled] / count[filled]).tolist() for of in (expected, observed))
    return tuple(zip(count[filled].tolist(), *shares, strict=True))


def weight_histogram(weights_P: Array, down_P: Array) -> tuple[tuple[float, float, float], ...]:
    """Lower edge, upper edge and share of the thumbs-down rows, in 20 steps of equal ratio; the ends take the rest."""
    shares = np.histogram(np.clip(weights_P, _EDGES[0], _EDGES[-1]), _EDGES, weights=down_P)[0] / down_P.sum()
    return tuple(zip(_EDGES[:-1].tolist(), _EDGES[1:].tolist(), shares.tolist(), strict=True))


def weight_summary(log_ratios_P: Tensor, down_P: Array, clip: tuple[float, float]) -> dict[str, float]:
    """What weights do to the thumbs-down rows of prompts, in the words of :class:`TrustReport`."""
    ratios_P, logs_P = clipped_ratios(log_ratios_P, clip).cpu().numpy(), log_ratios_P.double().cpu().numpy()
    high_P, num_down, mass = logs_P >= math.log(clip[1]), down_P.sum(), down_P @ ratios_P
    return {
        "effective_share": float(mass**2 / (down_P @ ratios_P**2) / num_down),
        "mass": float(down_P @ np.exp(np.minimum(logs_P, 99.0)) / num_down),  # larger ones would overflow
        "at_low": float(down_P @ (logs_P <= math.log(clip[0])) / num_down),
        "at_high": float(down_P @ high_P / num_down),
        "mass_at_high": float((down_P * ratios_P) @ high_P / mass),
    }


def interval(area: Auc | None) -> str:
    """An area with its interval, in words.

    Example:
        >>> interval(Auc(0.7, 0.65, 0.75)), interval(None)
        ('0.700 (0.650 to 0.750)', 'not known')
    """
    return "not known" if area is None else f"{area.value:.3f} ({area.low:.3f} to {area.high:.3f})"


def print_trust(report: TrustReport, console: Console) -> None:
    """Prints the numbers; the verdict and what is wrong come last, where they are seen."""
    table = text_table("Importance weights of thumbs-down rows", "", "", rows=trust_rows(report))
    console.print(table, highlight=False)
    console.print(Text(printable(report.verdict)))
    for warning in report.warnings:
        console.print(Text(printable(f"warning: {warning}"), style="yellow"))


def text_table(title: str, *headings: str, rows: Iterable[Iterable[str]], left: Collection[int] = (0,)) -> Table:
    """A table with nothing in it that is markup.

    Args:
        title: What is above it.
        headings: One for each column.
        rows: Cells of each row.
        left: Numbers of the columns whose text begins on the left; that of others ends on the right.
    """
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def trust_rows(report: TrustReport) -> list[tuple[str, str]]:
    """Names and values of the numbers, as they are shown; those of weights only where not all are 1."""
    rows = [
        ("features of prompts", report.encoder),
        ("rows", f"{report.num_up:,.0f} up, {report.num_down:,.0f} down"),
        ("distinct prompts", f"{report.num_prompts:,}, {report.num_fitted:,} of them fitted on"),
    ]
    if report.num_truncated:
        rows.append(("prompts longer than the encoder takes", f"{report.num_truncated:,}"))
    if report.why_not:
        return [*rows, ("held-out AUC", f"not known: {report.why_not}")]
    rows += [
        ("held-out AUC (95 % interval)", interval(report.auc)),
        ("held-out log loss; a constant has", f"{report.log_loss:.4f}; {report.constant_log_loss:.4f}"),
        ("its gain, in standard errors", f"{report.evidence:.1f}"),
        ("C of the folds", ", ".join(f"{strength:.1g}" for strength in report.strengths)),
        (
            "predicted and observed shares up, by tenths",
            ", ".join(f"{predicted:.0%} {observed:.0%}" for _, predicted, observed in report.calibration),
        ),
    ]
    if report.has_evidence:
        rows += [
            ("effective thumbs-down rows", f"{report.effective_share:.1%} of their number"),
            ("mean density ratio; 1 if right", f"{report.mass:.3f}"),
            ("rows at the lower, upper clip", f"{report.at_low:.1%}, {report.at_high:.1%}"),
            ("weight at the upper clip", f"{report.mass_at_high:.1%}"),
            ("the same against weighted rows; 0.5 if they match", interval(report.matched_auc)),
        ]
    return [*rows, ("time it took, once", f"{report.seconds:,.1f} s")]
