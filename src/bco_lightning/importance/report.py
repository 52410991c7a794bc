"""The trust report: how well prompts tell the classes apart, whether the weights make up for it, what to do if not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bco_lightning.errors import printable
from bco_lightning.metrics import Auc

# Standard errors. 1,129 data sets were simulated whose thumbs do not depend on the prompt: 300 prompts, 1 to 32
# features; 10 % thumbs-up; one prompt with 50 rows, also all alike; heavy tails; 60 prompts; 150 with 100 features.
# The median was about -1.3, one was above 2 (2.18), none above 2.5: false alarms at most 0.3 %, with 95 % confidence.
# Of 10 to 15 prompts 3 of 518 data sets were above 3: so few prompts are refused.
ENOUGH_EVIDENCE = 3.0

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
        evidence: Held-out gain in log loss over a constant, in standard errors, prompts taken as wholes.
        auc: Probability that the prompt of a thumbs-up row scores higher than that of a thumbs-down row.
        log_loss: Held-out log loss of the classifier, in nats per row.
        constant_log_loss: That of the share of thumbs-up among the rows of the other folds.
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
    num_fitted: int = 0
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
        found = []
        if self.has_evidence and self.effective_share < _FEWEST_EFFECTIVE:
            found.append(
                f"A few thumbs-down rows decide: weighted, they are worth {self.effective_share:.1%} of their number. "
                "Lower the upper end of model.importance_clip, or gather thumbs-down rows for more of the prompts."
            )
        if self.has_evidence and self.matched_auc is not None and self.matched_auc.low > _CLEARLY_UNEVEN:
            found.append(
                f"Weighted, the prompts of the classes still differ (AUC {interval(self.matched_auc)}, 0.5 if they "
                "match). Widen model.importance_clip, or try another model.prompt_features.encoder or layer."
            )
        if self.has_evidence and not _SOUND_MASS[0] <= self.mass <= _SOUND_MASS[1]:
            found.append(
                f"The density ratio has mean {self.mass:.2f} over thumbs-down rows before clipping, 1 if it is right. "
                "Try another model.prompt_features.encoder or layer, or set model.importance_weights: off."
            )
        if self.has_evidence and self.mass_at_high > _MOST_AT_HIGH:
            found.append(
                f"Rows at the upper clip have {self.mass_at_high:.1%} of the weight: some prompts hardly occur among "
                "thumbs-down rows. Gather some for them, or raise the upper end of model.importance_clip."
            )
        if self.num_truncated:
            found.append(
                f"Prompts longer than the encoder takes, whose rest does not count: {self.num_truncated:,} of "
                f"{self.num_prompts:,}. Set model.prompt_features.encoder: reference, or one that takes longer texts."
            )
        return found

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrustReport:
        """Made of what ``dataclasses.asdict`` made of another, also by way of JSON."""
        areas = {name: None if values[name] is None else Auc(**values[name]) for name in ("auc", "matched_auc")}
        tables = {name: tuple(tuple(row) for row in values[name]) for name in ("calibration", "histogram")}
        return cls(**{**values, **areas, **tables, "strengths": tuple(values["strengths"])})


def interval(area: Auc | None) -> str:
    """An area with its interval, in words."""
    return "not known" if area is None else f"{area.value:.3f} ({area.low:.3f} to {area.high:.3f})"


def print_trust(report: TrustReport, console: Console) -> None:
    """Prints the numbers; the verdict and what is wrong come last, where they are seen."""
    table = text_table("Importance weights of thumbs-down rows", "", "", rows=trust_rows(report))
    console.print(table, highlight=False)
    console.print(Text(printable(report.verdict)))
    for warning in report.warnings:
        console.print(Text(printable(f"warning: {warning}"), style="yellow"))


def text_table(title: str, *headings: str, rows: Iterable[Iterable[str]], left: Collection[int] = (0,)) -> Table:
    """A table with nothing in it that is markup; text begins on the left in the columns of these numbers."""
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
    tenths = ", ".join(f"{predicted:.0%} {observed:.0%}" for _, predicted, observed in report.calibration)
    rows += [
        ("held-out AUC (95 % interval)", interval(report.auc)),
        ("held-out log loss; a constant has", f"{report.log_loss:.4f}; {report.constant_log_loss:.4f}"),
        ("its gain, in standard errors", f"{report.evidence:.1f}"),
        ("C of the folds", ", ".join(f"{strength:.1g}" for strength in report.strengths)),
        ("predicted and observed shares up, by tenths", tenths),
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
