"""The report as one HTML page that needs nothing beside itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bco_lightning.data.messages import printable
from bco_lightning.data.row_counts import RowCounts
from bco_lightning.errors import ConfigError
from bco_lightning.importance.report import trust_rows
from bco_lightning.inspection import pictures
from bco_lightning.inspection.data_report import DataReport, short_place
from bco_lightning.inspection.terminal import cost_rows, prompt_rows, short_time, summary_cells

TEMPLATE = "page.html.j2"


def write_page(report: DataReport, path: Path) -> None:
    """Writes the page.

    Args:
        report: What was found.
        path: A file, which is replaced.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        path.write_text(page_of(report), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "--report", f"expected a file to write, found that it cannot be ({error.strerror})."
        ) from error


def page_of(report: DataReport) -> str:
    """The page as text; whatever users wrote is escaped in it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["printable"] = printable
    counts = report.trained_on
    return environment.get_template(TEMPLATE).render(
        report=report,
        counts=counts,
        tiles=_tiles(report),
        lost=[(c, _lost(c)) for c in report.counts],
        lengths=[("prompt", report.prompt_lengths), ("completion", report.completion_lengths)],
        cells=summary_cells,
        cost_rows=cost_rows(report.cost),
        prompt_rows=prompt_rows(report.prompts, report.prompt_bias),
        trust_rows=trust_rows(report.trust) if report.trust else [],
        pictures=_pictures(report),
    )


def _tiles(report: DataReport) -> list[tuple[str, str, str]]:
    """Name, value and remark of what is shown in large."""
    counts, cost = report.trained_on, report.cost
    steps = cost.steps_per_epoch if cost.steps is None else cost.steps
    return [
        ("Rows used", f"{counts.used:,}", f"of {counts.read:,} read to train on"),
        ("Thumbs up", f"{counts.up / max(1, counts.used):.0%}", f"{counts.up:,} up, {counts.down:,} down"),
        ("Tokens of an epoch", _short(cost.work.tokens), f"{_short(cost.work.completion_tokens)} of them with loss"),
        ("Optimizer steps", f"{steps:,}", f"{cost.rows_per_step:,} rows each, {cost.steps_per_epoch:,} an epoch"),
        ("Rough time", *short_time(cost)),
    ]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (size if unit != 'k' else 1e3):.3g}{unit}"
    return f"{value:,.0f}"


def _lost(counts: RowCounts) -> list[tuple[str, int, str]]:
    """What was left out, cut or malformed: name, rows, first places."""
    lost = [
        (f"left out: {reason}", c.count, ", ".join(map(short_place, c.places))) for reason, c in counts.left_out.items()
    ]
    if counts.malformed.count:
        lost.append(("malformed", counts.malformed.count, ", ".join(map(short_place, counts.malformed.places))))
    return lost + [(what, count, "") for what, count in counts.cut.items() if count]


def _pictures(report: DataReport) -> dict[str, Any]:
    counts = report.trained_on
    lost = {what: count for what, count, _ in _lost(counts)}
    of_both = {"data.max_length": report.limits["data.max_length"]}
    of_prompt = {name: limit for name, limit in report.limits.items() if name not in of_both} or of_both
    drawn: dict[str, Any] = {
        "lost": pictures.bars(lost, counts.read) if lost else "",
        "sources": pictures.thumbs_by_source(counts.by_source),
        "prompt": pictures.length_histogram(report.prompt_lengths.histogram, "prompt", of_prompt),
        "completion": pictures.length_histogram(report.completion_lengths.histogram, "completion", of_both),
        "fans": pictures.length_fans(report.bias),
    }
    if report.prompts.auc is not None:
        drawn["roc"] = pictures.roc_curve(report.prompts.roc)
    if report.bias.auc is not None:
        drawn["bias"] = pictures.interval_gauge(
            report.bias.auc, "up is shorter", "up is longer", "Probability that a thumbs-up answer is longer"
        )
    if report.trust is not None and report.trust.calibration:
        drawn["calibration"] = pictures.calibration_plot(report.trust.calibration)
    if report.trust is not None and report.trust.has_evidence and report.trust.histogram:
        drawn["weights"] = pictures.weight_histogram(report.trust.histogram)
    return drawn
