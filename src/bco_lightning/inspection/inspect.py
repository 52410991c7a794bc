"""``python -m bco_lightning inspect``: what a config's data looks like, in the terminal and as one HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from bco_lightning.data import FeedbackDataModule
from bco_lightning.data.counts import Counted
from bco_lightning.data.images import opened
from bco_lightning.data.row_sets import BAD_ROWS, SEE_ALL
from bco_lightning.errors import ConfigError, FeedbackRowError, UserError, printable
from bco_lightning.importance.report import TrustReport, text_table
from bco_lightning.importance.weights import MOST_PROMPTS
from bco_lightning.inspection.cost import cost_of
from bco_lightning.inspection.numbers import RowArrays, texts_of
from bco_lightning.inspection.personal_data import count_personal_data
from bco_lightning.inspection.prompts import drawn_rows, prompt_shift
from bco_lightning.inspection.report import DataReport, Finding, examples_of, length_bias, rendered, write_text
from bco_lightning.metrics import auc
from bco_lightning.module import BCOModule
from bco_lightning.places import require_free

_BEGINNING = '<!doctype html>\n<html data-made-by="bco_lightning inspect"'
_STYLES = {"problem": "bold red", "warning": "yellow", "note": "", "good": "green"}


def inspect_command(
    data_options: Mapping[str, Any],
    model_options: Mapping[str, Any],
    trainer_options: Mapping[str, Any],
    report: str = "inspect.html",
    examples: int = 3,
    hide_examples: bool = False,
    overwrite: bool = False,
) -> None:
    """What ``inspect`` takes beside the options of ``fit``.

    Args:
        data_options: Arguments of the data module.
        model_options: Arguments of the module.
        trainer_options: Arguments of the trainer.
        report: The page to write, which needs no other file.
        examples: Rows of either class to show.
        hide_examples: Show no row's text, neither in the terminal nor on the page.
        overwrite: Replace the page, if it is one of this command.

    Raises:
        UserError: Where ``fit`` would not start either; if the rows can be read, after the report.
    """
    if examples < 0:
        raise ConfigError("--examples", f"expected a number from 0 on, found {examples}.")
    page = Path(report)
    require_free("--report", page, _BEGINNING if overwrite else "")
    require_free("--report", bad_rows := page.with_name(BAD_ROWS), '{"place": "' if overwrite else "")
    module = BCOModule(**model_options)
    data, problem = _read(FeedbackDataModule(**data_options, tokenizer=module.tokenizer))
    if problem is not None:  # whose advice is this very command
        problem = FeedbackRowError(problem.where, problem.problem, problem.remedy.removesuffix(SEE_ALL).rstrip())
    if not data.counts:  # of a log that would stop a run, all that is malformed is to be told
        skipping = {**data_options, "bad_rows": "skip", "max_bad_rows": 1.0}
        data, other = _read(FeedbackDataModule(**skipping, tokenizer=module.tokenizer))
        problem = problem if data.counts or data.bad_rows else other
    if data.bad_rows:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data.bad_rows)
        write_text(lines, bad_rows, "--report", replaces=overwrite)
        print(printable(f"Malformed rows, all of them: {bad_rows}"))
    elif overwrite:
        bad_rows.unlink(missing_ok=True)  # that of an earlier log
    found = _report(module, data, problem, trainer_options, 0 if hide_examples else examples)
    print_report(found, Console())
    write_text(page_of(found), page, "--report", replaces=overwrite)
    print(printable(f"\nPage   {report}"))
    if found.problem is not None:
        raise found.problem


def inspect_log(
    module: BCOModule, data: FeedbackDataModule, trainer_options: Mapping[str, Any] | None = None, examples: int = 3
) -> DataReport:
    """What to know of a log before it is trained on: numbers, findings, and sections with tables and pictures.

    Args:
        module: Names the model; no weight is loaded but for ``importance_weights``.
        data: The log, a data module that was given ``module.tokenizer``.
        trainer_options: Arguments of the trainer that steps and time are worked out for, such as ``max_epochs``.
        examples: Rows of either class to show.

    Raises:
        UserError: If the rows cannot be read. Where ``fit`` would not start for another reason, that is the report's
            ``problem``.
    """
    return _report(module, *_read(data), trainer_options or {}, examples)


def _report(
    module: BCOModule,
    data: FeedbackDataModule,
    problem: UserError | None,
    trainer_options: Mapping[str, Any],
    examples: int,
) -> DataReport:
    if problem is not None and not data.counts:
        raise problem
    kinds: dict[tuple[str, str], Counted] = {}
    for row in data.bad_rows:
        kinds.setdefault((row["expected"], row["remedy"]), Counted()).take(1, [row["place"]])
    dataset, options = data.training.table(MOST_PROMPTS), data.options
    trust: TrustReport | None = None
    if (wanted := module.options.importance_weights) != "off":
        weights = module.weighing.find(data, module.reference, None)
        trust, problem = weights.report, problem or weights.problem(wanted)
    notes = [] if problem is None else [Finding("problem", f"fit would not start: {problem.where}: {problem.problem}")]
    if options.streaming:
        text = f"A stream: all but the counts is about {len(dataset):,} rows drawn evenly from it."
        notes.append(Finding("note", text))
    if "images" in dataset.column_names:
        sizes = [opened(each).size for images in dataset["images"] for each in images]
        sides = " to ".join("{} x {}".format(*chosen(sizes, key=math.prod)) for chosen in (min, max))
        notes.append(Finding("note", f"{len(sizes):,} images, of {sides} pixels."))
    arrays, seed = RowArrays.of(dataset), options.row_seed
    limits = {"data.max_length": options.max_length, "data.max_prompt_length": options.max_prompt_length}
    up, drawn = arrays.thumbs_up, drawn_rows(len(dataset), seed)
    texts = list(texts_of(dataset, data.tokenizer, drawn.tolist()))
    # The data module knows of no trainer here: its steps are micro-batches of one device.
    size, micro_batches = options.batch_size, data.steps_per_epoch
    return DataReport(
        model=module.options.name_or_path,
        counts=tuple(data.counts),
        feedback=data.feedback_summary,
        arrays=arrays,
        limits={name: limit for name, limit in limits.items() if limit is not None},
        cost=cost_of(arrays, data.class_frequencies[0], module.options, trainer_options, size, micro_batches),
        prompts=prompt_shift([row.prompt for row in texts], up[drawn], seed),
        prompt_bias=auc(arrays.prompt_lengths, up, arrays.prompts),
        bias=length_bias(arrays),
        personal_data=count_personal_data(row[:2] for row in texts),
        examples=examples_of(dataset, data.tokenizer, up, examples, seed),
        notes=tuple(notes),
        trust=trust,
        malformed=kinds,
        problem=problem,
    )


def _read(data: FeedbackDataModule) -> tuple[FeedbackDataModule, FeedbackRowError | None]:
    """The rows to train on, and what would stop a run; if that comes after they are there, they have counts."""
    try:
        data.setup("fit")
    except FeedbackRowError as error:
        return data, error
    return data, None


def print_report(report: DataReport, console: Console) -> None:
    """Prints every table; examples last, findings at the very end, where they are seen."""
    for section in report.sections:
        table = text_table(section.title, *section.headings, rows=section.rows, left=section.left)
        console.print(table, highlight=False)
    if report.examples:
        rows = [(f"{'up' if row.thumbs_up else 'down'}\n{row.place}", *row[:2]) for row in report.examples]
        table = text_table("Examples", "", "prompt", "completion", rows=rows, left=(0, 1, 2))
        table.show_lines = True
        console.print(table, highlight=False)
    for finding in report.findings:
        console.print(Text(printable(f"{finding.level}: {finding.text}"), style=_STYLES[finding.level]))


def page_of(report: DataReport) -> str:
    """The page as text."""
    told = {"findings_title": "What to know before training", "findings": report.findings, "tiles": _tiles(report)}
    return rendered("page.html.j2", report.sections, report=report, **told)


def _tiles(report: DataReport) -> list[tuple[str, str, str]]:
    """Name, value and remark of what is shown in large."""
    counts, cost = report.trained_on, report.cost
    steps = cost.steps_per_epoch if cost.steps is None else cost.steps
    return [
        ("Rows used", f"{counts.used:,}", f"of {counts.read:,} read to train on"),
        ("Thumbs up", f"{counts.up / max(1, counts.used):.0%}", f"{counts.up:,} up, {counts.down:,} down"),
        ("Tokens of an epoch", f"{cost.tokens:,.0f}", f"{cost.completion_tokens:,.0f} of them with loss"),
        ("Optimizer steps", f"{steps:,}", f"{cost.rows_per_step:,} rows each, {cost.steps_per_epoch:,} an epoch"),
        ("Rough time", cost.duration, cost.why_not or f"on {cost.machine}"),
    ]
