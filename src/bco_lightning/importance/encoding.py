"""Encoders as the search for weights needs them: prompts of a data set in batches, features of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.messages import said_in
from bco_lightning.identity import digest_of_values
from bco_lightning.importance.prompt_encoders import ReferenceStates, SentenceEncoder, prompt_batches

_TEXTS_AT_A_TIME = 256
_Array = np.ndarray[Any, Any]


class PromptEncoder(Protocol):
    """Makes features of the prompts of a data set.

    Attributes:
        name: What people call it.
        fingerprint: Digest of all that its features depend on besides the prompt, rounding apart.
    """

    name: str
    fingerprint: str

    def batches(self, dataset: Any, rows: _Array) -> Iterator[tuple[_Array, Any]]:
        """The prompts of some rows in batches: which rows, and what :meth:`features` takes."""

    def features(self, batch: Any) -> Tensor:
        """Features of a batch of prompts, ``(prompts, H)``, float32, on the CPU."""

    def num_truncated(self, dataset: Any, rows: _Array) -> int:
        """How many of the prompts are longer than the encoder takes."""


class ReferencePrompts:
    """Prompts as the reference sees them: in the chat template, cut as they are trained on.

    Args:
        states: Which states, and how they are pooled.
        reference: Digest of the reference's weights, and what else they depend on.
        encode: Features of a micro-batch on the CPU.
    """

    def __init__(
        self, states: ReferenceStates, reference: dict[str, Any], encode: Callable[[FeedbackBatch], Tensor]
    ) -> None:
        self.name = f"the reference, layer {states.depth}, {states.pooling} of the prompt's tokens"
        self.fingerprint = digest_of_values({**reference, **states.fingerprint_parts})
        self._encode = encode

    def batches(self, dataset: Any, rows: _Array) -> Iterator[tuple[_Array, FeedbackBatch]]:
        """The prompts alone, the longest first."""
        return prompt_batches(dataset, rows)

    def features(self, batch: FeedbackBatch) -> Tensor:
        """Their pooled states."""
        return self._encode(batch).cpu()

    def num_truncated(self, dataset: Any, rows: _Array) -> int:
        """None: what was cut is cut for training too, and counted there."""
        return 0


class SentencePrompts:
    """The words of prompts, as a sentence-transformers model sees them.

    Args:
        encoder: The model.
        name: What it is called.
    """

    def __init__(self, encoder: SentenceEncoder, name: str) -> None:
        self.name, self.fingerprint, self._encoder = name, encoder.fingerprint, encoder

    def batches(self, dataset: Any, rows: _Array) -> Iterator[tuple[_Array, list[str]]]:
        """The words of prompts, some hundred at a time."""
        stored = dataset.select_columns(["prompt"])
        for start in range(0, len(rows), _TEXTS_AT_A_TIME):
            some = rows[start : start + _TEXTS_AT_A_TIME]
            yield some, [said_in(prompt) for prompt in stored[some.tolist()]["prompt"]]

    def features(self, batch: list[str]) -> Tensor:
        """Their embeddings."""
        return self._encoder.features(batch)

    def num_truncated(self, dataset: Any, rows: _Array) -> int:
        """Prompts whose words the model does not take in full."""
        return sum(self._encoder.num_truncated(texts) for _, texts in self.batches(dataset, rows))
