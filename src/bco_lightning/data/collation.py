"""Pad tokenized rows into a :class:`FeedbackBatch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from bco_lightning.batch import FeedbackBatch


class PaddingCollator:
    """Pads rows on the right to the longest of them.

    Args:
        pad_token_id: The id to pad with; it is masked, so any id will do.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> FeedbackBatch:
        """Makes a batch of rows with ``input_ids``, ``completion_mask``, ``thumbs_up`` and ``row_id``."""
        input_ids = [torch.tensor(sample["input_ids"], dtype=torch.int64) for sample in samples]
        return FeedbackBatch(
            input_ids_BT=pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            attention_mask_BT=pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            completion_mask_BT=pad_sequence(
                [torch.tensor(sample["completion_mask"], dtype=torch.bool) for sample in samples], batch_first=True
            ),
            thumbs_up_B=torch.tensor([bool(sample["thumbs_up"]) for sample in samples]),
            importance_weights_B=torch.ones(len(samples)),
            row_ids_B=torch.tensor([sample["row_id"] for sample in samples]),
        )
