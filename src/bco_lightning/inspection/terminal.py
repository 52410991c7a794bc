"""The report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bco_lightning.data.messages import printable
from bco_lightning.data.row_counts import RowCounts
from bco_lightning.importance.report import interval, text_table, trust_rows
from bco_lightning.inspection.cost import EFFICIENCY, Cost
from bco_lightning.inspection.data_report import DataReport, Example, short_place
from bco_lightning.inspection.lengths import Lengths, LengthSummary
from bco_lightning.inspection.prompts import COIN, PromptShift
from bco_lightning.metrics import Auc

_STYLES = {"problem": "bold red", "warning": "yellow", "note": "", "good": "green"}


def print_report(report: DataReport, console: Console) -> None:
    """Prints every part; examples last, findings at the very end, where they are seen.

    Args:
        report: What was found.
        console: Where to.
    """
    tables = [
        _rows_table(report.counts),
        _reasons_table(report.counts),
        _sources_table(report.trained_on),
        _lengths_table(report),
        _cost_table(report.cost),
        _prompts_table(report),
        _personal_data_table(report),
        _examples_table(report.examples),
    ]
    if report.trust is not None:
        rows = trust_rows(report.trust)
        tables.insert(-1, text_table("Importance weights of thumbs-down rows", "", "", rows=rows))
    for table in tables:
        if table.row_count:
            console.print(table, highlight=False)
    for finding in report.findings:
        console.print(Text(printable(f"{finding.level}: {finding.text}"), style=_STYLES[finding.level]))


def _rows_table(counts: Iterable[RowCounts]) -> Table:
    rows = [
        [c.name, *(f"{value:,}" for value in (c.read, c.used, c.up, c.down, c.num_left_out, c.malformed.count))]
        for c in counts
    ]
    return text_table("Rows", "", "read", "used", "up", "down", "left out", "malformed", rows=rows)


def _reasons_table(counts: Iterable[RowCounts]) -> Table:
    rows = []
    for c in counts:
        lost = [(f"left out: {reason}", counted) for reason, counted in c.left_out.items()]
        lost += [("malformed", c.malformed)] if c.malformed.count else []
        rows += [
            [f"{c.name}, {what}", f"{counted.count:,}", "\n".join(map(short_place, counted.places))]
            for what, counted in lost
        ]
        rows += [[f"{c.name}, {what}", f"{count:,}", ""] for what, count in c.cut.items() if count]
    return text_table("What was lost, and why", "", "rows", "first places", rows=rows)


def _sources_table(counts: RowCounts) -> Table:
    rows = [
        [name, f"{up:,}", f"{down:,}", f"{up / max(1, up + down):.0%}"] for name, (up, down) in counts.by_source.items()
    ]
    return text_table("Thumbs by source", "", "up", "down", "share up", rows=rows)


def _lengths_table(report: DataReport) -> Table:
    rows = [
        *_lengths_rows("prompt", report.prompt_lengths),
        *_lengths_rows("completion", report.completion_lengths),
    ]
    limits = ", ".join(
        f"{name} {limit:,}: {report.over_limits[name]:,} rows over" for name, limit in report.limits.items()
    )
    title = f"Tokens before cutting ({limits})"
    return text_table(title, "", "rows", "min", "median", "mean", "90 %", "95 %", "99 %", "max", rows=rows)


def _lengths_rows(what: str, lengths: Lengths) -> Iterable[list[str]]:
    parts = ((what, lengths.every), ("  up", lengths.up), ("  down", lengths.down))
    return [[name, *summary_cells(part)] for name, part in parts if part is not None]


def summary_cells(summary: LengthSummary) -> list[str]:
    """Count, minimum, median, mean, percentiles and maximum, as they are shown."""
    values = (summary.count, summary.least, summary.median, summary.mean, *summary.percentiles, summary.most)
    return [f"{value:,.0f}" for value in values]


def _cost_table(cost: Cost) -> Table:
    return text_table("An epoch, and the run", "", "", rows=cost_rows(cost))


def cost_rows(cost: Cost) -> list[tuple[str, str]]:
    """Names and values of what a run takes, as they are shown."""
    rows = [
        ("rows of an optimizer step", f"{cost.rows_per_step:,}"),
        ("optimizer steps of an epoch", f"{cost.steps_per_epoch:,}"),
        ("tokens of an epoch", f"{cost.work.tokens:,.0f}"),
        ("of them with loss", f"{cost.work.completion_tokens:,.0f}"),
        ("optimizer steps of the run", "no end is set" if cost.steps is None else f"{cost.steps:,}"),
    ]
    if cost.flops is not None:
        rows.append(("useful FLOPs of an epoch", f"{cost.flops:.2e}"))
    return [*rows, ("rough time", time_in_words(cost))]


def time_in_words(cost: Cost) -> str:
    """The range of time with what it stands on, or why there is none."""
    if cost.seconds is None:
        return f"not known: {cost.why_not}"
    of = "an epoch" if cost.steps is None else "the run"
    share = f"{EFFICIENCY[0]:.0%} to {EFFICIENCY[1]:.0%} of the speed that matrix products reach"
    return f"{of} takes {durations(*cost.seconds)} on {cost.machine}, at {share}; without validation and loading"


def short_time(cost: Cost) -> tuple[str, str]:
    """The same in a few words: the range, and where."""
    if cost.seconds is None:
        return "not known", cost.why_not
    return durations(*cost.seconds), f"on {cost.machine}"


def durations(least: float, most: float) -> str:
    """A range of seconds for people.

    Example:
        >>> durations(80, 1140), durations(1, 9000)
        ('1.3 to 19 min', '1 s to 2.5 h')
    """
    (first, first_unit), (last, last_unit) = _duration(least), _duration(most)
    return f"{first}{'' if first_unit == last_unit else f' {first_unit}'} to {last} {last_unit}"


def _duration(seconds: float) -> tuple[str, str]:
    sizes = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"))
    size, unit = next(((size, unit) for size, unit in sizes if seconds >= size), (1.0, "s"))
    value = seconds / size
    return (f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:,.0f}"), unit


def _prompts_table(report: DataReport) -> Table:
    rows = prompt_rows(report.prompts, report.prompt_bias)
    return text_table("Prompts of thumbs-up against thumbs-down rows", "", "", rows=rows)


def prompt_rows(prompts: PromptShift, bias: Auc | None) -> list[tuple[str, str]]:
    """Names and values of how the prompts of the classes differ, as they are shown."""
    rows = [("rows looked at", f"{prompts.num_rows:,}"), ("distinct prompts", f"{prompts.num_prompts:,}")]
    rows += [("AUC of the prompt's length", interval(bias))] if bias else []
    if prompts.auc is None:
        return [*rows, ("held-out AUC", f"not known: {prompts.why_not}")]
    return [
        *rows,
        ("held-out AUC (95 % interval)", interval(prompts.auc)),
        ("held-out log loss; a constant has", f"{prompts.log_loss:.4f}; {COIN:.4f}"),
    ]


def _personal_data_table(report: DataReport) -> Table:
    rows = [[kind, f"{hits.rows:,}", f"{hits.hits:,}"] for kind, hits in report.personal_data.items()]
    return text_table("What looks like personal data", "", "rows", "finds", rows=rows)


def _examples_table(examples: Iterable[Example]) -> Table:
    table = Table(title="Examples", title_justify="left", show_lines=True)
    for heading in ("", "prompt", "completion"):
        table.add_column(heading, overflow="fold")
    for example in examples:
        thumb = "up" if example.thumbs_up else "down"
        cells = (f"{thumb}\n{example.place}", example.prompt, example.completion)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
