"""The report in the terminal, and as one HTML page that needs nothing beside itself."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bco_lightning.data.messages import printable
from bco_lightning.errors import ConfigError
from bco_lightning.importance.report import text_table
from bco_lightning.inspection.figures import to_svg
from bco_lightning.inspection.report import DataReport, durations, sections

_STYLES = {"problem": "bold red", "warning": "yellow", "note": "", "good": "green"}


def print_report(report: DataReport, console: Console) -> None:
    """Prints every table; examples last, findings at the very end, where they are seen."""
    for section in sections(report):
        table = text_table(section.title, *section.headings, rows=section.rows, left=section.left)
        console.print(table, highlight=False)
    if report.examples:
        table = Table(title="Examples", title_justify="left", show_lines=True)
        for heading in ("", "prompt", "completion"):
            table.add_column(heading, overflow="fold")
        for example in report.examples:
            place = f"{'up' if example.thumbs_up else 'down'}\n{example.place}"
            table.add_row(*(Text(printable(cell)) for cell in (place, example.prompt, example.completion)))
        console.print(table, highlight=False)
    for finding in report.findings:
        console.print(Text(printable(f"{finding.level}: {finding.text}"), style=_STYLES[finding.level]))


def write_page(report: DataReport, path: Path) -> None:
    """Writes the page into a file, which is replaced."""
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
    drawn = [(section, [_drawn(picture()) for picture in section.pictures]) for section in sections(report)]
    return environment.get_template("page.html.j2").render(report=report, tiles=_tiles(report), sections=drawn)


def _drawn(figure: Figure) -> tuple[str, Markup]:
    return str(figure.get_label()), Markup(to_svg(figure))  # noqa: S704 - matplotlib escapes what it is told


def _tiles(report: DataReport) -> list[tuple[str, str, str]]:
    """Name, value and remark of what is shown in large."""
    counts, cost = report.trained_on, report.cost
    steps = cost.steps_per_epoch if cost.steps is None else cost.steps
    time = ("not known", cost.why_not) if cost.seconds is None else (durations(*cost.seconds), f"on {cost.machine}")
    return [
        ("Rows used", f"{counts.used:,}", f"of {counts.read:,} read to train on"),
        ("Thumbs up", f"{counts.up / max(1, counts.used):.0%}", f"{counts.up:,} up, {counts.down:,} down"),
        ("Tokens of an epoch", _short(cost.tokens), f"{_short(cost.completion_tokens)} of them with loss"),
        ("Optimizer steps", f"{steps:,}", f"{cost.rows_per_step:,} rows each, {cost.steps_per_epoch:,} an epoch"),
        ("Rough time", *time),
    ]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (size if unit != 'k' else 1e3):.3g}{unit}"
    return f"{value:,.0f}"
