"""What will become of the rows of each class when their turn comes, by some that are tokenized in advance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from bco_lightning.batch import LeftOut
from bco_lightning.data.remote import public_name
from bco_lightning.data.streaming.dataset import MALFORMED, Outcome, StreamDataset, TokenizedRow
from bco_lightning.data.streaming.index import StreamIndex
from bco_lightning.data.streaming.scanning import DOWN, UP
from bco_lightning.errors import FeedbackRowError

_ROWS_OF_CLASS, _RUNS, _BATCH_ROWS = 1000, 64, 128
_NAMES = {UP: "thumbs-up", DOWN: "thumbs-down"}
_RAISE_LIMITS = (
    "Raise data.max_length or data.max_prompt_length, or cut what is too long "
    "(data.long_completions, data.long_prompts)"
)


@dataclass
class ClassPreview:
    """Some rows of a class.

    Args:
        rows: How many.
        left_out: How many of them cannot be used, by reason.
    """

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def usable(self) -> int:
        """Rows that can be trained on."""
        return self.rows - self.left_out.total()


class Preview:
    """Some rows of each class, in so far as their labels can be read.

    Args:
        index: Where rows are.
    """

    def __init__(self, index: StreamIndex) -> None:
        self._index = index
        self.classes = {UP: ClassPreview(), DOWN: ClassPreview()}
        self.by_source = {source.label: (0, 0) for source in index.sources}

    def take(self, number: int, flag: int, outcome: Outcome) -> None:
        """Counts a row, whose flag is known from its label alone."""
        if flag not in self.classes:
            return
        up, down = self.by_source[label := self._index.sources[self._index.source_of(number)].label]
        self.by_source[label] = up + (flag == UP), down + (flag == DOWN)
        self.classes[flag].rows += 1
        if not isinstance(outcome, TokenizedRow):
            self.classes[flag].left_out[outcome.reason if isinstance(outcome, LeftOut) else MALFORMED] += 1

    def check(self, remedy: str = "") -> None:
        """Refuses rows that would leave a class out.

        Args:
            remedy: What else could help.

        Raises:
            FeedbackRowError: If rows of a class were seen, and none of them is usable.
        """
        for flag, known in self.classes.items():
            if known.rows and not known.usable:
                raise FeedbackRowError(
                    ", ".join(public_name(source.path) for source in self._index.sources),
                    f"expected usable rows of both classes, found none among {known.rows} {_NAMES[flag]} drawn evenly "
                    f"({_reasons(known)}).",
                    f"{_RAISE_LIMITS}{remedy}.",
                )

    def __str__(self) -> str:
        return "\n".join(
            f"  of {known.rows} {_NAMES[flag]} drawn evenly, {known.left_out.total() / known.rows:.1%} will be "
            f"replaced by others of their class: {_reasons(known)}"
            for flag, known in self.classes.items()
            if known.left_out
        )


def preview(dataset: StreamDataset) -> Preview:
    """Tokenizes up to a thousand rows of each class from all over an index whose rows were read.

    Raises:
        FeedbackRowError: If one is malformed and none is to be skipped, or a file cannot be read any more.
    """
    found, index = Preview(dataset.index), dataset.index
    seed = dataset.options.seed
    numbers = sorted(number for flag in (UP, DOWN) for number in _rows_of_class(index, flag, seed))
    for number, outcome in outcomes_of_rows(dataset, numbers):
        if isinstance(outcome, FeedbackRowError) and dataset.options.bad_rows == "strict":
            raise outcome
        found.take(number, dataset.flag_of(number), outcome)
    return found


def outcomes_of_rows(dataset: StreamDataset, numbers: list[int]) -> Iterator[tuple[int, Outcome]]:
    """What becomes of rows, a few of them in memory at a time."""
    for start in range(0, len(numbers), _BATCH_ROWS):
        batch = numbers[start : start + _BATCH_ROWS]
        yield from zip(batch, dataset.outcomes(batch), strict=True)


def _rows_of_class(index: StreamIndex, flag: int, seed: int) -> Iterable[int]:
    """Runs of rows of a class, evenly from its first row to its last; runs spare the reading of as many blocks."""
    every = [index.source_rows(source, flag) for source in range(len(index.sources))]
    ends = np.cumsum([len(rows) for rows in every])
    borders = np.linspace(0, ends[-1], min(_RUNS, int(ends[-1])) + 1).astype(np.int64).tolist()
    random, length = np.random.default_rng([seed, flag]), -(-_ROWS_OF_CLASS // _RUNS)
    runs = []
    for start, stop in pairwise(borders):
        first = int(random.integers(start, max(start, stop - length) + 1))
        runs.append(np.arange(first, min(first + length, stop)))
    ranks = np.concatenate(runs) if runs else np.zeros(0, np.int64)
    sources = np.searchsorted(ends, ranks, side="right")
    for source in np.unique(sources).tolist():
        yield from every[source].rows_at(ranks[sources == source] - (ends[source] - len(every[source])))


def _reasons(known: ClassPreview) -> str:
    return "; ".join(f"{reason}: {count}" for reason, count in known.left_out.most_common())
