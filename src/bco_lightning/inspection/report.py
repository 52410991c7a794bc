"""All that ``inspect`` found out about a feedback log, the sections in which it is shown, and pages made of such."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bco_lightning import figures
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.data.counts import Counted, FeedbackSummary, RowCounts
from bco_lightning.errors import ConfigError, UserError, printable
from bco_lightning.importance.report import TrustReport, interval, trust_rows
from bco_lightning.inspection.cost import EFFICIENCY, Cost
from bco_lightning.inspection.numbers import LENGTH_HEADINGS, RowArrays, RowText, length_summary, texts_of
from bco_lightning.inspection.prompts import COIN, PromptShift
from bco_lightning.metrics import NORMAL_95, Array, Auc, auc

Level = Literal["problem", "warning", "note", "good"]
LEVELS: tuple[Level, ...] = ("problem", "warning", "note", "good")
_LONGEST_EXAMPLE = 400  # characters
_CUT_ADVICE = {
    "completions cut": "The model does not see them end: raise data.max_length, or set data.long_completions: drop.",
    "prompts cut": "The model does not see all that was answered to: raise data.max_length.",
}
_MANY_LEFT_OUT, _MANY_CUT, _RARE_CLASS = 0.2, 0.05, 0.2
_NOTED_DIFFERENCE, _FEWEST_ROWS = 0.05, 20  # of an AUC from a half; of the rarer class
_NOTED_RATIO, _NOTED_TAIL = 1.25, 2.0  # of mean lengths; of shares of long answers


class Finding(NamedTuple):
    """One thing to know before training, no text of a row in it; with a ``problem`` the run would not start."""

    level: Level
    text: str


@dataclass(frozen=True)
class Section:
    """A table of the report, with a sentence above it and one in small print below; the terminal shows the table."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    said: str = ""
    remark: str = ""
    pictures: Sequence[Callable[[], Figure]] = ()
    left: tuple[int, ...] = (0,)  # columns whose text begins on the left


@dataclass(frozen=True)
class DataReport:
    """What there is to train on, by the rows trained on or by a sample of them."""

    model: str
    counts: tuple[RowCounts, ...]  # of each data set, that of training first
    feedback: FeedbackSummary | None
    arrays: RowArrays
    limits: dict[str, int]  # data.max_length, and data.max_prompt_length if there is one
    cost: Cost
    prompts: PromptShift
    prompt_bias: Auc | None  # probability that the prompt of a thumbs-up row is longer
    bias: Finding  # whether thumbs follow length
    personal_data: dict[str, tuple[int, int]]  # rows and finds by kind
    examples: tuple[RowText, ...] = ()
    notes: tuple[Finding, ...] = ()
    trust: TrustReport | None = None
    malformed: Mapping[tuple[str, str], Counted] = field(default_factory=dict)  # by what is expected, and the remedy
    problem: UserError | None = None  # why fit would not start

    @property
    def trained_on(self) -> RowCounts:
        """What became of the rows to train on."""
        return self.counts[0]

    @property
    def sections(self) -> list[Section]:
        """Tables and pictures, in the order in which they are read."""
        lost, counts, trust = _lost(self.counts), self.trained_on, self.trust
        of_training = {what: count for c, what, count, _ in lost if c is counts}
        plain, weights = ("", ""), []
        if trust is not None and trust.has_evidence:
            weights.append(partial(figures.weight_histogram, trust.histogram))
        if trust is not None and trust.calibration:
            weights.append(partial(figures.calibration, trust.calibration))
        parts = [
            Section("Rows", ("", "read", "used", "up", "down", "left out", "malformed"), [
                (c.name, *(f"{n:,}" for n in (c.read, c.used, c.up, c.down, c.num_left_out, c.malformed.count)))
                for c in self.counts
            ]),
            Section(
                "What was lost, and why", ("", "rows", "first places"),
                [(f"{c.name}, {what}", f"{count:,}", places) for c, what, count, places in lost],
                pictures=[partial(figures.rows_lost, of_training)] if of_training else (), left=(0, 2),
            ),
            Section(
                "Malformed rows, all of which are in bad_rows.jsonl", ("expected", "rows", "first places", "remedy"),
                [(expected, f"{kind.count:,}", ", ".join(map(short_place, kind.places)), remedy)
                 for (expected, remedy), kind in self.malformed.items()], left=(0, 2, 3),
            ),
            Section(
                "Thumbs by source", ("", "up", "down", "share up"),
                [(name, f"{ups:,}", f"{downs:,}", f"{ups / max(1, ups + downs):.0%}")
                 for name, (ups, downs) in counts.by_source.items()],
                pictures=[partial(figures.thumbs_by_source, counts.by_source)] if counts.by_source else (),
                remark="" if self.feedback is None else (
                    f"Rows that repeat an earlier one, thumb included: {self.feedback.duplicates:,}. Answers with "
                    f"thumbs of both kinds: {self.feedback.contradictions:,}."
                ),
            ),
            _lengths(self),
            Section(
                "Prompts of thumbs-up against thumbs-down rows", plain, _prompt_rows(self.prompts, self.prompt_bias),
                said=self.prompts.verdict,
                remark="Logistic regression on words and pairs of words, trained and tested in five folds; a prompt is "
                "in one fold alone.",
                pictures=[partial(figures.roc, self.prompts.roc)] if self.prompts.roc else (),
            ),
            Section("An epoch, and the run", plain, _cost_rows(self.cost)),
            Section(
                f"What looks like personal data, in {self.prompts.num_rows:,} of {len(self.arrays.lengths):,} rows",
                ("", "rows", "finds"),
                [(kind, f"{rows:,}", f"{finds:,}") for kind, (rows, finds) in self.personal_data.items()],
                remark="By patterns, and by checksums of cards and IBANs. Names are not looked for, and none found is "
                "no promise.",
            ),
            Section(
                "Importance weights of thumbs-down rows", plain, trust_rows(trust) if trust else (),
                said=trust.verdict if trust else "", pictures=weights,
            ),
        ]  # fmt: skip
        return [part for part in parts if part.rows]

    @property
    def findings(self) -> list[Finding]:
        """What one should know before training, the worst first."""
        found = [*self.notes, *_of_counts(self.trained_on), *_of_feedback(self.feedback), self.bias]
        if self.trust is None:
            level: Level = "warning" if self.prompts.is_shifted else _good_if_known(self.prompts.auc)
            found.append(Finding(level, self.prompts.verdict))
        else:
            level = "note" if self.trust.has_evidence else _good_if_known(self.trust.auc)
            found.append(Finding(level, self.trust.verdict))
            found += [Finding("warning", warning) for warning in self.trust.warnings]
        if said := ", ".join(f"{kind} in {rows:,}" for kind, (rows, _) in self.personal_data.items() if rows):
            looked = f"Rows with what looks like personal data, of {self.prompts.num_rows:,} looked at"
            found.append(Finding("warning", f"{looked}: {said}. A model may repeat it."))
        return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def length_bias(arrays: RowArrays) -> Finding:
    """Whether thumbs follow the length of completions before anything was cut, with what to do where they do.

    By the probability that one is longer, by the means, and by the tenth that is longest: a few endless answers of one
    class move the mean, and what a model learns, while that probability stays near a half.
    """
    lengths, up, prompts = arrays.completion_lengths, arrays.thumbs_up, arrays.prompts
    area = auc(lengths, up, prompts)
    if area is None:
        return Finding("note", "Not known: there are thumbs of one kind alone.")
    means, long = _difference(lengths, up, prompts), np.percentile(lengths, 90)
    tails = _difference(lengths > long, up, prompts)
    said = (
        f"A thumbs-up answer is longer than a thumbs-down one with probability {area.value:.2f} "
        f"({area.low:.2f} to {area.high:.2f}); in the mean they have {means.up:,.0f} and {means.down:,.0f} tokens; "
        f"{tails.up:.0%} and {tails.down:.0%} have more than {long:,.0f}"
    )
    if (num_rarer := min(int(up.sum()), int((~up).sum()))) < _FEWEST_ROWS:
        few = f"of {num_rarer} rows of the rarer class: too few to tell whether thumbs follow length."
        return Finding("note", f"{said}, {few}")
    is_ranked = area.low > 0.5 + _NOTED_DIFFERENCE or area.high < 0.5 - _NOTED_DIFFERENCE
    if not (is_ranked or means.is_clear(_NOTED_RATIO) or tails.is_clear(_NOTED_TAIL)):
        if area.is_even and means.is_even(_NOTED_RATIO) and tails.is_even(_NOTED_TAIL):
            return Finding("good", f"{said}: thumbs hardly follow length.")
        return Finding("note", f"{said}: too few rows, or too close, to tell whether thumbs follow length.")
    longer = area.value > 0.5 if is_ranked else means.up > means.down
    advice = (
        f"A model may learn to write {'longer' if longer else 'shorter'} answers and nothing else; compare it with the "
        "reference at equal length, or balance lengths in the log."
    )
    return Finding("warning", f"{said}: thumbs follow length. {advice}")


class _Difference(NamedTuple):
    """A mean of thumbs-up and of thumbs-down rows, and the standard error of the difference over prompts."""

    up: float
    down: float
    error: float

    def is_clear(self, ratio: float) -> bool:
        """Whether they differ beyond chance, and by so much."""
        low, high = sorted((self.up, self.down))
        return high - low > NORMAL_95 * self.error and high > ratio * low

    def is_even(self, ratio: float) -> bool:
        """Whether so much is ruled out."""
        low, high = sorted((self.up, self.down))
        return high - low + NORMAL_95 * self.error <= (ratio - 1) * low


def _difference(values: Array, up: Array, prompts: Array) -> _Difference:
    of_up, of_down = float(values[up].mean()), float(values[~up].mean())
    shares = np.where(up, (values - of_up) / up.sum(), (of_down - values) / (~up).sum())
    of_prompts = np.bincount(np.unique(prompts, return_inverse=True)[1], shares)
    return _Difference(of_up, of_down, float(np.sqrt(np.square(of_prompts).sum())))


def _good_if_known(area: Auc | None) -> Level:
    return "good" if area is not None and area.is_even else "note"


def examples_of(dataset: Any, tokenizer: Any, up: Array, number: int, seed: int) -> tuple[RowText, ...]:
    """So many rows of either class for people to look at, shortened, control characters replaced."""
    generator = np.random.default_rng(seed)
    chosen = []
    for rows in (np.flatnonzero(up), np.flatnonzero(~up)):
        chosen += sorted(generator.choice(rows, min(number, len(rows)), replace=False).tolist())
    return tuple(
        RowText(shortened(prompt), shortened(completion), thumb, short_place(place))
        for prompt, completion, thumb, place in texts_of(dataset, tokenizer, chosen)
    )


def _lengths(report: DataReport) -> Section:
    arrays, up = report.arrays, report.arrays.thumbs_up
    whole = arrays.prompt_lengths + arrays.completion_lengths
    limited = {"data.max_length": whole, "data.max_prompt_length": arrays.prompt_lengths}
    over = [(name, limit, (limited[name] > limit).sum()) for name, limit in report.limits.items()]
    said = ", ".join(f"{name} {limit:,}: {count:,} rows over" for name, limit, count in over)
    rows, drawn = [], []
    for what, lengths in (("prompt", arrays.prompt_lengths), ("completion", arrays.completion_lengths)):
        for name, chosen in ((what, lengths), ("  up", lengths[up]), ("  down", lengths[~up])):
            rows += [(name, *(f"{value:,.0f}" for value in length_summary(chosen)))] if len(chosen) else []
        limit = "data.max_prompt_length" if what == "prompt" and len(report.limits) > 1 else "data.max_length"
        drawn.append(partial(figures.length_histogram, lengths, up, what, {limit: report.limits[limit]}))
    return Section(
        f"Tokens before cutting ({said})",
        ("", *LENGTH_HEADINGS),
        rows,
        said=report.bias.text,
        remark="Thumbs-up above the line, thumbs-down below it, as shares of each class; the last bar holds what is "
        "longer.",
        pictures=drawn,
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
    time = f"{of} takes {cost.duration} on {cost.machine}, at {share}; without validation and loading"
    return [*rows, ("useful FLOPs of an epoch", f"{cost.flops:.2e}"), ("rough time", time)]


def shortened(text: str, longest: int = _LONGEST_EXAMPLE) -> str:
    """The beginning and the end of a text, as long as each other, without what would steer a terminal."""
    half = longest // 2
    text = text.strip()
    return printable(text if len(text) <= longest else f"{text[:half].rstrip()} […] {text[-half:].lstrip()}")


def short_place(place: str) -> str:
    """A place with the last folder of its path alone, which is enough to find it."""
    return printable("/".join(place.split("/")[-2:]))


def _of_counts(counts: RowCounts) -> list[Finding]:
    found = []
    if counts.malformed.count:
        where = ", ".join(map(short_place, counts.malformed.places))
        found.append(Finding("warning", f"Malformed rows: {counts.malformed.count:,}, the first at {where}."))
    found += [Finding("note", f"Columns of {short_place(name)}: {said}.") for name, said in counts.columns.items()]
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
    if feedback is None:
        return []
    both_kinds = "answers have thumbs of both kinds; data.conflicts says what to do with them."
    in_training = "Validation rows whose prompt is trained on too"
    found: list[tuple[int, Level, str]] = [
        (feedback.contradictions, "note", f"{feedback.contradictions:,} {both_kinds}"),
        (feedback.duplicates, "note", f"Rows that repeat an earlier one, thumb included: {feedback.duplicates:,}."),
        (count := feedback.validation_prompts_in_training, "warning", f"{in_training}: {count:,}."),
    ]
    return [Finding(level, text) for count, level, text in found if count]


def rendered(template: str, sections: Iterable[Section], **values: Any) -> str:
    """The page as text; whatever users wrote is escaped in it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["printable"] = printable
    shown = []
    for section in sections:
        drawn = [picture() for picture in section.pictures]
        # matplotlib escapes what it is told
        shown.append((section, [(str(each.get_label()), Markup(figures.to_svg(each))) for each in drawn]))  # noqa: S704
    return environment.get_template(template).render(sections=shown, **values)


def write_text(text: str, path: Path, option: str, replaces: bool = False) -> None:
    """Writes a page into a file, whole or not at all.

    Raises:
        ConfigError: If it cannot be.
    """
    try:
        with written_whole(path, replaces) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(option, f"expected a file to write, found that it cannot be ({error.strerror}).") from error
