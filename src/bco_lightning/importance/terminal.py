"""The trust report of importance weights as tables for the terminal, and as cells for those who draw others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bco_lightning.data.messages import printable
from bco_lightning.importance.trust_report import TrustReport, interval

CALIBRATION_HEADINGS = ("rows", "predicted share up", "observed share up")
CLUSTER_HEADINGS = ("prompts", "up", "down", "weighted down")
_LONGEST_BAR = 30  # characters


def print_trust(report: TrustReport, console: Console, texts: Mapping[int, str] | None = None) -> None:
    """Prints every part; the verdict and what is wrong come last, where they are seen.

    Args:
        report: What is known about the weights.
        console: Where to.
        texts: What to show of the rows that are examples of clusters; nothing of them is shown if left out.
    """
    for table in trust_tables(report, texts or {}, ascii_only=console.options.ascii_only):
        console.print(table, highlight=False)
    console.print(Text(printable(report.verdict)))
    for warning in report.warnings:
        console.print(Text(printable(f"warning: {warning}"), style="yellow"))


def trust_tables(report: TrustReport, texts: Mapping[int, str], *, ascii_only: bool = False) -> list[Table]:
    """Tables of what there is: numbers, calibration, weights, clusters.

    Args:
        report: What is known about the weights.
        texts: What to show of rows that are examples of clusters.
        ascii_only: Whether bars are to be of ASCII.

    Returns:
        At least one table; none is empty.
    """
    clusters = cluster_rows(report, texts)
    bars = _bars(report, "#" if ascii_only else "█")
    with_texts = any(row.examples for row in clusters)
    headings = (*CLUSTER_HEADINGS, *(["examples"] if with_texts else []))
    cells = [
        [*row.cells, *(["\n".join(f"- {said}" for said in row.examples)] if with_texts else [])] for row in clusters
    ]
    tables = [
        text_table("Importance weights of thumbs-down rows", "", "", rows=trust_rows(report)),
        text_table("Calibration, on held-out prompts", *CALIBRATION_HEADINGS, rows=calibration_rows(report)),
        text_table("Weights of thumbs-down rows", "weight", "share of rows", "", rows=bars, left=(0, 2)),
        text_table("Clusters of prompts, with their shares of the classes", *headings, rows=cells, left=(0, 4)),
    ]
    return [table for table in tables if table.row_count]


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


def calibration_rows(report: TrustReport) -> list[tuple[str, str, str]]:
    """Cells of the calibration, see :data:`CALIBRATION_HEADINGS`."""
    return [(f"{of.count:,.0f}", f"{of.predicted:.3f}", f"{of.observed:.3f}") for of in report.calibration]


@dataclass(frozen=True)
class ClusterRow:
    """A cluster as it is shown.

    Args:
        cells: See :data:`CLUSTER_HEADINGS`.
        examples: What its examples say, where that is to be shown.
    """

    cells: tuple[str, ...]
    examples: tuple[str, ...]


def cluster_rows(report: TrustReport, texts: Mapping[int, str]) -> list[ClusterRow]:
    """Clusters as they are shown, those first that gain most by the weights.

    Args:
        report: What is known about the weights.
        texts: What to show of rows that are examples.
    """
    ordered = sorted(report.clusters, key=lambda of: of.share_down - of.share_weighted)
    return [
        ClusterRow(
            (f"{of.prompts:,}", *(f"{share:.1%}" for share in (of.share_up, of.share_down, of.share_weighted))),
            tuple(texts[row] for row in of.examples if row in texts),
        )
        for of in ordered
    ]


def _bars(report: TrustReport, block: str) -> list[tuple[str, str, str]]:
    """A bar for each range of weights, from the first that has rows to the last; none where all weights are 1."""
    filled = [number for number, (_, _, share) in enumerate(report.histogram) if share > 0]
    if not filled or not report.has_evidence:
        return []
    most = max(share for _, _, share in report.histogram)
    return [
        (f"{low:.3g} to {high:.3g}", f"{share:.1%}", block * math.ceil(share / most * _LONGEST_BAR))
        for low, high, share in report.histogram[filled[0] : filled[-1] + 1]
    ]
