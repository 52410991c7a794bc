"""The rows of a data set as numbers and as texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from bco_lightning.data.messages import said_in
from bco_lightning.metrics import Array

_BATCH_ROWS = 512
LENGTH_HEADINGS = ("rows", "min", "median", "mean", "90 %", "95 %", "99 %", "max")


@dataclass(frozen=True)
class RowArrays:
    """A number or two for each row that is used; lengths are in tokens."""

    thumbs_up: Array
    prompt_lengths: Array  # before anything was cut, as the next
    completion_lengths: Array
    lengths: Array  # what is trained on, after cutting
    loss_tokens: Array  # those of them that carry loss
    prompts: Array  # keys

    @classmethod
    def of(cls, dataset: Any) -> RowArrays:
        """Reads them from a data set of :class:`FeedbackDataModule`."""
        table = dataset.data
        up, prompt, completion, keys = (
            np.asarray(table.column(name)) for name in ("thumbs_up", "prompt_length", "completion_length", "prompt_key")
        )
        lengths = np.asarray(pc.list_value_length(table.column("input_ids"))).astype(np.int64)
        rows = pc.list_parent_indices(table.column("completion_mask").combine_chunks())
        scored = np.asarray(pc.list_flatten(table.column("completion_mask"))).astype(bool)
        loss_tokens = np.bincount(np.asarray(rows)[scored], minlength=len(lengths))
        return cls(up.astype(bool), prompt.astype(np.int64), completion.astype(np.int64), lengths, loss_tokens, keys)


class RowText(NamedTuple):
    """What a row says in its prompt, what the model is shown of its completion, its thumb, and its file and line."""

    prompt: str
    completion: str
    thumbs_up: bool
    place: str


def texts_of(dataset: Any, tokenizer: Any, rows: Sequence[int]) -> Iterator[RowText]:
    """Some rows of a data set as texts; a few hundred of them in memory."""
    columns = dataset.select_columns(["input_ids", "completion_mask", "prompt", "thumbs_up", "place"])
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = columns[rows[start : start + _BATCH_ROWS]]
        ids = [ids[mask.index(True) :] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
        completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = map(said_in, batch["prompt"])
        yield from map(RowText, prompts, completions, map(bool, batch["thumbs_up"]), batch["place"])


def length_summary(lengths: Array) -> list[float]:
    """Numbers for :data:`LENGTH_HEADINGS`."""
    least, median, *high, most = (float(value) for value in np.percentile(lengths, (0, 50, 90, 95, 99, 100)))
    return [len(lengths), least, median, float(lengths.mean()), *high, most]
