"""What comes out of the frozen trunk, kept on disk from the first epoch for those that follow."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

from bco_lightning.batch import FeedbackBatch, Span
from bco_lightning.data.scratch_file import ScratchFile


class TrunkCache:
    """Trunk states of the rows of one data set, in a file without a name that goes when the process goes.

    Each process keeps those of the rows that it came by.

    Args:
        lengths: Tokens of each row.
        hidden_size: Numbers of a token's state.
        dtype: Their data type.

    Raises:
        OSError: If the temporary folder has no room for all rows.
    """

    def __init__(self, lengths: np.ndarray, hidden_size: int, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._known = np.zeros(len(lengths), dtype=bool)
        file = ScratchFile(".states")
        weakref.finalize(self, file.remove)
        file.allocate(self.num_bytes_of(lengths, hidden_size, dtype))
        numbers = int(self._starts[-1]) * hidden_size
        self._states_TH = torch.from_file(file.path, shared=True, size=numbers, dtype=dtype).view(-1, hidden_size)

    @staticmethod
    def num_bytes_of(lengths: np.ndarray, hidden_size: int, dtype: torch.dtype) -> int:  # type: ignore[type-arg]
        """Size of the file."""
        return int(lengths.sum(dtype=np.int64)) * hidden_size * dtype.itemsize

    def lookup(self, batch: FeedbackBatch) -> Tensor | None:
        """States of a micro-batch on the CPU, shape ``(S, H)``; nothing if those of one of its rows are not known."""
        ids = batch.row_ids_B.numpy()
        if not self._known[ids].all():
            return None
        states_SH = self._states_TH.new_empty(batch.num_computed, self._states_TH.shape[1])
        for row, span in zip(ids, batch.row_spans, strict=True):
            for places, part in self._parts(int(row), span):
                states_SH[places] = part
        return states_SH

    def record(self, batch: FeedbackBatch, states_SH: Tensor) -> None:
        """Takes over the states ``(S, H)`` of a micro-batch, from whatever device."""
        states_SH = states_SH.to("cpu")
        for row, span in zip(batch.row_ids_B.tolist(), batch.row_spans, strict=True):
            for places, part in self._parts(row, span):
                part.copy_(states_SH[places])
            self._known[row] = True

    def _parts(self, row: int, span: Span) -> list[tuple[slice, Tensor]]:
        """Where a row's tokens lie in a micro-batch and in the file: its prompt, if shared, and what is its own."""
        start, middle = int(self._starts[row]), int(self._starts[row]) + span.context
        own = (slice(span.start, span.stop), self._states_TH[middle : start + span.length])
        if span.prefix is None:
            return [own]
        return [(slice(span.prefix.start, span.prefix.stop), self._states_TH[start:middle]), own]
