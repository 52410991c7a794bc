"""All that ``inspect`` found out about a feedback log: numbers, and a few examples where they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bco_lightning.data.messages import printable
from bco_lightning.data.row_counts import FeedbackSummary, RowCounts
from bco_lightning.importance.report import TrustReport
from bco_lightning.inspection.cost import Cost
from bco_lightning.inspection.lengths import LengthBias, Lengths, length_bias, over_limits
from bco_lightning.inspection.personal_data import Hits, count_personal_data
from bco_lightning.inspection.prompts import PromptShift, drawn_rows, prompt_shift
from bco_lightning.inspection.rows import RowArrays, prompts_of, texts_of
from bco_lightning.metrics import Auc, auc

Level = Literal["problem", "warning", "note", "good"]
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
class Example:
    """A row for people to look at, shortened, control characters replaced."""

    thumbs_up: bool
    place: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class DataReport:
    """What there is to train on.

    Args:
        model: ``model.name_or_path``, whose tokenizer counts.
        counts: What became of the rows of each data set, that of training first.
        feedback: Repeated rows and answers with both thumbs, over all training files.
        prompt_lengths: Tokens of prompts before cutting, of the rows trained on; so are the parts below.
        completion_lengths: Tokens of completions before cutting.
        limits: ``data.max_length``, and ``data.max_prompt_length`` if there is one.
        over_limits: Rows over each limit among those used.
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
    prompt_lengths: Lengths
    completion_lengths: Lengths
    limits: dict[str, int]
    over_limits: dict[str, int]
    cost: Cost
    prompts: PromptShift
    prompt_bias: Auc | None
    bias: LengthBias
    personal_data: dict[str, Hits]
    examples: tuple[Example, ...] = ()
    notes: tuple[Finding, ...] = ()
    trust: TrustReport | None = None

    @property
    def trained_on(self) -> RowCounts:
        """What became of the rows to train on."""
        return self.counts[0]

    @property
    def findings(self) -> list[Finding]:
        """What one should know before training, the worst first."""
        found = [*self.notes, *_of_counts(self.trained_on), *_of_feedback(self.feedback), *self._of_content()]
        order = ("problem", "warning", "note", "good")
        return sorted(found, key=lambda finding: order.index(finding.level))

    def _of_content(self) -> list[Finding]:
        found = [Finding("warning" if self.bias.is_clear else "good", self.bias.verdict)]
        if self.trust is None:
            found.append(Finding("warning" if self.prompts.is_shifted else "good", self.prompts.verdict))
        else:
            found += _of_trust(self.trust)
        hits = {kind: hits for kind, hits in self.personal_data.items() if hits.hits}
        if hits:
            said = ", ".join(f"{kind} in {hits.rows:,}" for kind, hits in hits.items())
            found.append(Finding("warning", f"Rows with what looks like personal data: {said}. A model may repeat it."))
        return found


def make_report(
    data: Any,
    dataset: Any,
    *,
    model: str,
    limits: dict[str, int],
    arrays: RowArrays,
    cost: Cost,
    num_examples: int,
    notes: tuple[Finding, ...] = (),
    trust: TrustReport | None = None,
) -> DataReport:
    """Looks through the rows that a data module would train on.

    Args:
        data: A :class:`FeedbackDataModule` that has read its training rows.
        dataset: The training rows, or a sample of them.
        model: ``model.name_or_path``.
        limits: ``data.max_length``, and ``data.max_prompt_length`` if there is one.
        arrays: Numbers of the rows of ``dataset``.
        cost: What a run takes.
        num_examples: Examples of either class; 0 shows none.
        notes: What else there is to say.
        trust: What is known about the importance weights.

    Returns:
        The report.
    """
    up = arrays.thumbs_up
    drawn = drawn_rows(len(up), data.seed)
    texts = ((row.prompt, row.completion) for row in texts_of(dataset, data.tokenizer))
    return DataReport(
        model=model,
        counts=tuple(data.counts),
        feedback=data.feedback_summary,
        prompt_lengths=Lengths.of(arrays.prompt_lengths, up),
        completion_lengths=Lengths.of(arrays.completion_lengths, up),
        limits=limits,
        over_limits=over_limits(
            arrays.prompt_lengths, arrays.completion_lengths, limits["data.max_length"],
            limits.get("data.max_prompt_length"),
        ),
        cost=cost,
        prompts=prompt_shift(prompts_of(dataset, drawn), up[drawn], data.seed),
        prompt_bias=auc(arrays.prompt_lengths, up, arrays.prompts),
        bias=length_bias(arrays.completion_lengths, up, arrays.prompts),
        personal_data=count_personal_data(texts),
        examples=_examples(dataset, data.tokenizer, up, num_examples, data.seed),
        notes=notes,
        trust=trust,
    )  # fmt: skip


def _examples(dataset: Any, tokenizer: Any, up: Any, number: int, seed: int) -> tuple[Example, ...]:
    generator = np.random.default_rng(seed)
    chosen = []
    for rows in (np.flatnonzero(up), np.flatnonzero(~up)):
        chosen += sorted(generator.choice(rows, min(number, len(rows)), replace=False).tolist())
    return tuple(
        Example(row.thumbs_up, short_place(row.place), shortened(row.prompt), shortened(row.completion))
        for row in texts_of(dataset, tokenizer, chosen)
    )


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
    """A place without the folders that lead to it, except for the last.

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


def _of_trust(trust: TrustReport) -> list[Finding]:
    verdict = Finding("note" if trust.has_evidence or trust.why_not else "good", trust.verdict)
    return [verdict, *(Finding("warning", warning) for warning in trust.warnings)]


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
