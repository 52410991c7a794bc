"""Rows of a stream, read and tokenized when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from bco_lightning.batch import FeedbackRow, LeftOut, TokenizedSample
from bco_lightning.data.messages import words_of
from bco_lightning.data.reading import ReadingOptions
from bco_lightning.data.row_counts import Counted
from bco_lightning.data.row_table import prompt_key
from bco_lightning.data.streaming.block_cache import BlockCache
from bco_lightning.data.streaming.index import StreamIndex
from bco_lightning.data.streaming.scanning import DOWN, UNUSABLE, UP, outcomes_of
from bco_lightning.data.streaming.substitutes import TRIES, Substitutes
from bco_lightning.data.streaming.tally import Tally
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.errors import FeedbackRowError

MALFORMED = "malformed"


@dataclass(frozen=True)
class TokenizedRow:
    """A row that can be trained on."""

    row: FeedbackRow
    sample: TokenizedSample
    number: int
    source: int


class WorkerRowError(FeedbackRowError):
    """An error in a loader worker, as the loader can raise it anew: it makes one of the text of a traceback alone.

    Args:
        where: As of any such error.
        problem: As of any such error.
        remedy: As of any such error.
        message: A text that ends in what the error says, in the place of the others.
    """

    message = "where, problem, remedy"  # torch 2.13 gives the text under this name where a type has such an attribute

    def __init__(self, where: str = "", problem: str = "", remedy: str = "", *, message: str = "") -> None:
        if message:
            where, _, problem = message.rpartition(f"{type(self).__name__}: ")[2].strip().partition(": ")
        super().__init__(where, problem, remedy)


Outcome = TokenizedRow | LeftOut | FeedbackRowError


class StreamDataset(Dataset[dict[str, Any]]):
    """The rows of an index by their number.

    Blocks are kept while they fit, only those rows of them that are drawn from. A row that turns out to be unusable
    only now, since it is too long for instance, is replaced by another of its class, and mostly of its source, chosen
    by the seed and its number alone. It pickles to loader workers, which count together with it.

    Args:
        index: Where the rows are.
        tokenizer: A transformers tokenizer.
        options: What rows depend on; its seed also chooses other rows. A malformed row is raised where ``bad_rows`` is
            ``strict``, and replaced where it is ``skip``.
        by_class: Whether classes are drawn apart.
        cache_bytes: About how much memory blocks may take.
        with_words: Whether rows come with the words of their prompt.
    """

    def __init__(
        self,
        index: StreamIndex,
        tokenizer: Any,
        options: ReadingOptions,
        *,
        by_class: bool = False,
        cache_bytes: int = 2**26,
        with_words: bool = False,
    ) -> None:
        self.index, self._tokenizer, self.options = index, tokenizer, options
        self._by_class, self._cache_bytes, self._with_words = by_class, cache_bytes, with_words
        self._tally = Tally()
        self._begin()

    def _begin(self) -> None:
        self._row_tokenizer = RowTokenizer(self._tokenizer, self.options.limits, self.options.chat_template)
        self.parsers = [dialect.parser() for dialect in self.index.dialects]
        self._blocks = BlockCache(self.index, self._by_class, self._cache_bytes)
        self._substitutes = Substitutes(self.index, self.options.seed, self.flag_of)

    def __getstate__(self) -> dict[str, Any]:
        ours = ("parsers", "_row_tokenizer", "_blocks", "_substitutes")
        return {name: value for name, value in self.__dict__.items() if name not in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        """Rows with a number; some of them may not be usable."""
        return self.index.num_rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One row, or the one in its place, with its ``place`` in the log."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Rows as :func:`collate` takes them, in the order asked for.

        Raises:
            FeedbackRowError: If one is malformed and none is to be skipped, if a file has changed, or if many rows one
                after another are unusable.
        """
        if get_worker_info() is None:
            return self._usable(numbers)
        # Threads of the tokenizer do not outlive a fork; workers are enough.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            return self._usable(numbers)
        except FeedbackRowError as error:
            raise WorkerRowError(error.where, error.problem, error.remedy) from None

    def _usable(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        samples: list[dict[str, Any] | None] = [None] * len(numbers)
        asked = dict(enumerate(numbers))
        others: dict[int, Iterator[int]] = {}
        while asked:
            for at, outcome in zip(list(asked), self.outcomes(list(asked.values())), strict=True):
                if isinstance(outcome, TokenizedRow):
                    samples[at] = _as_sample(outcome, self._with_words)
                    del asked[at]
                else:
                    self._note(outcome)
            asked = {at: next(others.setdefault(at, self._others(numbers[at]))) for at in asked}
        return [sample for sample in samples if sample is not None]

    def outcomes(self, numbers: Sequence[int]) -> list[Outcome]:
        """What becomes of rows, each of which is read, parsed and tokenized, and not replaced."""
        rows = [self._row(number) for number in numbers]
        good = [row for row in rows if isinstance(row, FeedbackRow)]
        tokenized = iter(self._row_tokenizer.tokenize_batch(good))
        outcomes: list[Outcome] = []
        for number, row in zip(numbers, rows, strict=True):
            outcome = next(tokenized) if isinstance(row, FeedbackRow) else row
            if isinstance(row, FeedbackRow) and isinstance(outcome, TokenizedSample):
                outcomes.append(TokenizedRow(row, outcome, number, self._blocks.find(number).source))
            elif isinstance(outcome, (LeftOut, FeedbackRowError)):
                outcomes.append(outcome)
        return outcomes

    def place_of(self, number: int) -> str:
        """File and line of a row.

        Raises:
            FeedbackRowError: If its file cannot be read any more.
        """
        return self._blocks.find(number).place

    def flag_of(self, number: int) -> int:
        """``UP`` or ``DOWN`` by the label of a row; ``UNUSABLE`` if it has none that can be read.

        Raises:
            FeedbackRowError: If its file cannot be read any more.
        """
        if self.index.flags is not None:
            return int(self.index.flags[number])
        row = self._row(number)
        return (UP if row.thumbs_up else DOWN) if isinstance(row, FeedbackRow) else UNUSABLE

    def replaced(self) -> dict[str, Counted]:
        """Rows that were unusable only when their turn came, by reason, here and in all loader workers."""
        return self._tally.counts()

    def _row(self, number: int) -> FeedbackRow | LeftOut | FeedbackRowError:
        found = self._blocks.find(number)
        try:
            outcomes = outcomes_of(self.parsers[found.source], found.read(), found.place)
        except FeedbackRowError as error:
            return error.without_cause()
        return outcomes[min(found.part, len(outcomes) - 1)]  # what is malformed ends the rows of a record

    def _note(self, outcome: LeftOut | FeedbackRowError) -> None:
        if isinstance(outcome, LeftOut):
            self._tally.add(outcome.reason, outcome.place)
        elif self.options.bad_rows == "strict":
            raise outcome
        else:
            self._tally.add(MALFORMED, outcome.where)

    def _others(self, number: int) -> Iterator[int]:
        yield from self._substitutes.of(number)
        raise FeedbackRowError(
            self.place_of(number),
            f"expected a usable row in the place of this one, found {TRIES} others that are not.",
            "See which rows are left out and why: python -m bco_lightning inspect.",
        )


def _as_sample(found: TokenizedRow, with_words: bool) -> dict[str, Any]:
    return {
        "row_id": found.number,
        "input_ids": found.sample.input_ids,
        "completion_mask": found.sample.completion_mask,
        "thumbs_up": found.row.thumbs_up,
        "source": found.source,
        "place": found.row.place,
        "prompt_key": prompt_key(found.row),
        **({"prompt": words_of(found.row.prompt)} if with_words else {}),
    }
