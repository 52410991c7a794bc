"""All that ``inspect`` found out about a feedback log, and the sections in which it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from bco_lightning.data.counts import FeedbackSummary, RowCounts
from bco_lightning.data.messages import printable
from bco_lightning.importance.report import TrustReport, interval, trust_rows
from bco_lightning.inspection import figures
from bco_lightning.inspection.cost import EFFICIENCY, Cost
from bco_lightning.inspection.numbers import (
    LENGTH_HEADINGS,
    LengthBias,
    RowArrays,
    RowText,
    length_summary,
    over_limits,
    texts_of,
)  # fmt: skip
from bco_lightning.inspection.personal_data import Hits
from bco_lightning.inspection.prompts import COIN, PromptShift
from bco_lightning.metrics import Array, Auc

Level = Literal["problem", "warning", "note", "good"]
LEVELS: tuple[Level, ...] = ("problem", "warning", "note", "good")
_LONGEST_EXAMPLE = 400  # characters
_CUT_ADVICE = {
    "completions cut": "The model does not see them end: raise data.max_length, or set data.long_completions: drop.",
    "prompts cut": "The model does not see all that was answered to: raise data.max_length.",
}
_MANY_LEFT_OUT, _MANY_CUT, _RARE_CLASS = 0.2, 0.05, 0.2


@dataclass(frozen=True)
class Finding:
    """One thing to know before training.

    Args:
        level: How bad it is; with a ``problem`` the run would not start.
        text: One or two sentences; no text of a row.
    """

    level: Level
    text: str


@dataclass(frozen=True)
class Section:
    """One part of the report; the terminal shows its title and table.

    Args:
        title: What it is about.
        headings: Of the table's columns.
        rows: Cells of the table.
        said: A sentence above the table.
        remark: A sentence below it, in small print.
        pictures: Make its pictures.
        left: Columns whose text begins on the left.
    """

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    said: str = ""
    remark: str = ""
    pictures: tuple[Callable[[], Figure], ...] = ()
    left: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class DataReport:
    """What there is to train on.

    Args:
        model: ``model.name_or_path``, whose tokenizer counts.
        counts: What became of the rows of each data set, that of training first.
        feedback: Repeated rows and answers with both thumbs, over all training files.
        arrays: Numbers of the rows trained on, or of a sample; so are the parts below.
        limits: ``data.max_length``, and ``data.max_prompt_length`` if there is one.
        cost: Tokens, steps and time.
        prompts: How different the prompts of the classes are.
        prompt_bias: Probability that the prompt of a thumbs-up row is longer than that of a thumbs-down row.
        bias: Whether thumbs follow length.
        personal_data: Rows and finds by kind, over prompts and completions.
        examples: A few of either class; empty if they are to be hidden.
        notes: What else there is to say.
        trust: What is known about the importance weights, if there are to be any.
    """

    model: str
    counts: tuple[RowCounts, ...]
    feedback: FeedbackSummary | None
    arrays: RowArrays
    limits: dict[str, int]
    cost: Cost
    prompts: PromptShift
    prompt_bias: Auc | None
    bias: LengthBias
    personal_data: dict[str, Hits]
    examples: tuple[RowText, ...] = ()
    notes: tuple[Finding, ...] = ()
    trust: TrustReport | None = None

    @property
    def trained_on(self) -> RowCounts:
        """What became of the rows to train on."""
        return self.counts[0]

    @property
    def findings(self) -> list[Finding]:
        """What one should know before training, the worst first."""
        found = [*self.notes, *_of_counts(self.trained_on), *_of_feedback(self.feedback)]
        found.append(Finding("warning" if self.bias.is_clear else "good", self.bias.verdict))
        if self.trust is None:
            found.append(Finding("warning" if self.prompts.is_shifted else "good", self.prompts.verdict))
        else:
            level: Level = "note" if self.trust.has_evidence or self.trust.why_not else "good"
            found.append(Finding(level, self.trust.verdict))
            found += [Finding("warning", warning) for warning in self.trust.warnings]
        if hits := {kind: hits for kind, hits in self.personal_data.items() if hits.hits}:
            said = ", ".join(f"{kind} in {hits.rows:,}" for kind, hits in hits.items())
            found.append(Finding("warning", f"Rows with what looks like personal data: {said}. A model may repeat it."))
        return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def examples_of(dataset: Any, tokenizer: Any, up: Array, number: int, seed: int) -> tuple[RowText, ...]:
    """So many rows of either class for people to look at, shortened, control characters replaced."""
    generator = np.random.default_rng(seed)
    chosen = []
    for rows in (np.flatnonzero(up), np.flatnonzero(~up)):
        chosen += sorted(generator.choice(rows, min(number, len(rows)), replace=False).tolist())
    return tuple(
        RowText(shortened(row.prompt), shortened(row.completion), row.thumbs_up, short_place(row.place))
        for row in texts_of(dataset, tokenizer, chosen)
    )


def sections(report: DataReport) -> list[Section]:
    """The report in the order in which it is read."""
    counts = report.trained_on
    lost = _lost(report.counts)
    of_training = {what: count for c, what, count, _ in lost if c is counts}
    parts = [
        Section(
            "Rows",
            ("", "read", "used", "up", "down", "left out", "malformed"),
            [
                (c.name, *(f"{n:,}" for n in (c.read, c.used, c.up, c.down, c.num_left_out, c.malformed.count)))
                for c in report.counts
            ],
        ),
        Section(
            "What was lost, and why",
            ("", "rows", "first places"),
            [(f"{c.name}, {what}", f"{count:,}", places) for c, what, count, places in lost],
            pictures=(partial(figures.rows_lost, of_training),) if of_training else (),
            left=(0, 2),
        ),
        Section(
            "Thumbs by source",
            ("", "up", "down", "share up"),
            [
                (name, f"{ups:,}", f"{downs:,}", f"{ups / max(1, ups + downs):.0%}")
                for name, (ups, downs) in counts.by_source.items()
            ],
            pictures=(partial(figures.thumbs_by_source, counts.by_source),) if counts.by_source else (),
            remark="" if report.feedback is None else (
                f"Rows that repeat an earlier one, thumb included: {report.feedback.duplicates:,}. Answers with thumbs "
                f"of both kinds: {report.feedback.contradictions:,}."
            ),
        ),
        _lengths(report),
        Section(
            "Prompts of thumbs-up against thumbs-down rows",
            ("", ""),
            _prompt_rows(report.prompts, report.prompt_bias),
            said=report.prompts.verdict,
            remark="Logistic regression on words and pairs of words, trained and tested in five folds; a prompt is in "
            "one fold alone.",
            pictures=(partial(figures.roc, report.prompts.roc),) if report.prompts.roc else (),
        ),
        Section("An epoch, and the run", ("", ""), _cost_rows(report.cost)),
        Section(
            "What looks like personal data",
            ("", "rows", "finds"),
            [(kind, f"{hits.rows:,}", f"{hits.hits:,}") for kind, hits in report.personal_data.items()],
            remark="By patterns, and by checksums of cards and IBANs. Names are not looked for, and none found is no "
            "promise.",
        ),
    ]  # fmt: skip
    if (trust := report.trust) is not None:
        drawn = [partial(figures.weight_histogram, trust.histogram)] if trust.has_evidence and trust.histogram else []
        drawn += [partial(figures.calibration, trust.calibration)] if trust.calibration else []
        title = "Importance weights of thumbs-down rows"
        parts.append(Section(title, ("", ""), trust_rows(trust), said=trust.verdict, pictures=tuple(drawn)))
    return [part for part in parts if part.rows]


def _lengths(report: DataReport) -> Section:
    arrays, up = report.arrays, report.arrays.thumbs_up
    over = over_limits(arrays, report.limits)
    said = ", ".join(f"{name} {limit:,}: {over[name]:,} rows over" for name, limit in report.limits.items())
    rows, drawn = [], []
    for what, lengths in (("prompt", arrays.prompt_lengths), ("completion", arrays.completion_lengths)):
        for name, chosen in ((what, lengths), ("  up", lengths[up]), ("  down", lengths[~up])):
            rows.append((name, *(f"{value:,.0f}" for value in length_summary(chosen))))
        limit = "data.max_prompt_length" if what == "prompt" and len(report.limits) > 1 else "data.max_length"
        drawn.append(partial(figures.length_histogram, lengths, up, what, {limit: report.limits[limit]}))
    return Section(
        f"Tokens before cutting ({said})",
        ("", *LENGTH_HEADINGS),
        [row for row in rows if len(row) > 1],
        said=report.bias.verdict,
        remark="Thumbs-up above the line, thumbs-down below it, as shares of each class; the last bar holds what is "
        "longer.",
        pictures=tuple(drawn),
    )


def _lost(counts: Iterable[RowCounts]) -> list[tuple[RowCounts, str, int, str]]:
    """What was left out, malformed or cut: data set, reason, rows, first places."""
    found = []
    for c in counts:
        reasons = [(f"left out: {reason}", counted) for reason, counted in c.left_out.items()]
        reasons += [("malformed", c.malformed)] if c.malformed.count else []
        found += [(c, what, counted.count, ", ".join(map(short_place, counted.places))) for what, counted in reasons]
        found += [(c, what, count, "") for what, count in c.cut.items() if count]
    return found


def _prompt_rows(prompts: PromptShift, bias: Auc | None) -> list[tuple[str, ...]]:
    rows = [("rows looked at", f"{prompts.num_rows:,}"), ("distinct prompts", f"{prompts.num_prompts:,}")]
    rows += [("AUC of the prompt's length", interval(bias))] if bias else []
    if prompts.auc is None:
        return [*rows, ("held-out AUC", f"not known: {prompts.why_not}")]
    return [
        *rows,
        ("held-out AUC (95 % interval)", interval(prompts.auc)),
        ("held-out log loss; a constant has", f"{prompts.log_loss:.4f}; {COIN:.4f}"),
    ]


def _cost_rows(cost: Cost) -> list[tuple[str, ...]]:
    rows = [
        ("rows of an optimizer step", f"{cost.rows_per_step:,}"),
        ("optimizer steps of an epoch", f"{cost.steps_per_epoch:,}"),
        ("tokens of an epoch", f"{cost.tokens:,.0f}"),
        ("of them with loss", f"{cost.completion_tokens:,.0f}"),
        ("optimizer steps of the run", "no end is set" if cost.steps is None else f"{cost.steps:,}"),
    ]
    if cost.seconds is None:
        return [*rows, ("rough time", f"not known: {cost.why_not}")]
    of = "an epoch" if cost.steps is None else "the run"
    share = f"{EFFICIENCY[0]:.0%} to {EFFICIENCY[1]:.0%} of the speed that matrix products reach"
    time = f"{of} takes {durations(*cost.seconds)} on {cost.machine}, at {share}; without validation and loading"
    return [*rows, ("useful FLOPs of an epoch", f"{cost.flops:.2e}"), ("rough time", time)]


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


def shortened(text: str, longest: int = _LONGEST_EXAMPLE) -> str:
    """The beginning and the end of a text, as long as each other, without what would steer a terminal.

    Example:
        >>> shortened("one" + chr(27) + "[31mtwo")
        'one\ufffd[31mtwo'
    """
    half = longest // 2
    text = text.strip()
    return printable(text if len(text) <= longest else f"{text[:half].rstrip()} […] {text[-half:].lstrip()}")


def short_place(place: str) -> str:
    """A place with the last folder of its path alone, which is enough to find it.

    Example:
        >>> short_place("/home/ann/logs/day/1.jsonl:7"), short_place("log.jsonl:3")
        ('day/1.jsonl:7', 'log.jsonl:3')
    """
    return printable("/".join(place.split("/")[-2:]))


def _of_counts(counts: RowCounts) -> list[Finding]:
    found = []
    if counts.malformed.count:
        where = ", ".join(map(short_place, counts.malformed.places))
        found.append(Finding("warning", f"Malformed rows: {counts.malformed.count:,}, the first at {where}."))
    if counts.num_left_out:
        share = counts.num_left_out / counts.read
        level: Level = "warning" if share > _MANY_LEFT_OUT else "note"
        found.append(Finding(level, f"{counts.num_left_out:,} of {counts.read:,} rows are left out ({share:.1%})."))
    for what, advice in _CUT_ADVICE.items():
        cut = counts.cut.get(what, 0)
        if cut > _MANY_CUT * counts.used:
            found.append(Finding("warning", f"{what.capitalize()}: {cut:,} of {counts.used:,}. {advice}"))
    rarer = min(counts.up, counts.down)
    if 0 < rarer < _RARE_CLASS * counts.used:
        text = f"Only {rarer / counts.used:.1%} of the rows are of the rarer class."
        advice = "Leave model.class_weights at auto; data.balanced_sampling: true shows every step both classes."
        found.append(Finding("note", f"{text} {advice}"))
    return found


def _of_feedback(feedback: FeedbackSummary | None) -> list[Finding]:
    found = []
    if feedback and feedback.contradictions:
        text = (
            f"{feedback.contradictions:,} answers have thumbs of both kinds; data.conflicts says what to do with them."
        )
        found.append(Finding("note", text))
    if feedback and feedback.duplicates:
        found.append(Finding("note", f"Rows that repeat an earlier one, thumb included: {feedback.duplicates:,}."))
    if feedback and feedback.validation_prompts_in_training:
        text = f"Validation rows whose prompt is trained on too: {feedback.validation_prompts_in_training:,}."
        found.append(Finding("warning", text))
    return found
