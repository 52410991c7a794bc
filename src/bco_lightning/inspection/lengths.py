"""How long prompts and completions are, what the limits cut of them, and whether thumbs follow length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bco_lightning.metrics import Array, Auc, auc

PERCENTILES = (90, 95, 99)
_NUM_BINS = 36
_NOTED_DIFFERENCE = 0.05
_FEWEST_ROWS = 20  # of the rarer class


@dataclass(frozen=True)
class LengthSummary:
    """Lengths of some texts, in tokens before anything was cut.

    Args:
        count: Number of texts.
        least: The shortest.
        median: Half of the texts are at most as long.
        mean: Average.
        percentiles: The 90th, 95th and 99th.
        most: The longest.
    """

    count: int
    least: int
    median: float
    mean: float
    percentiles: tuple[float, ...]
    most: int

    @classmethod
    def of(cls, lengths: Array) -> LengthSummary | None:
        """Sums up lengths; nothing if there are none.

        Example:
            >>> LengthSummary.of(np.array([1, 2, 3, 10])).median
            2.5
        """
        if not len(lengths):
            return None
        return cls(
            count=len(lengths),
            least=int(lengths.min()),
            median=float(np.median(lengths)),
            mean=float(lengths.mean()),
            percentiles=tuple(float(value) for value in np.percentile(lengths, PERCENTILES)),
            most=int(lengths.max()),
        )


@dataclass(frozen=True)
class Histogram:
    """Shares of each class by length.

    Args:
        edges: Borders of the bins, in tokens, one more than bins; a bin holds what is at least its left border and
            below its right one.
        up: Share of the thumbs-up rows in each bin, 0 to 1.
        down: The same of thumbs-down rows.
        has_overflow: Whether the last bin also holds everything longer.
    """

    edges: tuple[int, ...]
    up: tuple[float, ...]
    down: tuple[float, ...]
    has_overflow: bool

    @classmethod
    def of(cls, lengths: Array, thumbs_up: Array) -> Histogram:
        """Bins of one whole width up to the 99th percentile; what is longer goes into the last one.

        Args:
            lengths: In tokens; at least one.
            thumbs_up: The thumb of each row.
        """
        most = int(lengths.max())
        reach = min(most, int(np.percentile(lengths, 99)) * 11 // 10) + 1
        width = max(1, -(-reach // _NUM_BINS))
        edges = np.arange(0, reach + width, width)
        bins = np.minimum(lengths // width, len(edges) - 2)
        up, down = (_shares(bins[rows], len(edges) - 1) for rows in (thumbs_up, ~thumbs_up))
        return cls(tuple(int(edge) for edge in edges), up, down, has_overflow=most >= int(edges[-1]))


def _shares(bins: Array, size: int) -> tuple[float, ...]:
    counts = np.bincount(bins, minlength=size)
    return tuple(float(share) for share in counts / max(1, len(bins)))


@dataclass(frozen=True)
class Lengths:
    """Lengths of the prompts, or of the completions, of the rows used.

    Args:
        every: Of all rows.
        up: Of thumbs-up rows.
        down: Of thumbs-down rows.
        histogram: By class.
    """

    every: LengthSummary
    up: LengthSummary | None
    down: LengthSummary | None
    histogram: Histogram

    @classmethod
    def of(cls, lengths: Array, thumbs_up: Array) -> Lengths:
        """Sums up lengths by class; there has to be a row."""
        every = LengthSummary.of(lengths)
        assert every is not None  # noqa: S101 (a data set without rows is refused before)
        return cls(
            every,
            LengthSummary.of(lengths[thumbs_up]),
            LengthSummary.of(lengths[~thumbs_up]),
            Histogram.of(lengths, thumbs_up),
        )


@dataclass(frozen=True)
class LengthBias:
    """Whether thumbs follow length.

    Args:
        auc: Probability that a thumbs-up completion is longer than a thumbs-down one; ``None`` with one class.
        mean_up: Mean length of thumbs-up completions, in tokens; NaN without any.
        mean_down: The same of thumbs-down completions.
        quantiles_up: Every tenth percentile of thumbs-up completions from the 0th to the 100th, in tokens.
        quantiles_down: The same of thumbs-down completions.
        num_rarer: Rows of the rarer class.
    """

    auc: Auc | None
    mean_up: float
    mean_down: float
    quantiles_up: tuple[float, ...] = ()
    quantiles_down: tuple[float, ...] = ()
    num_rarer: int = 0

    @property
    def is_clear(self) -> bool:
        """Whether there are enough rows, and the whole interval is at least 0.05 away from a half."""
        if self.auc is None or self.num_rarer < _FEWEST_ROWS:
            return False
        return self.auc.low > 0.5 + _NOTED_DIFFERENCE or self.auc.high < 0.5 - _NOTED_DIFFERENCE

    @property
    def verdict(self) -> str:
        """One sentence, with what to do where thumbs follow length."""
        if self.auc is None:
            return "Not known: there are thumbs of one kind alone."
        said = (
            f"A thumbs-up answer is longer than a thumbs-down one with probability {self.auc.value:.2f} "
            f"({self.auc.low:.2f} to {self.auc.high:.2f})"
        )
        if self.num_rarer < _FEWEST_ROWS:
            return f"{said}, of {self.num_rarer} rows of the rarer class: too few to tell whether thumbs follow length."
        if not self.is_clear:
            return f"{said}: thumbs do not clearly follow length."
        kind = "longer" if self.auc.value > 0.5 else "shorter"
        return (
            f"{said}: thumbs follow length. A model may learn to write {kind} answers and nothing else; compare it "
            "with the reference at equal length, or balance lengths in the log."
        )


def length_bias(lengths: Array, thumbs_up: Array, prompts: Array) -> LengthBias:
    """Compares the lengths of the two classes.

    Args:
        lengths: Tokens of each completion, before anything was cut.
        thumbs_up: The thumb of each row.
        prompts: A number for each row's prompt, for the interval.

    Returns:
        The comparison.
    """
    up, down = lengths[thumbs_up], lengths[~thumbs_up]
    return LengthBias(
        auc(lengths, thumbs_up, prompts),
        mean_up=float(up.mean()) if len(up) else float("nan"),
        mean_down=float(down.mean()) if len(down) else float("nan"),
        quantiles_up=_deciles(up),
        quantiles_down=_deciles(down),
        num_rarer=min(len(up), len(down)),
    )


def _deciles(lengths: Array) -> tuple[float, ...]:
    return tuple(float(value) for value in np.percentile(lengths, range(0, 101, 10))) if len(lengths) else ()


def over_limits(prompt: Array, completion: Array, max_length: int, max_prompt_length: int | None) -> dict[str, int]:
    """How many of the rows used are over each limit.

    Args:
        prompt: Tokens of each prompt.
        completion: Tokens of each completion.
        max_length: Limit of both together.
        max_prompt_length: Limit of the prompt, if there is one.

    Returns:
        Numbers of rows by the name of the limit.

    Example:
        >>> over_limits(np.array([3, 9]), np.array([4, 4]), 10, 5)
        {'data.max_length': 1, 'data.max_prompt_length': 1}
    """
    over: dict[str, Any] = {"data.max_length": (prompt + completion > max_length).sum()}
    if max_prompt_length is not None:
        over["data.max_prompt_length"] = (prompt > max_prompt_length).sum()
    return {limit: int(count) for limit, count in over.items()}
