"""What a run achieved: the table that ``fit`` ends with, and ``report``, a page on one run or several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from bco_lightning import figures
from bco_lightning.errors import printable
from bco_lightning.importance.report import text_table
from bco_lightning.inspection.drift import Change, drift
from bco_lightning.inspection.report import LEVELS, Finding, Level, Section, rendered, short_place, write_text
from bco_lightning.inspection.run_record import RunRecord
from bco_lightning.places import require_free

REPORT_FILE = "report.html"
_BEGINNING = '<!doctype html>\n<html data-made-by="bco_lightning report"'
_STYLES = {"better": "green", "worse": "bold red", "none": "yellow", "unknown": "yellow"}
_LEVELS: dict[str, Level] = {"better": "good", "worse": "problem", "none": "warning", "unknown": "note"}
_FAR, _LONGER = 10.0, 1.3  # nats per answer; times the reference's words
# Names of metrics of held-out rows, what they are called, and how many digits they are shown with.
_MEASURES = (
    ("loss", "loss", 4),
    ("auroc", "AUROC", 3),
    ("accuracy", "accuracy", 3),
    ("margin", "margin of rewards, nats", 3),
    ("kl", "KL to the reference, nats per answer", 3),
    ("length_up", "tokens of thumbs-up answers", 1),
    ("length_down", "tokens of thumbs-down answers", 1),
)
_CURVES = (
    ("Loss", ("train/loss", "val/loss"), ""),
    ("Mean implicit rewards", ("train/reward_up", "train/reward_down", "train/reward_shift"), "nats"),
    ("AUROC", ("train/auroc", "val/auroc"), ""),
    ("Distance from the reference", ("train/kl", "val/kl"), "nats per answer"),
    ("Learning rate", ("train/learning_rate",), ""),
    ("Gradient norm before clipping", ("train/gradient_norm",), ""),
    ("Tokens per second", ("speed/tokens_per_second",), ""),
    ("Peak memory", ("speed/peak_memory_gib",), "GiB"),
)
_COMPARED = (
    ("val/loss", "Held-out loss", ""),
    ("val/auroc", "Held-out AUROC", ""),
    ("train/loss", "Loss", ""),
    ("train/kl", "Distance from the reference", "nats per answer"),
)


def report_runs(runs: list[str], output: str | None = None, overwrite: bool = False) -> None:
    """Writes a page on what a run achieved, or on several side by side.

    Args:
        runs: Folders of runs, ``RUN_FOLDER/version_N``.
        output: The page to write, which needs no other file; ``report.html`` in the folder of one run, and where
            several are compared in the working folder, if left out.
        overwrite: Replace the page, if it is one of this command.

    Raises:
        ConfigError: If a folder is not that of a run.
    """
    records = [RunRecord.read(Path(run)) for run in runs]
    path = Path(output) if output else (records[0].folder if len(records) == 1 else Path()) / REPORT_FILE
    # That of a run's own folder was written by its fit.
    require_free("--output", path, _BEGINNING if overwrite or output is None else "")
    write_text(page_of_runs(records), path, "--output", replaces=True)
    for record in records:
        print_outcome(record, Console())
    print(f"\nReport {path}")


def print_outcome(record: RunRecord, console: Console) -> None:
    """Prints what the held-out rows say, before and after, and one sentence."""
    if rows := _outcome_rows(record):
        console.print(text_table(f"Held-out rows, {record.folder}", "", "before", "after", rows=rows), highlight=False)
    console.print(Text(printable(record.outcome.text), style=_STYLES[record.outcome.level]))


def print_metrics(values: Mapping[str, Any], names: Sequence[str], console: Console) -> None:
    """Prints what an evaluation has logged, in the order of ``names``, the numbers of each source beside all."""
    known = [name for name in names if name in values]
    sources = list(dict.fromkeys(name.split("/")[2] for name in known if "/by_source/" in name))
    rows = []
    for name in [*known, *sorted(values.keys() - {*known, "step"})]:
        stage, _, metric = name.partition("/")
        if not metric.startswith("by_source/"):
            beside = [f"{stage}/by_source/{source}/{metric}" for source in sources]
            rows.append((name, *(_shown(float(values.get(each, math.nan)), 4) for each in (name, *beside))))
    console.print(text_table("", "", "all rows", *sources, rows=rows), highlight=False)


def page_of_runs(records: Sequence[RunRecord]) -> str:
    """The page as text."""
    if len(records) == 1:
        return rendered("run.html.j2", _sections(records[0]), findings=_findings_of(records), records=records,
                        tiles=_tiles(records[0]), findings_title="What it did",
                        settings=yaml.safe_dump(dict(records[0].settings), sort_keys=False),
                        samples=records[0].newest_samples)  # fmt: skip
    return rendered("run.html.j2", _compared(records), findings=_findings_of(records), records=records, tiles=[],
                    findings_title="What they did", settings="", samples=[])  # fmt: skip


def _findings_of(records: Sequence[RunRecord]) -> list[Finding]:
    """What to know, the worst first."""
    found = []
    for record in records:
        before = f"{short_place(str(record.folder))}: " if len(records) > 1 else ""
        found += [Finding(finding.level, before + finding.text) for finding in _findings(record)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _findings(record: RunRecord) -> list[Finding]:
    outcome = record.outcome
    found = [Finding(_LEVELS[outcome.level], outcome.text)]
    losses = [(step, value) for step, value in record.curves.get("val/loss", ()) if math.isfinite(value)]
    if losses and (best := min(losses, key=lambda point: point[1]))[0] != losses[-1][0]:
        advice = "Train for fewer steps, or keep the step that is best by it (checkpoint.monitor: val/loss)."
        found.append(Finding("warning", f"The held-out loss was lowest at step {best[0]:,} ({best[1]:.4f}), "
                                        f"and is {losses[-1][1]:.4f} at the end. {advice}"))  # fmt: skip
    if (kl := record.last("val/kl") or record.last("train/kl")) is not None and abs(kl) > _FAR:
        advice = "Lower model.learning_rate, raise model.beta, or train for fewer steps."
        found.append(Finding("warning", f"The policy is {kl:.1f} nats per answer from the reference. {advice}"))
    for change in _drift(record):
        if change.name.startswith("words") and change.is_clear and change.policy > _LONGER * change.reference:
            found.append(Finding("warning", f"Answers grew from {change.reference:.0f} to {change.policy:.0f} words: "
                                            "read every score beside their length."))  # fmt: skip
        elif change.is_share and change.is_clear and change.low > 0:
            found.append(Finding("warning", f"More {change.name} than before: {change.reference:.0%} became "
                                            f"{change.policy:.0%}. See whether thumbs reward that."))  # fmt: skip
    if outcome.level in ("none", "unknown"):
        advice = "Gather more rows, train for more steps, or raise model.learning_rate while KL is small."
        found.append(Finding("note", advice))
    return found


def _sections(record: RunRecord) -> list[Section]:
    held_out, both = record.held_out, ("", "before", "after")
    parts = [Section("Held-out rows", both, _outcome_rows(record), said=record.outcome.text)]
    if held_out is not None:
        pictures: list[Any] = list(held_out.pictures.values())
        rows = [("rows", f"{len(held_out.rewards):,}"), ("of the rarer class", f"{held_out.num_rarer:,}")]
        parts.append(Section(f"Their rewards at step {held_out.step:,}", ("", ""), rows, pictures=pictures))
    pictures = []
    for title, names, unit in _CURVES:
        if lines := {name: record.curves[name] for name in names if record.curves.get(name)}:
            pictures.append(partial(figures.curves, title, lines, unit))
    ends = [(name, _shown(points[-1][1])) for name, points in record.curves.items() if name.startswith("train/")]
    parts.append(Section("Curves", ("", "at the end"), ends, pictures=pictures))
    if changes := _drift(record):
        said = f"Policy against reference, {len(record.newest_samples)} held-out prompts, one sample of either."
        remark = "Counted by English phrases and words; intervals are 95 % intervals over prompts."
        headings = ("", "policy", "reference", "difference")
        parts.append(Section("Drift", headings, [_drift_row(change) for change in changes], said=said, remark=remark))
    if record.alignment:
        rows = [(name, _shown(value)) for name, value in record.alignment.items() if isinstance(value, (int, float))]
        parts.append(Section("Known reward", ("", ""), rows))
    versions = [(name, str(value)) for name, value in record.provenance.get("versions", {}).items()]
    known = ((name, record.provenance.get(name)) for name in ("seed", "python", "git_revision"))
    made_of = [(name, str(value)) for name, value in known if value is not None]
    parts.append(Section("Versions", ("", ""), [*made_of, *versions]))
    return [part for part in parts if part.rows]


def _compared(records: Sequence[RunRecord]) -> list[Section]:
    names = [short_place(str(record.folder)) for record in records]
    rows = [(said, *(_shown(r.last(f"val/{name}"), digits) for r in records)) for name, said, digits in _MEASURES]
    pictures = []
    for metric, what, unit in _COMPARED:
        lines = {name: r.curves[metric] for name, r in zip(names, records, strict=True) if r.curves.get(metric)}
        if lines:
            pictures.append(partial(figures.curves, what, lines, unit))
    flat = [_flat(record.settings) for record in records]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in keys if len({repr(settings.get(key)) for settings in flat}) > 1]
    changed = [(key, *(str(settings.get(key, "")) for settings in flat)) for key in differing]
    left = tuple(range(len(records) + 1))
    return [
        Section("Held-out rows at the end", ("", *names), rows, pictures=pictures),
        Section("Settings that differ", ("", *names), changed or [("none", *("" for _ in records))], left=left),
    ]


def _outcome_rows(record: RunRecord) -> list[tuple[str, ...]]:
    return [
        (said, _shown(record.at_first(name), digits), _shown(after, digits))
        for name, said, digits in _MEASURES
        if (after := record.last(f"val/{name}")) is not None
    ]


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    auroc, kl, speed = (record.last(name) for name in ("val/auroc", "val/kl", "speed/tokens_per_second"))
    rows = record.provenance.get("fingerprints", {}).get("rows")
    return [
        ("Optimizer steps", f"{record.steps:,}", f"{rows:,} rows to train on" if isinstance(rows, int) else ""),
        ("Held-out AUROC", _shown(auroc, 3), "0.5 before training"),
        ("KL to the reference", _shown(kl, 2), "nats per answer"),
        ("Speed", _shown(speed, 0), "tokens per second"),
    ]


def _drift(record: RunRecord) -> list[Change]:
    samples = record.newest_samples
    if not samples:
        return []
    return drift([sample["policy"] for sample in samples], [sample["reference"] for sample in samples])


def _drift_row(change: Change) -> tuple[str, ...]:
    numbers = (change.policy, change.reference, change.policy - change.reference, change.low, change.high)
    policy, reference, difference, low, high = (format(n, ".1%" if change.is_share else ".1f") for n in numbers)
    return change.name, policy, reference, difference + (f" ({low} to {high})" if math.isfinite(change.low) else "")


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {name: values} if name else {}
    return {
        key: value for own, each in values.items() for key, value in _flat(each, f"{name}.{own}".lstrip(".")).items()
    }


def _shown(value: float | None, digits: int | None = None) -> str:
    """With so many digits behind the point, or four in all."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.4g}" if digits is None else f"{value:,.{digits}f}"
