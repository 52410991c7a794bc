"""The rows of a data set as numbers and as texts: lengths, and whether thumbs follow them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from bco_lightning.data.messages import said_in
from bco_lightning.metrics import Array, Auc, auc

_BATCH_ROWS = 512
_NOTED_DIFFERENCE = 0.05
_FEWEST_ROWS = 20  # of the rarer class


@dataclass(frozen=True)
class RowArrays:
    """A number or two for each row that is used.

    Args:
        thumbs_up: Its thumb; bool.
        prompt_lengths: Tokens of its prompt before anything was cut.
        completion_lengths: Tokens of its completion before anything was cut.
        lengths: Tokens that are trained on, after cutting.
        loss_tokens: Those of them that carry loss.
        prompts: The key of its prompt.
    """

    thumbs_up: Array
    prompt_lengths: Array
    completion_lengths: Array
    lengths: Array
    loss_tokens: Array
    prompts: Array

    @classmethod
    def of(cls, dataset: Any) -> RowArrays:
        """Reads them from a data set of :class:`FeedbackDataModule`."""
        table = dataset.data
        up, prompt, completion, keys = (
            np.asarray(table.column(name)) for name in ("thumbs_up", "prompt_length", "completion_length", "prompt_key")
        )
        lengths = np.asarray(pc.list_value_length(table.column("input_ids"))).astype(np.int64)
        rows = pc.list_parent_indices(table.column("completion_mask").combine_chunks())
        scored = np.asarray(pc.list_flatten(table.column("completion_mask")))
        return cls(
            thumbs_up=up.astype(bool),
            prompt_lengths=prompt.astype(np.int64),
            completion_lengths=completion.astype(np.int64),
            lengths=lengths,
            loss_tokens=np.bincount(np.asarray(rows)[scored.astype(bool)], minlength=len(lengths)),
            prompts=keys,
        )


@dataclass(frozen=True)
class RowText:
    """What a row says.

    Args:
        prompt: What is said in the prompt, one message after the other.
        completion: What the model is shown of the completion, special tokens left out.
        thumbs_up: Its thumb.
        place: File and line.
    """

    prompt: str
    completion: str
    thumbs_up: bool
    place: str


def texts_of(dataset: Any, tokenizer: Any, rows: Sequence[int] | Array | None = None) -> Iterator[RowText]:
    """Rows as texts, a few hundred of them in memory.

    Args:
        dataset: Of :class:`FeedbackDataModule`.
        tokenizer: What made its tokens.
        rows: Which ones; all in order if left out.
    """
    chosen = np.arange(len(dataset)) if rows is None else np.asarray(rows, dtype=np.int64)
    columns = dataset.select_columns(["input_ids", "completion_mask", "prompt", "thumbs_up", "place"])
    for start in range(0, len(chosen), _BATCH_ROWS):
        batch = columns[chosen[start : start + _BATCH_ROWS].tolist()]
        ids = [ids[mask.index(True) :] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
        completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
        rest = (batch["prompt"], batch["thumbs_up"], batch["place"])
        for completion, prompt, thumb, place in zip(completions, *rest, strict=True):
            yield RowText(said_in(prompt), completion, bool(thumb), place)


def prompts_of(dataset: Any, rows: Array) -> list[str]:
    """What is said in the prompts of some rows."""
    return [said_in(prompt) for prompt in dataset.select_columns(["prompt"])[rows.tolist()]["prompt"]]


LENGTH_HEADINGS = ("rows", "min", "median", "mean", "90 %", "95 %", "99 %", "max")


def length_summary(lengths: Array) -> list[float]:
    """Numbers for :data:`LENGTH_HEADINGS`; nothing if there are no lengths.

    Example:
        >>> length_summary(np.array([1, 2, 3, 10]))[:4]
        [4, 1.0, 2.5, 4.0]
    """
    if not len(lengths):
        return []
    least, median, *high, most = (float(value) for value in np.percentile(lengths, (0, 50, 90, 95, 99, 100)))
    return [len(lengths), least, median, float(lengths.mean()), *high, most]


@dataclass(frozen=True)
class LengthBias:
    """Whether thumbs follow length.

    Args:
        auc: Probability that a thumbs-up completion is longer than a thumbs-down one; ``None`` with one class.
        num_rarer: Rows of the rarer class.
    """

    auc: Auc | None
    num_rarer: int = 0

    @classmethod
    def of(cls, arrays: RowArrays) -> LengthBias:
        """Compares the lengths of completions before anything was cut."""
        num_up = int(arrays.thumbs_up.sum())
        rarer = min(num_up, len(arrays.thumbs_up) - num_up)
        return cls(auc(arrays.completion_lengths, arrays.thumbs_up, arrays.prompts), rarer)

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


def over_limits(arrays: RowArrays, limits: dict[str, int]) -> dict[str, int]:
    """How many of the rows used are over each limit, ``data.max_length`` or ``data.max_prompt_length``."""
    lengths = {
        "data.max_length": arrays.prompt_lengths + arrays.completion_lengths,
        "data.max_prompt_length": arrays.prompt_lengths,
    }
    return {name: int((lengths[name] > limit).sum()) for name, limit in limits.items()}
