"""The distinct prompts of a data set, with how many thumbs-up and thumbs-down rows each of them has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

K = 5  # folds
KEY_BYTES = 8
_ROWS_AT_A_TIME = 1000
_COLUMNS = ["input_ids", "completion_mask"]

Array = np.ndarray[Any, Any]


def prompt_length(completion_mask: Sequence[bool]) -> int:
    """Tokens before the first one that carries loss; all but the last where none does; never less than one.

    A row's first token carries no loss whatever its mask says, since nothing comes before it.

    Args:
        completion_mask: ``True`` for each token of a row that carries loss.

    Example:
        >>> prompt_length([False, False, True, False, True]), prompt_length([False, False, False])
        (2, 2)
    """
    mask = completion_mask
    return next((place for place in range(1, len(mask)) if mask[place]), max(len(mask) - 1, 1))


def prompt_key(token_ids: Sequence[int]) -> int:
    """What a prompt is known by: the first 64 bits of BLAKE2b over its tokens as little-endian int32.

    Args:
        token_ids: The tokens before the first one that carries loss.

    Example:
        >>> prompt_key([1, 2, 3]) == prompt_key((1, 2, 3)) != prompt_key([1, 2])
        True
    """
    return int.from_bytes(_digest(np.asarray(token_ids, dtype="<i4").tobytes()), "little")


def prompt_keys_and_lengths(dataset: Dataset) -> tuple[Array, Array]:
    """:func:`prompt_key` and :func:`prompt_length` of every row.

    Args:
        dataset: Rows with ``input_ids`` and ``completion_mask``.

    Returns:
        Keys, uint64, and lengths in tokens, int64, each of shape ``(rows,)``.
    """
    keys, lengths = bytearray(), [np.empty(0, np.int64)]
    for tokens, starts, stops in _prompts(dataset):
        data = tokens.data.cast("B")
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            keys += _digest(data[4 * start : 4 * stop])
        lengths.append(stops - starts)
    return np.frombuffer(bytes(keys), dtype="<u8").astype(np.uint64), np.concatenate(lengths)


def prompt_lengths(dataset: Dataset) -> Array:
    """:func:`prompt_length` of every row; int64, shape ``(rows,)``."""
    return np.concatenate([np.empty(0, np.int64), *(stops - starts for _, starts, stops in _prompts(dataset))])


@dataclass(frozen=True, eq=False)
class PromptTable:
    """Distinct prompts in the order of their keys; ``P`` of them.

    Args:
        keys: :func:`prompt_key` of each prompt; uint64, shape ``(P,)``.
        num_up: Thumbs-up rows of each prompt, weighted; float64, shape ``(P,)``.
        num_down: Thumbs-down rows of each prompt, weighted; float64, shape ``(P,)``.
        first_rows: The first row of the data set that has the prompt; int64, shape ``(P,)``.
        numbers: The prompt of each row of the data set, as a place in the arrays above; int64, shape ``(rows,)``.
    """

    keys: Array
    num_up: Array
    num_down: Array
    first_rows: Array
    numbers: Array

    @classmethod
    def of(cls, dataset: Dataset, row_weights: Array | None = None) -> PromptTable:
        """Reads the prompts of a data set.

        Args:
            dataset: Rows with ``input_ids``, ``completion_mask`` and ``thumbs_up``.
            row_weights: What each row counts for, such as its passes per epoch; 1 if left out; shape ``(rows,)``.
        """
        row_keys, _ = prompt_keys_and_lengths(dataset)
        up = np.concatenate([np.empty(0, bool), *_thumbs(dataset)])
        weights = np.ones(len(up)) if row_weights is None else np.asarray(row_weights, dtype=np.float64)
        keys, first_rows, numbers = np.unique(row_keys, return_index=True, return_inverse=True)
        num_up, num_down = (np.bincount(numbers, weights * chosen, minlength=len(keys)) for chosen in (up, ~up))
        return cls(keys, num_up, num_down, first_rows.astype(np.int64), numbers.astype(np.int64))

    @property
    def folds(self) -> Array:
        """The part of the data that each prompt belongs to, by its key alone; int64, shape ``(P,)``."""
        return np.asarray(self.keys % np.uint64(K), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.keys)


def _digest(tokens: bytes | memoryview) -> bytes:
    return hashlib.blake2b(tokens, digest_size=KEY_BYTES).digest()


def _prompts(dataset: Dataset) -> Iterator[tuple[Array, Array, Array]]:
    """Tokens of some rows, one row after the other, and where the prompt of each begins and ends among them."""
    for table in dataset.select_columns(_COLUMNS).with_format("arrow").iter(_ROWS_AT_A_TIME):
        (ids, starts, ends), (mask, mask_starts, _) = (_flat(table.column(name)) for name in _COLUMNS)
        mask = mask.copy()
        mask[mask_starts] = False  # nothing comes before a row's first token
        scored = np.append(np.flatnonzero(mask), len(mask))
        first = scored[np.searchsorted(scored, mask_starts)] - mask_starts
        lengths = ends - starts
        prompts = np.where(first < lengths, first, np.maximum(lengths - 1, 1))
        yield np.ascontiguousarray(ids, dtype="<i4"), starts, starts + prompts


def _flat(column: pa.ChunkedArray) -> tuple[Array, Array, Array]:
    """The values of lists, one list after the other, and where each list begins and ends among them."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values[offsets[0] : offsets[-1]].to_numpy(zero_copy_only=False)
    offsets -= offsets[0]
    return values, offsets[:-1], offsets[1:]


def _thumbs(dataset: Dataset) -> Iterator[Array]:
    for table in dataset.select_columns(["thumbs_up"]).with_format("arrow").iter(_ROWS_AT_A_TIME):
        yield np.asarray(table.column("thumbs_up").to_numpy(), dtype=bool)
