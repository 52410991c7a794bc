"""Importance weights of rows that come from a stream, when their turn comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bco_lightning.batch import FeedbackBatch
from bco_lightning.importance.density_ratio import DensityRatio
from bco_lightning.importance.prompt_encoders import ReferenceStates, SentenceEncoder
from bco_lightning.importance.prompt_table import K, prompt_key


class StreamWeights:
    """Gives micro-batches the weights that a sample of their stream implies.

    Where features are states of the reference, they are taken from the passes that the step makes anyway.

    Args:
        encoder: What the density ratio was fitted on.
        ratio: The density ratio.
    """

    def __init__(self, encoder: ReferenceStates | SentenceEncoder, ratio: DensityRatio) -> None:
        self._encoder, self.ratio = encoder, ratio
        self._captured: Any = None

    def prepare(self, batch: FeedbackBatch) -> FeedbackBatch:
        """Does what is done on the CPU: finds the folds of prompts, and embeds words."""
        if not self.ratio.has_evidence:
            return batch
        folds_B = prompt_folds(batch)
        if isinstance(self._encoder, ReferenceStates):
            return replace(batch, prompt_folds_B=folds_B)
        features_BH = self._encoder.features(batch.prompts or ())
        weights_B = self.ratio.weights(self.ratio.log_ratios(features_BH, folds_B))
        return replace(batch, importance_weights_B=weights_B)

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        """Within it, passes of the reference or of what it shares with the policy leave their states."""
        if not isinstance(self._encoder, ReferenceStates):
            yield
            return
        with self._encoder.captured(model) as captured:
            yield
        if captured.states is not None:
            self._captured = captured

    def weigh(self, batch: FeedbackBatch) -> Tensor:
        """Weights of a prepared micro-batch whose passes were watched; shape ``(B,)``, float32, on its device."""
        if batch.prompt_folds_B is None or not isinstance(self._encoder, ReferenceStates):
            return batch.importance_weights_B
        captured, self._captured = self._captured, None
        if self.ratio.mean_H.device != batch.input_ids_S.device:
            self.ratio = self.ratio.to(batch.input_ids_S.device)
        features_BH = self._encoder.pooled(batch, captured)
        return self.ratio.weights(self.ratio.log_ratios(features_BH, batch.prompt_folds_B))


def prompt_folds(batch: FeedbackBatch) -> Tensor:
    """The fold of each row's prompt, int64, shape ``(B,)``.

    Args:
        batch: A micro-batch on the CPU.
    """
    lengths = torch.tensor(batch.lengths).scatter_reduce(
        0, batch.rows_N, batch.position_ids_S[batch.predictors_N] + 1, "amin"
    )
    tokens = batch.input_ids_S.numpy()
    return torch.tensor(
        [
            prompt_key(tokens[span.places()[:length]].tolist()) % K
            for span, length in zip(batch.row_spans, lengths.tolist(), strict=True)
        ]
    )
