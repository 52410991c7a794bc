"""The rows of a data set as plain arrays, and as texts a few hundred at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from bco_lightning.data.messages import said_in
from bco_lightning.metrics import Array

_BATCH_ROWS = 512


@dataclass(frozen=True)
class RowArrays:
    """A number or two for each row that is used.

    Args:
        thumbs_up: Its thumb; bool.
        prompt_lengths: Tokens of its prompt before anything was cut.
        completion_lengths: Tokens of its completion before anything was cut.
        lengths: Tokens that are trained on, after cutting.
        loss_tokens: Those of them that carry loss.
        prompts: A number for its prompt; rows with the same prompt have the same.
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
        return cls(
            thumbs_up=_numbers(table, "thumbs_up").astype(bool),
            prompt_lengths=_numbers(table, "prompt_length").astype(np.int64),
            completion_lengths=_numbers(table, "completion_length").astype(np.int64),
            lengths=np.asarray(pc.list_value_length(table.column("input_ids"))).astype(np.int64),
            loss_tokens=_true_values(table.column("completion_mask")),
            prompts=_numbers(table, "prompt_key"),
        )


def _numbers(table: Any, name: str) -> Array:
    return np.asarray(table.column(name))


def _true_values(masks: Any) -> Array:
    """How many values of each list are true."""
    counts = []
    for chunk in masks.chunks:
        ends = np.concatenate(
            [[0], np.cumsum(np.asarray(chunk.flatten().to_numpy(zero_copy_only=False), dtype=np.int64))]
        )
        offsets = np.asarray(chunk.offsets) - chunk.offsets[0].as_py()
        counts.append(ends[offsets[1:]] - ends[offsets[:-1]])
    return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)


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
    """Rows as texts.

    Args:
        dataset: Of :class:`FeedbackDataModule`.
        tokenizer: What made its tokens.
        rows: Which ones; all in order if left out.

    Yields:
        One row after the other; a few hundred are in memory.
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
